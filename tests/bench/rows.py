"""The rows that `scripts/bench` can measure, and what limits each.

**Invariant**: names are unique and the order is the table's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tests.bench import cold, keep, pulls, small, warm
from tests.bench.figures import Bench, Figure


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of one or more figures; its docstring says what is done."""

    measure: Callable[[Bench], Iterator[Figure]]
    limit: str
    """What keeps the figures from being better."""

    @property
    def about(self) -> str:
        """What is measured."""
        return " ".join((self.measure.__doc__ or "").split())


ROWS: Final = {
    "generator": Row(
        warm.generator,
        "the generator itself, asking nginx: no other figure can be better than this on the same machine",
    ),
    "hit": Row(
        warm.hit,
        "encrypting and the kernel's copying, on the cores that the clients decrypt on too; the cache's threads and "
        "nginx's workers use all of them",
    ),
    "plain": Row(warm.plain, "one core and the kernel's copying, with the reader on the other one"),
    "single": Row(
        cold.single,
        "a limited source: nginx's slices come one after the other, the cache's over 16 connections; an unlimited one: "
        "Python, whose threads take the TLS records of 16 KiB in turns, and the hashing beside it",
    ),
    "ollama": Row(
        cold.ollama,
        "several connections from the client's side too, so that direct is fast; the emulators hash and write in "
        "Python, on the same cores",
    ),
    "tensors": Row(
        cold.tensors,
        "Python's interpreter lock: a blob is a recording, with two requests to answer, one to make and some "
        "twenty-five passes of the event loop; the emulator, in Python too, on the same cores",
    ),
    "parts": Row(
        pulls.parts, "source, cache and client share the cores, and all three are Python; the disk at the end"
    ),
    "fairness": Row(pulls.fairness, "the source's rate, over the places that wait"),
    "lag": Row(pulls.lag, "Python's one interpreter lock, which hashing and TLS release only in part"),
    "requests": Row(small.requests, "mitmproxy's Python for each request, one core"),
    "latency": Row(small.latency, "the same, and the generator's 64 threads on the same cores"),
    "many": Row(
        warm.many,
        "mitmproxy's Python for each CONNECT, one core, and the generator's own handshakes on the same cores; nginx is "
        "asked directly",
    ),
    "beside": Row(warm.beside, "Python's one interpreter lock, and the cores, which the clients take too"),
    "keep": Row(
        keep.keep,
        "Python: a third of a second before a verb begins, and without a cache that has it in memory the whole index "
        "is read",
    ),
    "hashed": Row(keep.hashed, "the cores' sha256, and for `import` the disk"),
    "model": Row(small.model, "mitmproxy's Python for each blob's redirect; the blob itself comes from a thread"),
}
