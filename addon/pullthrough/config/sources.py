"""The options in force: the command line overrides the environment, that the configuration file, that the defaults.

Invariant: every source is held to the same names and grammar, and each option knows its source.
"""

import os
import shlex
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pullthrough.config import paths
from pullthrough.config.config_file import ConfigFile, parse_config
from pullthrough.config.options import OPTIONS, environment_texts, parse_settings, shown
from pullthrough.config.parsers import parse_folder
from pullthrough.config.settings import Settings
from pullthrough.core.errors import SettingsError

DEFAULT: Final = "default"
"""The source of an option that nobody chose."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The chosen options and their sources."""

    texts: Mapping[str, str]
    sources: Mapping[str, str]

    def settings(self) -> Settings:
        """Return the options as values.

        Raises:
            SettingsError: an option cannot be understood.
        """
        made = parse_settings(self.texts, dir=paths.default_store(), certs=paths.default_certs(), sources=self.sources)
        # Whoever reads a path in a message or a note may be in another folder.
        return replace(made, dir=made.dir.absolute(), certs=made.certs.absolute())

    def rows(self) -> list[dict[str, str]]:
        """Return {name, value, source} of each option; machine-dependent defaults have this machine's values.

        Raises:
            SettingsError: an option cannot be understood, and might be a secret in the wrong place.
        """
        settings = self.settings()
        own = {"dir": str(settings.dir), "certs": str(settings.certs)}
        rows = []
        for option in OPTIONS:
            text = self.texts.get(option.name, "")
            # An empty text stands for the default, so nobody chose it.
            is_chosen = bool(text) or (option.may_be_empty and option.name in self.texts)
            value = own.get(option.name) or (text if is_chosen else option.default)
            source = self.sources.get(option.name, DEFAULT) if is_chosen else DEFAULT
            rows.append({"name": option.name, "value": value, "source": source})
        return rows


def choices(command_line: Mapping[str, str], environ: Mapping[str, str]) -> Choices:
    """Return what the command line, the environment and the configuration file choose.

    Raises:
        SettingsError: a name is no option, or the file cannot be used.
    """
    environment = environment_texts(environ)
    file = config_file(command_line, environment)
    texts, sources = (dict(file.texts), {name: file.source(name) for name in file.texts}) if file else ({}, {})
    for source, given in (("environment", environment), ("command line", command_line)):
        texts |= given
        sources |= dict.fromkeys(given, source)
    if file is not None:
        texts["config"], sources["config"] = str(file.path), sources.get("config", "found there")
    return Choices(texts, sources)


def config_file(command_line: Mapping[str, str], environment: Mapping[str, str]) -> ConfigFile | None:
    """Return the file in force: the named one, else the first that exists in the usual places.

    Raises:
        SettingsError: the file cannot be read, or does not hold options.
    """
    given = {**environment, **command_line}
    if named := given.get("config"):
        return _read(_expanded(named))
    for path in config_places(given.get("dir", "")):
        if path.exists():
            return _read(path, owned=True)
    return None


def config_places(store: str) -> tuple[Path, ...]:
    """Return where the file may be: beside the store, if one was chosen, then the user's and the system's place."""
    beside = (paths.config_beside(_expanded(store)),) if store else ()
    return (*beside, *paths.default_configs())


def new_config_file(named: str, store: str) -> Path:
    """Return where a new file goes: as named, else beside a chosen store, else in the user's place."""
    return _expanded(named) if named else config_places(store)[0]


def _expanded(text: str) -> Path:
    """Return the path with the home folder in place of `~`. Raises SettingsError."""
    try:
        return parse_folder(text)
    except ValueError as error:
        raise SettingsError(f"expected {error}, got {shown(text)!r}") from None


def _read(path: Path, *, owned: bool = False) -> ConfigFile:
    try:
        # A FIFO in a usual place would block the start.
        flags = os.O_RDONLY | (getattr(os, "O_NONBLOCK", 0) if owned else 0)
        with open(path, encoding="utf-8", opener=lambda name, _: os.open(name, flags)) as file:
            if owned:
                _check_owner(path, os.fstat(file.fileno()))
            return parse_config(path, file.read())
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: expected TOML in UTF-8, got something else at byte {error.start}") from None
    except OSError as error:
        raise SettingsError(f"{path}: expected a configuration file, got: {error.strerror}") from None


def _check_owner(path: Path, state: os.stat_result) -> None:
    """Refuse a file that somebody else could have put there: a store may be in a shared folder."""
    if sys.platform == "win32":
        return
    if not stat.S_ISREG(state.st_mode):
        raise SettingsError(f"{path}: expected a configuration file, got something that is no file; move it away")
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        raise SettingsError(f"{path}: expected a file of this user or root, got another user's link")
    if state.st_uid not in (0, os.geteuid()):
        raise SettingsError(
            f"{path}: expected a file of this user or root, got one of user {state.st_uid}; if it is to count, "
            f"name it: OLLAMA_CACHE_CONFIG={shlex.quote(str(path))}"
        )
    if state.st_mode & stat.S_IWOTH:
        mend = f"chmod o-w {shlex.quote(str(path))}"
        raise SettingsError(f"{path}: expected a file that only its owner can write; run `{mend}`")
