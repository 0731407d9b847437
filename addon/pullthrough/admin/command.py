"""The commands of the control socket: their three kinds, and their arguments.

Invariant: an argument that is missing or of the wrong type is an InvalidRequest, before a command has begun.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pullthrough.core.errors import InvalidRequest

Tell = Callable[[Mapping[str, Any]], Awaitable[None]]
"""Send a progress object to the caller."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The members of a request's JSON object, or the fields of its query."""

    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a string. Raises InvalidRequest."""
        value: str = self._take(name, "a string", str)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of strings. Raises InvalidRequest."""
        values = self._take(name, "a list of strings", list)
        if not all(isinstance(value, str) for value in values):
            raise InvalidRequest(f"argument {name}: expected a list of strings, got {values!r}")
        return list(values)

    def flag(self, name: str) -> bool:
        """Return a Boolean, false by default. Raises InvalidRequest."""
        return bool(self._take(name, "true or false", bool, default=False))

    def seconds(self, name: str) -> float:
        """Return a duration, zero or more. Raises InvalidRequest."""
        value = float(self._take(name, "seconds", int, float))
        if not math.isfinite(value) or value < 0:
            raise InvalidRequest(f"argument {name}: expected seconds, got {value}")
        return value

    def objects(self, name: str) -> list[Mapping[str, Any]]:
        """Return a list of objects. Raises InvalidRequest."""
        values = self._take(name, "a list of objects", list)
        if not all(isinstance(value, dict) for value in values):
            raise InvalidRequest(f"argument {name}: expected a list of objects")
        return list(values)

    def sizes(self, name: str) -> dict[str, int]:
        """Return an object whose values are sizes in bytes. Raises InvalidRequest."""
        values = self._take(name, "an object of sizes", dict)
        if not all(type(value) is int and value >= 0 for value in values.values()):
            raise InvalidRequest(f"argument {name}: expected an object of sizes in bytes")
        return dict(values)

    def _take(self, name: str, what: str, *types: type, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise InvalidRequest(f"argument {name}: expected {what}, got none")
        if type(value) not in types:  # True is no number here
            raise InvalidRequest(f"argument {name}: expected {what}, got {value!r}")
        return value


@dataclass(frozen=True, slots=True)
class Look:
    """A command that changes nothing."""

    run: Callable[[Arguments], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """A command that changes something, and is quick."""

    run: Callable[[Arguments], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """A command that takes long, and reports its progress."""

    run: Callable[[Arguments, Tell], Awaitable[Any]]


Command = Look | Change | Job
"""`run` returns JSON; a CacheError is sent to the caller."""
