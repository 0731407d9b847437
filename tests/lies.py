"""What can answer in a registry's place, and what of it must never be believed: the table of lies.

A lie is made of five axes: the place of the answer, its status, what it carries, how long it claims to be, and its
coding. tests/unit/registry/test_lies.py walks each of them through every door of the cache; what was seen is printed
after a run.
"""

import gzip
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

MARK: Final = b"<h1>Log in to go on</h1>"
"""What no client may ever find in a model."""
LOGIN: Final = "https://login.example/portal?next=model"

PLACES: Final = ("manifest", "head", "blob", "source", "store", "sums")
"""Registry: GET and HEAD of a manifest; HEAD of a blob; GET of a blob; chunk sums. Source: another path of the
registry's host that it redirects a blob to. Store: the blob host's own address of the blob."""

_TYPES: Final = {
    "page": "text/html; charset=utf-8",
    "challenge": "text/html",
    "text": "text/plain",
    "noise": "application/json",
    "octets": "application/octet-stream",
    "untyped": "",
}
_STATUSES: Final = (302, 400, 401, 403, 404, 405, 408, 421, 425, 429, 451, 500, 501, 502, 503, 511)


@dataclass(frozen=True)
class Lie:
    """An answer that is not the registry's."""

    place: str
    status: int
    kind: str = "page"
    length: str = "own"
    """Of its body; `same` as the blob, `more` by a byte, `half` of it, `none` told, `cut` before the end, `huge`."""
    coding: str = ""
    field: tuple[str, str] = ("", "")
    """One more field, as sent."""
    body: bytes | None = None

    def __str__(self) -> str:
        words = (self.place, str(self.status), self.kind, self.length, self.coding, self.field[0])
        return " ".join(filter(None, words)) + (f" {self.body[:12]!r}" if self.body is not None else "")

    def answer(self, blob: bytes, asked: tuple[int, int] | None, *, head: bool) -> bytes:
        """The bytes on the wire, in answer to a request for this interval of the blob."""
        body = self._body(blob)
        fields = [("Content-Type", _TYPES[self.kind]), self.field]
        if self.kind == "challenge":
            fields.append(("cf-mitigated", "challenge"))
        if self.status == 302:
            fields.append(("Location", LOGIN))
        complete = len(body)
        if self.status == 206:
            start, stop = asked or (0, complete)
            stop = min(stop, complete)
            fields.append(("Content-Range", f"bytes {start}-{max(start, stop - 1)}/{complete}"))
            body = body[start:stop]
        if self.coding:
            fields.append(("Content-Encoding", self.coding))
            body = gzip.compress(body) if self.coding == "gzip" else body
        if self.status == 416:
            fields.append(("Content-Range", f"bytes */{0 if self.length == 'own' else len(blob) - 1}"))
            body = b""
        told = {"huge": 1 << 60, "cut": len(body) + 1000}.get(self.length, len(body))
        if self.length == "none":
            fields.append(("Connection", "close"))
        else:
            fields.append(("Content-Length", str(told)))
        lines = [f"HTTP/1.1 {self.status} Sure", *(f"{name}: {value}" for name, value in fields if name and value)]
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (b"" if head else body)

    @property
    def closes(self) -> bool:
        """Whether the connection ends behind it."""
        return self.length in ("none", "cut", "huge")

    def _body(self, blob: bytes) -> bytes:
        if self.body is not None:
            return self.body
        start = b'{"ok": true, "page": "%b"}' % MARK if self.kind == "noise" else b"<html>" + MARK
        size = {"same": len(blob), "more": len(blob) + 1, "half": len(blob) // 2, "zero": 0}.get(self.length)
        return start if size is None else (start + b" " * size)[:size]


def _all() -> Iterator[Lie]:
    for place, status, kind in product(PLACES, _STATUSES, ("page", "text", "noise")):
        # The router's own 404 is plain text; 429 and 5xx mean the same whoever says them.
        if not (status == 404 and kind == "text"):
            yield Lie(place, status, kind)
    for place in PLACES:
        yield Lie(place, 403, "challenge")
        yield Lie(place, 503, "challenge")
        yield Lie(place, 204, "untyped", "zero")
        yield Lie(place, 404, "untyped", "zero")
        yield Lie(place, 403, "untyped", "zero")
        yield Lie(place, 401, "untyped", "huge")
        yield Lie(place, 403, field=("X-Page", "\udcff\udcfe"))
        yield Lie(place, 200, "text", field=("ETag", '"\udcff"'))
        yield Lie(place, 200, "page", coding="gzip")
        yield Lie(place, 200, "octets", coding="br")
    for place, status, kind, length in product(
        ("blob", "source", "store"),
        (200, 206),
        ("page", "text", "octets", "untyped"),
        ("own", "same", "more", "half", "zero", "none", "cut", "huge"),
    ):
        yield Lie(place, status, kind, length)
    for place, length in product(("blob", "source", "store"), ("own", "same")):
        yield Lie(place, 416, "octets", length)
    for status, length in product((200, 206), ("same", "more", "zero", "none", "huge")):
        yield Lie("head", status, "octets", length)
    for body in (
        b"",
        b"null",
        b"[" * 100_000,
        b'{"layers": ' + b"[" * 100_000,
        b'{"layers": [%b]}' % b",".join([b"{}"] * 300_000),
        b'{"layers": [{"digest": "sha256:%b", "size": %d}]}' % (b"a" * 64, 1 << 60),
        b'{"layers": [{"digest": "sha256:%b", "size": -1}]}' % (b"a" * 64),
        b'{"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": "\\ud800"}',
        b"<html>" + MARK,
    ):
        yield Lie("manifest", 200, "noise", body=body)
        yield Lie("sums", 200, "text", body=body[:100_000], field=("Content-Location", LOGIN))


LIES: Final = tuple(dict.fromkeys(_all()))


def lines(seen: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """How many lies of each place were walked in each scene, and how many of them were believed, for a terminal."""
    scenes = list(seen)
    yield f"{'':10}" + "".join(f"{scene:>18}" for scene in scenes)
    places = Counter(lie.place for lie in LIES)
    for place, count in places.items():
        yield f"{place:10}" + "".join(f"{seen[scene].get(place, '-'):>18}" for scene in scenes) + f"   of {count}"
