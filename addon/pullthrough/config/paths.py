"""The default places of files on this machine, including this installation's own program."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

import platformdirs

CONFIG_NAME: Final = "config.toml"
VERBS: Final = (
    *(
        "run",
        "connect",
        "doctor",
        "config",
        "ca",
        "service",
        "ls",
        "ps",
        "show",
        "stats",
        "rm",
        "prune",
        "pin",
        "unpin",
    ),
    *("unpin", "warm", "verify", "import", "export", "refresh", "tier"),
)
_COMMAND: Final = re.compile(rf"(?<![\w./-])ollama-cache (?=(?:{'|'.join(VERBS)})\b)")


def default_store() -> Path:
    """Return a data folder, because cleaners empty cache folders."""
    return Path(platformdirs.user_data_dir("ollama-cache", appauthor=False))


def default_index() -> Path:
    """Return the folder for the indexes of stores on network shares: a state folder, as they can be rebuilt."""
    return Path(platformdirs.user_state_dir("ollama-cache", appauthor=False))


def default_certs() -> Path:
    """Return a checkout's `certs/`, unless empty and read-only; else a folder beside the user's configuration."""
    checkout = Path(__file__).resolve().parents[3]
    folder = checkout / "certs"
    if (checkout / "pyproject.toml").is_file() and folder.is_dir() and (_has_key(folder) or os.access(folder, os.W_OK)):
        return folder
    return _user_config() / "certs"


def default_configs() -> tuple[Path, ...]:
    """Return the usual places of the configuration file: the user's, then the system's."""
    if sys.platform == "win32":
        system = Path(platformdirs.site_config_dir("ollama-cache", appauthor=False))
    else:
        system = Path("/etc/ollama-cache")
    return _user_config() / CONFIG_NAME, system / CONFIG_NAME


def config_beside(store: Path) -> Path:
    """Return where the configuration file of an explicitly chosen store may be."""
    return store.parent / CONFIG_NAME


def own_program() -> str:
    """Return the command that calls this installation's command line from the current folder."""
    beside = Path(sys.executable).with_name("ollama-cache.exe" if sys.platform == "win32" else "ollama-cache")
    found = shutil.which("ollama-cache")
    if not beside.exists() or (found is not None and Path(found).resolve() == beside.resolve()):
        return "ollama-cache"
    here = Path.cwd()
    # In the root folder, or in the program's own, the shorter form would name something else.
    is_short = beside.is_relative_to(here) and here not in (Path(here.anchor), beside.parent)
    return str(beside.relative_to(here)) if is_short else str(beside)


def as_called_here(text: str) -> str:
    """Return a message with its commands as they can be called from here: `ollama-cache` may not be on PATH."""
    return _COMMAND.sub(lambda found: f"{shlex.quote(own_program())} ", text)


def _has_key(folder: Path) -> bool:
    return any(folder.glob("*.pem"))


def _user_config() -> Path:
    return Path(platformdirs.user_config_dir("ollama-cache", appauthor=False))
