"""Who may get what: the status of every request, by model, caller, state of the cache and of the line.

The statuses are what the design promises, not what the code does. Bytes may flow in the cells below 400, and in no
other. tests/e2e/test_security.py walks all cells, and what has become of them is printed after a test run.
`python -m tests.documents` writes its short form into docs/who-gets-what.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

CALLERS: Final = ("anonymous", "right", "wrong", "expired")
"""`expired` is a credential that the registry has accepted before, and does not any more."""

STATES: Final = ("cold", "recent", "held")
"""Nothing here; pulled within the last minute by all whom the registry then accepted; pulled before a restart."""

LINES: Final = ("online", "offline")

MODELS: Final = {
    "public": "of a public repository",
    "private": "of a private repository",
    "turned": "of a repository that was public when it was pulled; an anonymous request has been refused since",
    "shared": "of a private repository, its layer also in a public one",
    "unknown": "of no repository",
}

MANIFEST: Final = ("GET manifest", "HEAD manifest", "GET manifest by digest", "GET list", "HEAD list")
AS_BLOB: Final = ("GET manifest as a blob",)
HEAD: Final = ("HEAD blob", "HEAD blob as a push", "HEAD child", "HEAD child's layer")
GET: Final = ("GET blob", "GET child", "GET child's layer")
"""A child is a manifest that a list refers to, and a blob."""
NEW_GET: Final = ("GET blob by a new client",)
"""One that may fetch past this proxy, and is sent to the registry's own address."""
CHUNKSUMS: Final = ("GET chunksums",)
LISTED: Final = (
    "GET blob of a stranger who lists it",
    "GET child of a stranger who lists it",
    "GET child's layer of a stranger who lists the child",
)
CAPABLE: Final = ("canonical, valid capability",)
INCAPABLE: Final = ("canonical, another blob's capability", "canonical, expired capability")
BARE: Final = ("canonical, no capability",)
REQUESTS: Final = (*MANIFEST, *AS_BLOB, *HEAD, *GET, *NEW_GET, *CHUNKSUMS, *LISTED, *CAPABLE, *INCAPABLE, *BARE)


@dataclass(frozen=True)
class Cell:
    """One request."""

    model: str
    request: str
    state: str
    line: str
    caller: str


@dataclass(frozen=True)
class Row:
    """The statuses for the four callers, for every combination of what is named."""

    models: tuple[str, ...]
    requests: tuple[str, ...]
    states: tuple[str, ...]
    lines: tuple[str, ...]
    statuses: tuple[int, int, int, int]

    def cells(self) -> Iterator[tuple[Cell, int]]:
        for model, request, state, line in product(self.models, self.requests, self.states, self.lines):
            for caller, status in zip(CALLERS, self.statuses, strict=True):
                yield Cell(model, request, state, line, caller), status


ON, OFF = LINES[:1], LINES[1:]
COLD, RECENT, HELD = STATES[:1], STATES[1:2], STATES[2:]
HERE: Final = RECENT + HELD
PUBLIC, UNKNOWN = ("public",), ("unknown",)
PRIVATE: Final = ("private", "turned", "shared")
KNOWN: Final = PUBLIC + PRIVATE
EVERY: Final = (*KNOWN, *UNKNOWN)


def _all(status: int) -> tuple[int, int, int, int]:
    return status, status, status, status


ROWS: Final = (
    # Public: everybody, whatever credential comes along; and from the store while the registry is away.
    Row(PUBLIC, MANIFEST + HEAD + CHUNKSUMS, STATES, ON, _all(200)),
    Row(PUBLIC, MANIFEST + HEAD + CHUNKSUMS, HERE, OFF, _all(200)),
    Row(PUBLIC, GET + NEW_GET, STATES, ON, _all(307)),
    Row(PUBLIC, GET + NEW_GET, HERE, OFF, _all(307)),
    Row(PUBLIC, AS_BLOB, COLD, ON, _all(307)),
    Row(PUBLIC, AS_BLOB, HERE, LINES, _all(200)),
    # A listing is no proof, but what is public is not hidden from who lists it.
    Row(PUBLIC, LISTED, COLD, ON, _all(404)),
    Row(PUBLIC, LISTED, HERE, LINES, _all(307)),
    # Private: the registry is asked about every caller each time; its yes to a GET counts for a minute.
    Row(PRIVATE, MANIFEST + HEAD + CHUNKSUMS, STATES, ON, (401, 200, 401, 401)),
    Row(PRIVATE, GET + NEW_GET + AS_BLOB, COLD + HELD, ON, (401, 307, 401, 401)),
    Row(PRIVATE, GET + AS_BLOB, RECENT, ON, (401, 307, 401, 307)),
    # Each address of a private blob is obtained anew.
    Row(PRIVATE, NEW_GET, RECENT, ON, (401, 307, 401, 401)),
    # Without the registry there is nobody to ask: that minute is all.
    Row(PRIVATE, MANIFEST, HERE, OFF, _all(504)),
    Row(PRIVATE, HEAD + GET + NEW_GET + AS_BLOB + CHUNKSUMS, HELD, OFF, _all(502)),
    Row(PRIVATE, HEAD + CHUNKSUMS, RECENT, OFF, (502, 200, 502, 200)),
    Row(PRIVATE, GET + NEW_GET + AS_BLOB, RECENT, OFF, (502, 307, 502, 307)),
    # A stranger's manifest that lists a private blob opens nothing, to nobody; a repository that has it does.
    Row(("private", "turned"), LISTED, STATES, ON, _all(404)),
    Row(("private", "turned"), LISTED, HERE, OFF, _all(502)),
    Row(("shared",), LISTED, STATES, ON, _all(307)),
    Row(("shared",), LISTED, HERE, OFF, _all(307)),
    # A capability is a bearer right to one blob, for a day, whatever becomes of the repository.
    Row(KNOWN, CAPABLE, HERE, LINES, _all(200)),
    Row(EVERY, CAPABLE, COLD, LINES, _all(502)),
    Row(EVERY, INCAPABLE, COLD, LINES, _all(403)),
    Row(KNOWN, INCAPABLE, HERE, LINES, _all(403)),
    # What does not come from here goes to the blob host, which refuses what it has not signed.
    Row(EVERY, BARE, COLD, ON, _all(403)),
    Row(EVERY, BARE, COLD, OFF, _all(502)),
    Row(KNOWN, BARE, HERE, ON, _all(403)),
    Row(KNOWN, BARE, HERE, OFF, _all(502)),
    # Cold and away, or nowhere at all.
    Row(EVERY, MANIFEST, COLD, OFF, _all(504)),
    Row(EVERY, AS_BLOB + HEAD + GET + NEW_GET + CHUNKSUMS + LISTED, COLD, OFF, _all(502)),
    Row(UNKNOWN, MANIFEST + AS_BLOB + HEAD + GET + NEW_GET + CHUNKSUMS + LISTED, COLD, ON, _all(404)),
)


def table() -> dict[Cell, int]:
    """The expected status of each cell. ValueError if two rows speak of one."""
    cells: dict[Cell, int] = {}
    for row in ROWS:
        for cell, status in row.cells():
            if cell in cells:
                raise ValueError(f"expected one row for {cell}, got two")
            cells[cell] = status
    return cells


def gives(status: int) -> bool:
    """Whether bytes may flow, or are promised."""
    return status < 400


_COLUMNS: Final = {
    "public: anybody": ("public", "held", "online", ("anonymous", "wrong")),
    "private: whom the registry accepts": ("private", "held", "online", ("right",)),
    "private: anybody else": ("private", "held", "online", ("anonymous", "wrong", "expired")),
    "public, registry away": ("public", "held", "offline", ("anonymous", "wrong")),
    "private, registry away": ("private", "held", "offline", CALLERS),
    "private, accepted within the last minute": ("private", "recent", "offline", ("right", "expired")),
}
_LINES: Final = {
    "manifest, by tag or digest": MANIFEST,
    "HEAD of a blob, chunk sums": HEAD + CHUNKSUMS,
    "blob": GET + NEW_GET,
    "blob, of another repository whose manifest lists it": LISTED,
    "the address that the cache redirected somebody to, for 24 h": CAPABLE,
    "that address after 24 h, altered, or for another blob": INCAPABLE,
}


def markdown() -> str:
    """Return the table of docs/who-gets-what.md."""
    cells = table()
    lines = [f"| of a recorded model | {' | '.join(_COLUMNS)} |", "| --- |" + " --- |" * len(_COLUMNS)]
    for name, requests in _LINES.items():
        words = []
        for model, state, line, callers in _COLUMNS.values():
            found = {
                gives(cells[Cell(model, request, state, line, caller)]) for request in requests for caller in callers
            }
            (word,) = found
            words.append("yes" if word else "no")
        lines.append(f"| {name} | {' | '.join(words)} |")
    return "\n".join([*lines, ""])


def lines(outcomes: Mapping[Cell, int]) -> Iterator[str]:
    """What was answered, for a terminal: + bytes, - none, ! not as expected, per caller in the order of CALLERS."""
    expected = table()
    columns = list(product(STATES, LINES))
    width = max(map(len, REQUESTS))
    yield f"{'':{width + 9}}" + "".join(f"{f'{state} {line}':16}" for state, line in columns)
    for model, request in product(MODELS, REQUESTS):
        marks = []
        for state, line in columns:
            cells = [Cell(model, request, state, line, caller) for caller in CALLERS]
            if any(cell in outcomes for cell in cells):
                marks.append("".join(_mark(outcomes.get(cell), expected[cell]) for cell in cells))
            else:
                marks.append("")
        if any(marks):
            yield f"{model:8} {request:{width}}" + "".join(f"{mark:16}" for mark in marks).rstrip()


def _mark(status: int | None, expected: int) -> str:
    if status is None:
        return "?"
    return "!" if status != expected else "+" if gives(status) else "-"
