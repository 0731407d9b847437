"""The commands about the certificate authority.

Invariant: an authority that clients may trust is never replaced unasked, and no key is shown.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullthrough.cli.common import (
    AsJson,
    fail,
    own_choices,
    own_settings,
    print_json,
    print_lines,
    refusals,
    settings_in_force,
)
from pullthrough.cli.help_text import Verbs
from pullthrough.config.paths import as_called_here
from pullthrough.config.settings import ENVIRONMENT, Settings

if TYPE_CHECKING:
    from pullthrough.pki.authority import Authority

app = Verbs()

Certs = Annotated[
    Path | None, typer.Option(help="The folder of the CA; as the option ollama_cache_certs.", show_default=False)
]


@app.callback(invoke_without_command=True)
def ca(context: typer.Context, certs: Certs = None, json: AsJson = False) -> None:
    """Make the certificate authority if there is none, and show what clients have to trust."""
    if context.invoked_subcommand:
        return
    from pullthrough.pki.rollover import Rollover  # cryptography takes longer to load than most commands take to run

    with refusals():
        settings = _settings(certs)
        rollover = Rollover.load_or_create(settings.certs, settings.intercepted, now=datetime.now(UTC))
    _show(rollover.all, json=json)


@app.command()
def show(certs: Certs = None, json: AsJson = False) -> None:
    """Show the authority in use, the next one, and former ones; makes nothing."""
    from pullthrough.pki.authority import has_authority
    from pullthrough.pki.rollover import Rollover, former

    now = datetime.now(UTC)
    with refusals():
        folder = _settings(certs).certs
        if not has_authority(folder):
            fail(f"no authority in {folder}: the cache makes one when it starts first, and `ollama-cache ca` now")
        rollover = Rollover.load(folder, (), now=now)
        earlier = former(folder, now=now)
    if json:
        return _show((*rollover.all, *earlier), json=True)
    titles = ["in use", "the next one", *["a former one, which signs nothing"] * len(earlier)]
    for index, (title, authority) in enumerate(zip(titles, (*rollover.all, *earlier), strict=False)):
        print_lines([*([""] if index else []), f"{title}:"])
        _show([authority])
    return None


@app.command()
def renew(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Stop unless these names are configured.", show_default=False),
    ] = None,
    switch: Annotated[bool, typer.Option("--switch", help="Sign with the next one alone.", show_default=False)] = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace a next authority even if clients trust it.", show_default=False),
    ] = False,
    certs: Certs = None,
    json: AsJson = False,
) -> None:
    """Make the next authority beside the one in use, for all names that are configured."""
    from pullthrough.pki import rollover

    now = datetime.now(UTC)
    with refusals():
        folder = _settings(certs).certs
        if switch:
            _show([rollover.switch(folder, now=now)], json=json)
            typer.echo("Restart the cache. Clients that trust only the former CA can no longer pull.", err=True)
            return
        configured = _names()
        if strangers := [name for name in names or () if name.lower() not in configured]:
            wanted = ",".join([*configured[:-1], *strangers])
            fail(
                f"{', '.join(strangers)} is not configured here, but {', '.join(configured)} is (what is given to the "
                "cache by --set is not known here): set registries in the configuration file, or "
                f"{ENVIRONMENT}REGISTRIES={wanted} for this command and for the cache"
            )
        _show([rollover.renew(folder, configured, now=now, replace=replace)], json=json)
        again = as_called_here("ollama-cache ca renew --switch")
        typer.echo(f"Restart the cache, set each client up again, and then: {again}", err=True)


def _names() -> tuple[str, ...]:
    """Return the names that the authority is for: as configured here, else those of the running cache."""
    own = own_choices(None)
    if own.texts.keys() & {"registries", "blob_host"}:
        return own.settings().intercepted
    return settings_in_force(None).intercepted


def _settings(certs: Path | None) -> Settings:
    """Return the settings that say where the authority is: as chosen here, else those of the running cache."""
    if certs is not None or "certs" in own_choices(None).texts:
        return own_settings(certs=certs)
    return settings_in_force(None)


def _show(authorities: "Sequence[Authority]", *, json: bool = False) -> None:
    """Show what clients have to trust, which is no secret."""
    if json:
        return print_json(
            [
                {
                    "certificate": str(authority.certificate_file),
                    "der": str(authority.certificate_file.with_suffix(".cer")),
                    "sha256": authority.fingerprint,
                    "names": list(authority.permitted),
                    "not_after": int(authority.not_after.timestamp()),
                }
                for authority in authorities
            ]
        )
    for authority in authorities:
        print_lines(
            [
                f"certificate (PEM)    {authority.certificate_file}",
                f"certificate (DER)    {authority.certificate_file.with_suffix('.cer')}",
                f"SHA-256 fingerprint  {authority.fingerprint}",
                f"signs only           {', '.join(authority.permitted)} (and names below them)",
                f"valid until          {authority.not_after:%Y-%m-%d}",
            ]
        )
    return None
