"""The commands that set up a client and find out what is wrong.

Invariant: standard output has what is to be run or applied elsewhere, or the findings, and nothing else. Uses the
options of the running cache, else those of the environment.
"""

import ipaddress
import os
import re
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pullthrough.admin.client import ask
from pullthrough.cli.common import (
    AsJson,
    Folder,
    fail,
    folder_of,
    print_json,
    print_lines,
    refusals,
    settings_in_force,
)
from pullthrough.cli.help_text import LOOKING, SETTING_UP, Verbs
from pullthrough.config.parsers import is_address
from pullthrough.config.paths import as_called_here
from pullthrough.config.settings import PROXY_PORT, Endpoint
from pullthrough.core.errors import NoDaemon

if TYPE_CHECKING:
    from pullthrough.doctor.rules import ServerFacts

app = Verbs()

_USUAL: Final = Endpoint("http", "", PROXY_PORT)
"""Where the proxy of a cache is that was started without a word about it."""
_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?")


class Kind(StrEnum):
    """What a client may be."""

    LINUX = "linux"
    MACOS = "macos"
    WINDOWS = "windows"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"


@app.command(rich_help_panel=SETTING_UP)
def connect(
    kind: Annotated[Kind, typer.Option("--for", help="The kind of client.")] = Kind.LINUX,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Where clients find the proxy, if not at a port of this machine.",
            show_default=False,
        ),
    ] = "",
    undo: Annotated[
        bool, typer.Option("--undo", help="Print the command that undoes it on the client.", show_default=False)
    ] = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
    json: AsJson = False,
) -> None:
    """Print the command that sets up a client, to be run there."""
    # Cryptography takes longer to load than most commands take to run.
    from pullthrough.net.address_policy import local_ports
    from pullthrough.pki.authority import has_authority
    from pullthrough.pki.client_setup import SYSTEMS, UNDO, clients_host, clients_origin, command, documents
    from pullthrough.pki.rollover import Rollover
    from pullthrough.runtime.platform import own_addresses

    if undo:
        return print_json({"for": kind, "undo": UNDO[kind]}) if json else print_lines([UNDO[kind]])
    given = _ADDRESS.fullmatch(f"[{address}]" if ":" in address and is_address(address) else address)
    if address and given is None:
        raise typer.BadParameter(f"expected a host or host:port, got {address!r}")
    if given and given["port"] and not 0 < int(given["port"]) < 65536:
        raise typer.BadParameter(f"expected a port from 1 to 65535, got {given['port']}")
    with refusals():
        settings, running = settings_in_force(dir), _running_proxy(dir)
        if running is None and not has_authority(settings.certs):
            fail(
                f"no cache runs on {folder_of(dir)}, and there is no authority in {settings.certs} for clients to "
                "trust: start the cache with `ollama-cache run`"
            )
        rollover = Rollover.load(settings.certs, settings.intercepted, now=datetime.now(UTC))
    if running is None:
        typer.echo(f"No cache runs on {folder_of(dir)}: start it before this is used on a client.", err=True)
    elif local := local_ports(running, settings):
        typer.echo(
            f"The cache listens for this machine alone at {', '.join(local)}, and no client can connect to it: start "
            "it with --listen-host 0.0.0.0, and with listen=:9200",
            err=True,
        )
    host = (given["v6"] or given["host"]) if given else clients_host(settings)
    if not given and settings.advertise is None and not _is_reachable(host):
        fail(f"clients cannot reach {host}, the only address that was found: name another with --address or advertise")
    proxy = Endpoint("http", host, int(given["port"]) if given and given["port"] else (running or _USUAL).port)
    made = documents(rollover.certificates, rollover.permitted, proxy.origin)
    if kind not in SYSTEMS:
        document = made[f"/connect/{kind}.yaml"].body.decode()
        if json:
            return print_json({"for": kind, "proxy": proxy.origin, "document": document})
        return typer.echo(document, nl=False)
    if not settings.listen:
        fail("clients fetch the script from the port of the option listen, which is off; see docs/clients.md")
    line = command(kind, made[f"/connect/{SYSTEMS[kind]}"], server=clients_origin(settings, host), proxy=proxy.origin)
    if json:
        return print_json({"for": kind, "proxy": proxy.origin, "command": line})
    typer.echo(f"To be run on the client; `connect --undo --for {kind}` prints what takes it back:", err=True)
    typer.echo(line)
    if not given and (others := sorted(filter(_is_reachable, own_addresses() - {host}))):
        named = ", ".join(f"[{each}]" if ":" in each else each for each in others)
        typer.echo(f"For --address, this machine also has {named}", err=True)
    return None


@app.command(rich_help_panel=LOOKING)
def doctor(
    client: Annotated[
        bool, typer.Option("--client", help="Look at this machine's Ollama, not at the cache.", show_default=False)
    ] = False,
    json: AsJson = False,
    dir: Folder = None,  # noqa: A002 -- the option's name
) -> None:
    """Find out what is wrong, and say how to fix it."""
    from pullthrough.doctor import rules

    with refusals():
        if client:
            from pullthrough.doctor.client_scripts import examine

            findings = examine(settings_in_force(dir))
        else:
            found = rules.of_server(_server_facts(dir))
            findings = [replace(finding, mend=as_called_here(finding.mend)) for finding in found]
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print_lines([f"{finding.what}: {finding.why}", f"    {finding.mend}"])
        if not findings:
            print_lines(["nothing is wrong"])
    raise typer.Exit(int(any(finding.grave for finding in findings)))


def _running_proxy(given: Path | None) -> Endpoint | None:
    """Return where the proxy of the cache that runs on the store listens; None if none runs."""
    try:
        return Endpoint("http", **ask(folder_of(given), "proxy", {}))
    except NoDaemon:
        return None


def _server_facts(given: Path | None) -> "ServerFacts":
    """Return the facts, from the daemon if one runs: it knows its parent proxies and trusted CAs."""
    import asyncio

    from pullthrough.doctor.probe_server import Outlook, look_out, server_facts
    from pullthrough.net.proxy_env import ParentProxies
    from pullthrough.runtime.platform import own_addresses
    from pullthrough.upstream.client import Upstream

    settings, proxy, running = settings_in_force(given), _running_proxy(given) or _USUAL, True

    async def look() -> Outlook:
        upstream = Upstream(settings, own_addresses=own_addresses, parents=ParentProxies.parse(os.environ))
        await upstream.open()
        try:
            return await look_out(upstream, settings, datetime.now(UTC))
        finally:
            await upstream.close()

    try:
        outlook = Outlook(**ask(folder_of(given), "look-out", {}))
    except NoDaemon:
        running, outlook = sys.platform == "win32", asyncio.run(look())
    return server_facts(settings, proxy, outlook, running=running, now=datetime.now(UTC))


def _is_reachable(address: str) -> bool:
    """Return whether another machine may know us by it."""
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback and not parsed.is_link_local
