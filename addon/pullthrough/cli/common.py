"""What the commands share: their common arguments, the options in force, and how they fail.

Invariant: a command that fails says why in one line on standard error and exits 1 (130 after Ctrl-C). Nothing heavy is
imported here: most commands take less time than loading it would.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pullthrough.admin.client import ask
from pullthrough.config import paths
from pullthrough.config.options import parse_settings
from pullthrough.config.settings import ENVIRONMENT, Settings
from pullthrough.config.sources import Choices, choices
from pullthrough.core.errors import CacheError, ControlError, NoDaemon
from pullthrough.core.humanize import columns, fitted
from pullthrough.runtime.whereabouts import Running, running_caches

Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir", envvar="OLLAMA_CACHE_DIR", help="The store; as the option ollama_cache_dir.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts.", show_default=False)]


def folder_of(given: Path | None) -> Path:
    """Return the store that a command is about: the chosen one, else that of the running cache, else our own.

    Exits with one line if the options in force cannot be parsed, or it is not clear which cache is meant.
    """
    if given is not None:
        return given.expanduser()
    with refusals():
        chosen = own_choices(None)
        settings = chosen.settings()
        if "dir" in chosen.texts:
            return settings.dir
        return _running_store(running_caches(settings.runtime_dir), settings.dir)


def _running_store(running: Sequence[Running], own: Path) -> Path:
    """Return the store of the only cache that can be meant; `own` if none runs, or one runs on it."""
    ours = [cache for cache in running if cache.is_ours]
    if not running or any(cache.store == str(own) for cache in ours):
        return own
    # Anybody may leave a note in a shared folder: only notes of our own user are followed.
    found = ours or [cache for cache in running if cache.is_vouched_for] or running
    if len(found) > 1:
        raise ControlError(
            f"several caches run here: {'; '.join(map(str, found))}; say with --dir which store is meant"
        )
    (cache,) = found
    if not cache.is_ours and sys.platform != "win32":
        if os.geteuid() != 0:
            raise ControlError(
                f"the cache that runs here is not this user's ({cache}): run this as "
                f"{' or '.join(dict.fromkeys((cache.user, 'root')))}"
            )
        if not cache.is_vouched_for:
            raise ControlError(
                f"the cache that runs here is not this user's ({cache}): if it is meant, say so with --dir"
            )
        _say_once(f"about the cache that runs here: {cache}")
    return Path(cache.store)


@functools.cache
def _say_once(text: str) -> None:
    """Say it on standard error, once per run."""
    typer.echo(f"ollama-cache: {text}", err=True)


def own_choices(given: Path | None, *, certs: Path | None = None) -> Choices:
    """Return the options that a cache started from here would have.

    Raises:
        SettingsError: a name is no option, or the configuration file cannot be used.
    """
    said = {name: str(folder) for name, folder in (("dir", given), ("certs", certs)) if folder is not None}
    if "dir" in said and said["dir"] == os.environ.get(f"{ENVIRONMENT}DIR"):
        del said["dir"]  # typer takes the option from there
    return choices(said, os.environ)


def own_settings(given: Path | None = None, *, certs: Path | None = None) -> Settings:
    """Return the same options as values.

    Raises:
        SettingsError: as for `own_choices`, or a value does not parse.
    """
    return own_choices(given, certs=certs).settings()


def settings_in_force(given: Path | None) -> Settings:
    """Return the settings of the daemon that runs on the store; if none does, those of a daemon started from here."""
    try:
        rows = ask(folder_of(given), "config", {})
    except NoDaemon:
        return own_settings(given)
    return _settings({row["name"]: row["value"] for row in rows})


def _settings(texts: dict[str, str]) -> Settings:
    return parse_settings(texts, dir=paths.default_store(), certs=paths.default_certs())


def terminal_width() -> int | None:
    """Return how many columns the terminal has; None where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table_lines(rows: Sequence[Sequence[str]], *, elastic: int, spare: Sequence[int] = ()) -> list[str]:
    """Return a table as lines that fit the terminal, as `fitted` makes them; in full if there is none."""
    width = terminal_width()
    return columns(rows) if width is None else fitted(rows, width, elastic=elastic, spare=spare)


def print_lines(lines: Sequence[str]) -> None:
    typer.echo("\n".join(lines))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@contextlib.contextmanager
def refusals(hint: str = "") -> Iterator[None]:
    """Turn errors and Ctrl-C into one line on standard error, followed by `hint`."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"ollama-cache: interrupted{hint}", err=True)
        raise typer.Exit(130) from None
    except CacheError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)


def fail(error: object, *, code: int = 1) -> NoReturn:
    """Exit with this message; `code` is 2 where the verb was called wrongly."""
    typer.echo(f"ollama-cache: {paths.as_called_here(str(error))}", err=True)
    raise typer.Exit(code)
