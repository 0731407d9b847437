"""The commands that install the cache as a service of this machine, and remove it.

Invariant: one script does the work, scripts/services/install, which a checkout may call directly.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import typer

import pullthrough
from pullthrough.cli.common import AsJson, fail, print_json
from pullthrough.cli.help_text import Verbs

app = Verbs(help="Run the cache as a service of this machine: systemd, or launchd on macOS.", no_args_is_help=True)

_PACKAGE: Final = Path(pullthrough.__file__).resolve().parent
SCRIPTS: Final = (_PACKAGE / "services/install", _PACKAGE.parents[1] / "scripts/services/install")
"""The script's path in a wheel, and in a checkout."""


@app.command()
def install(json: AsJson = False) -> None:
    """Install the service, or bring it up to date; needs root, and starts it."""
    beside = Path(sys.executable).with_name("ollama-cache")
    program = str(beside) if beside.exists() else shutil.which("ollama-cache")
    if program is None:
        fail(f"{beside} does not exist, and ollama-cache is not on PATH: install the package with pip")
    _run(program, json=json)


@app.command()
def uninstall(json: AsJson = False) -> None:
    """Stop and remove the service and its settings; needs root. The store and the authority stay."""
    _run("--undo", json=json)


def _run(argument: str, *, json: bool) -> None:
    """Run the script; its messages go to standard error, like ours."""
    shell = shutil.which("sh")
    if sys.platform == "win32" or shell is None:
        fail("on Windows there is neither systemd nor launchd: start the cache by hand, or with the Task Scheduler")
    script = next((path for path in SCRIPTS if path.exists()), None)
    if script is None:
        fail(f"the script {SCRIPTS[0]} is missing: this package is incomplete")
    done = subprocess.run([shell, script, argument], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise typer.Exit(done.returncode)
    paths = done.stdout.splitlines()
    if json:
        print_json({"removed" if argument == "--undo" else "installed": paths})
