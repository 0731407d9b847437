"""The verbs of the command line that are about clients and trust: what sets up a client.

Invariant: standard output is what is to be run or applied elsewhere, and nothing else; what is to be known besides is
on standard error. Reads the options of the cache that runs, else those of the environment.
"""

import ipaddress
import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final

import typer

from pullthrough.cli_base import Folder, fail, refusals, settings_in_force
from pullthrough.platform import own_addresses
from pullthrough.settings import Endpoint

app = typer.Typer()

_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?")


class Kind(StrEnum):
    """What a client may be."""

    LINUX = "linux"
    MACOS = "macos"
    WINDOWS = "windows"
    COMPOSE = "compose"
    KUBERNETES = "kubernetes"


@app.command()
def connect(
    kind: Annotated[Kind, typer.Option("--for", help="What the client is.")] = Kind.LINUX,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Where clients find the proxy, if not at port 8080 of this machine.",
            show_default=False,
        ),
    ] = "",
    dir: Folder = None,  # noqa: A002 -- the option's name
) -> None:
    """Print the command that sets up a client, to be run there."""
    # Cryptography takes longer to load than most verbs to run.
    from pullthrough.ca import Authority
    from pullthrough.clientsetup import DEFAULT_PORT, SYSTEMS, clients_host, command, documents

    given = _ADDRESS.fullmatch(address)
    if address and given is None:
        raise typer.BadParameter(f"expected a host or host:port, got {address!r}")
    with refusals():
        settings = settings_in_force(dir)
        authority = Authority.load_or_create(settings.certs, settings.intercepted, now=datetime.now(UTC))
    host = (given["v6"] or given["host"]) if given else clients_host(settings)
    proxy = Endpoint("http", host, int(given["port"] or DEFAULT_PORT) if given else DEFAULT_PORT)
    made = documents([authority.certificate], authority.permitted, proxy.origin)
    if kind not in SYSTEMS:
        typer.echo(made[f"/connect/{kind}.yaml"].body.decode(), nl=False)
        return
    if not settings.listen:
        fail("expected a port to fetch the script from, got ollama_cache_listen=off; the README has the way by hand")
    server = Endpoint("http", host, settings.listen[0][1])
    typer.echo("To be run on the client; the script's --undo (on Windows -Undo) takes it back:", err=True)
    typer.echo(command(kind, made[f"/connect/{SYSTEMS[kind]}"], server=server.origin, proxy=proxy.origin))
    if not given and (others := sorted(filter(_is_reachable, own_addresses() - {host}))):
        typer.echo(f"For --address, this machine also has {', '.join(others)}", err=True)


def _is_reachable(address: str) -> bool:
    """Whether another machine may know us by it."""
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback and not parsed.is_link_local
