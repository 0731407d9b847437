"""The command line: `ollama-cache run` and `ollama-cache ca`, and the verbs of the other `cli_` modules.

Invariant: a verb either does what it says and exits 0, or says on standard error what was expected and what was got
and exits 1 (2 when it was called wrongly). Knows mitmdump only as a program to start.
"""

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import pullthrough
from pullthrough import cli_models, cli_setup, cli_transfer
from pullthrough.cli_base import fail, own_settings, print_lines, refusals

app = typer.Typer(
    help="A pull-through cache for the Ollama registry.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(cli_models.app)
app.add_typer(cli_setup.app)
app.add_typer(cli_transfer.app)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(context: typer.Context) -> None:
    """Run the cache: mitmdump with the addon. Everything behind `run` goes to mitmdump."""
    beside = Path(sys.executable).with_name("mitmdump.exe" if sys.platform == "win32" else "mitmdump")
    program = str(beside) if beside.exists() else shutil.which("mitmdump")
    if program is None:
        fail("expected mitmdump beside this Python or on PATH, got neither; install mitmproxy>=12.2,<13")
    script = Path(pullthrough.__file__).resolve().parent.with_name("ollama_cache.py")
    os.execv(program, [program, "-s", str(script), *context.args])  # noqa: S606 -- no shell


@app.command()
def ca(
    certs: Annotated[
        Path | None, typer.Option(help="The folder of the CA; as the option ollama_cache_certs.", show_default=False)
    ] = None,
) -> None:
    """Make the certificate authority if there is none, and show what clients have to trust."""
    from pullthrough.ca import Authority  # cryptography takes longer to load than most verbs to run

    with refusals():
        settings = own_settings(certs=certs)
        authority = Authority.load_or_create(settings.certs, settings.intercepted, now=datetime.now(UTC))
    print_lines(
        [
            f"certificate (PEM)    {authority.certificate_file}",
            f"certificate (DER)    {authority.certificate_file.with_suffix('.cer')}",
            f"SHA-256 fingerprint  {authority.fingerprint}",
            f"signs only           {', '.join(authority.permitted)} (and names below them)",
            f"valid until          {authority.not_after:%Y-%m-%d}",
        ]
    )


def main() -> None:
    """The console script."""
    app()
