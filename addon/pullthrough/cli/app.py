"""The command line: `ollama-cache run`, and the commands of the other modules here.

Invariant: a command either does what it says and exits 0, or says on standard error why not and exits 1 (2 for wrong
usage).
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

import pullthrough
from pullthrough.cli import ca, models, options, service, setup, transfer
from pullthrough.cli.common import fail, print_lines
from pullthrough.cli.help_text import SETTING_UP, Verbs, help_width
from pullthrough.config.options import check_flags
from pullthrough.core.errors import SettingsError

app = Verbs(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(models.app)
app.add_typer(options.app)
app.add_typer(transfer.app)
app.add_typer(setup.app)
app.add_typer(ca.app, name="ca", rich_help_panel=SETTING_UP)
app.add_typer(service.app, name="service", rich_help_panel=SETTING_UP)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ollama-cache {version('ollama-cache')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A pull-through cache for the Ollama registry."""


@app.command(
    rich_help_panel=SETTING_UP,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def run(
    context: typer.Context,
    help: Annotated[bool, typer.Option("--help", help="The options of the cache.", show_default=False)] = False,  # noqa: A002
    help_mitmdump: Annotated[
        bool, typer.Option("--help-mitmdump", help="The options of mitmdump.", show_default=False)
    ] = False,
) -> None:
    """Run the cache: mitmdump with the addon. Everything else behind `run` goes to mitmdump."""
    if help or "-h" in context.args:
        print_lines(options.run_help(help_width()))
        return
    try:
        check_flags(context.args)
    except SettingsError as error:
        fail(error, code=2)
    beside = Path(sys.executable).with_name("mitmdump.exe" if sys.platform == "win32" else "mitmdump")
    program = str(beside) if beside.exists() else shutil.which("mitmdump")
    if program is None:
        fail("expected mitmdump beside this Python or on PATH, got neither; install mitmproxy>=12.2.3,<13")
    if help_mitmdump:
        subprocess.run([program, "--help"], check=False)  # noqa: S603 -- the same program; it ends with 1
        return
    script = Path(pullthrough.__file__).resolve().parent.with_name("ollama_cache.py")
    if "--version" in context.args:
        typer.echo(f"ollama-cache {version('ollama-cache')}, by the addon {script}, in:")
        sys.stdout.flush()  # mitmdump goes on in this process
    os.execv(program, [program, "-s", str(script), *context.args])  # noqa: S606 -- no shell


def main() -> None:
    """The console script."""
    app()
