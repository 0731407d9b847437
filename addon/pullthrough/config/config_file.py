"""The configuration file: TOML with the names of the options as its keys.

Invariant: a key that is no option, or a value that no option can have, raises an error that names the line and quotes
nothing of the value, which may be a secret in the wrong place. For a value that has the right type but does not suit
its option, `options.shown` decides what may be quoted.
"""

import json
import re
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pullthrough.config.near_misses import hint
from pullthrough.config.options import GROUPS, OPTIONS, REMOVED, shown
from pullthrough.config.settings import PREFIX
from pullthrough.core.errors import SettingsError

_QUOTED: Final = re.compile(r"""(['"]).*\1""")
_HEAD: Final = """\
# What ollama-cache does, unless the command line (--set ollama_cache_NAME=VALUE) or the environment
# (OLLAMA_CACHE_NAME) says otherwise. A line counts once its # is removed; the values here are the defaults.
"""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The option texts of a file, by name, and the line of each."""

    path: Path
    texts: Mapping[str, str]
    lines: Mapping[str, int]

    def source(self, name: str) -> str:
        """Return where the text of an option is, for people."""
        return f"{self.path}, line {self.lines[name]}"


def parse_config(path: Path, text: str) -> ConfigFile:
    """Parse the file's text.

    Raises:
        SettingsError: the text is not TOML, a key is not an option, or a value cannot be an option's.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # The parser's message quotes keys and characters.
        mistake = _QUOTED.sub("...", str(error))
        raise SettingsError(f"{path}: expected TOML, got a mistake: {mistake}") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{path}: expected TOML, got a number of too many digits, or lists too deep") from None
    known = {option.name for option in OPTIONS} - {"config"}
    texts, lines = {}, {}
    for key, value in table.items():
        lines[key] = _line_of(key, text)
        place = f"{path}, line {lines[key]}"
        if key in REMOVED:
            raise SettingsError(f"{place}: option {key} was removed: {REMOVED[key]}")
        if key not in known:
            otherwise = f"expected one of {', '.join(sorted(known))}"
            mend = hint(key.removeprefix(PREFIX), known, spelt=str, otherwise=otherwise)
            name = shown(key) if key.isprintable() else ascii(key)
            raise SettingsError(f"{place}: unknown option {name}; {mend}")
        try:
            texts[key] = _text_of(value)
        except ValueError as error:
            raise SettingsError(f"{place}: option {key}: expected {error}, got a {type(value).__name__}") from None
    return ConfigFile(path, texts, lines)


def template(defaults: Mapping[str, str]) -> str:
    """Return a file that changes nothing: every option with its meaning and default, as comments.

    `defaults` has the defaults that depend on the machine.
    """
    parts = [_HEAD]
    for group, options in GROUPS.items():
        parts.append(f"\n# --- {group}\n")
        for option in options:
            if option.name != "config":
                default = defaults.get(option.name, option.default)
                parts.append(f"\n{_comment(option.help)}\n# {option.name} = {_literal(default)}\n")
    return "".join(parts)


def _text_of(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str() | int() | float():
            return str(value)
        case list():
            return ",".join(_text_of(item) for item in value)
    raise ValueError("a text, a number, true, false, or a list of these")


def _line_of(key: str, text: str) -> int:
    """Return the line of a key, which the TOML parser does not give."""
    found = re.search(rf"""^[ \t]*\[*[ \t]*["']?{re.escape(key)}["']?[ \t]*[=.\]]""", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _literal(text: str) -> str:
    return text if text in ("true", "false") or text.isdecimal() else json.dumps(text, ensure_ascii=False)
