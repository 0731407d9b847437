"""What can go wrong between the cache and upstream, and how many upstream bytes each trouble may cost.

One row per trouble: how the hostile origin is told to make it, and the bound on upstream bytes / blob with its reason.
tests/e2e/test_faults.py meets every row in several situations, and the measured ratios are printed after a test run.
`python -m tests.documents` writes it into docs/compatibility.md.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.support.origin import Fault, Mode, Origin

SIZE: Final = 8 << 20
RATE: Final = 2_500_000
"""Bytes per second where something happens half-way: so slow that not all of the blob is asked for at once."""

_SLICE: Final = 512 << 10
"""The most that one answer brings of a blob of this size."""
_ENVELOPE: Final = 1024
"""What gzip adds to a slice that it cannot make smaller, or less."""
_CONNECTIONS: Final = 16
_PIECE: Final = 64 << 10
"""What the origin writes at once under a rate limit."""
_CUT: Final = 40_000
"""Bytes after which an answer is cut: less than the smallest slice."""

Make = Callable[[str, str], Fault]
"""A fault for a blob, of the repository and the digest."""


@dataclass(frozen=True)
class Trouble:
    """A trouble: `faults` are there from the start, `midway` happens when a quarter of the blob has been sent."""

    name: str
    bound: float
    """Upstream bytes / blob."""
    why: str
    faults: tuple[Make, ...] = ()
    midway: Callable[[Origin, str], None] | None = None
    rate: int | None = None
    """Bytes per second of all the origin's connections together."""
    half: float | None = None
    """The bound where a part of the blob is there already; that part is counted."""

    comes_again: bool = True
    """Whether it can come where a part of the blob is there already."""

    def bound_in(self, situation: str) -> float:
        """The bound in a situation."""
        return self.half if self.half is not None and situation == "half" else self.bound


def _cdn(mode: Mode, **options: Any) -> Make:
    return lambda _repository, layer: Fault(mode, digest=layer, **options)


def _manifest(mode: Mode, **options: Any) -> Make:
    return lambda repository, _layer: Fault(
        mode, where="registry", path=f"/v2/{repository}/manifests/", method="GET", **options
    )


def _blob(mode: Mode, method: str, **options: Any) -> Make:
    return lambda _repository, layer: Fault(mode, where="registry", digest=layer, method=method, **options)


def _another_tag(origin: Origin, layer: str) -> None:
    origin.faults.append(Fault(Mode.ETAG, digest=layer, times=None))


def _expire(origin: Origin, layer: str) -> None:
    origin.expire_signatures(layer)


def _expire_and_fail(origin: Origin, layer: str) -> None:
    origin.faults.append(Fault(Mode.STATUS, where="registry", digest=layer, method="GET", status=500))
    origin.expire_signatures(layer)


def _restart(origin: Origin, _layer: str) -> None:
    origin.stop()
    # How long it is away.
    threading.Event().wait(1.0)
    origin.start()


TROUBLES: Final = (
    Trouble(
        "reset after 40 kB, six times",
        1 + 6 * _CUT / SIZE,
        "what the six cut answers had brought, again",
        (_cdn(Mode.RESET, after=_CUT, times=6),),
    ),
    Trouble(
        "clean close after 40 kB, six times",
        1 + 6 * _CUT / SIZE,
        "what the six cut answers had brought, again",
        (_cdn(Mode.TRUNCATE, after=_CUT, times=6),),
    ),
    Trouble(
        "one connection stalls after 40 kB",
        1 + _CUT / SIZE,
        "what the stalled answer had brought, again; another connection takes over",
        (_cdn(Mode.STALL, after=_CUT),),
    ),
    Trouble(
        "no first byte on one connection",
        1.0,
        "it brings nothing; another connection takes over",
        (_cdn(Mode.HANG),),
    ),
    Trouble("503, three times", 1.0, "an error brings no bytes", (_cdn(Mode.STATUS, times=3),)),
    Trouble(
        "429 with Retry-After: 1, twice",
        1.0,
        "an error brings no bytes",
        (_cdn(Mode.STATUS, status=429, headers={"Retry-After": "1"}, times=2),),
    ),
    Trouble(
        "registry: 500 for the manifest, once",
        1.0,
        "asked again before the client is answered",
        (_manifest(Mode.STATUS, status=500),),
    ),
    Trouble(
        "registry: 500 for HEAD, once",
        1.0,
        "asked again before the client is answered",
        (_blob(Mode.STATUS, "HEAD", status=500),),
        comes_again=False,
    ),
    Trouble(
        "registry: 500 for the blob's address, once",
        1.0,
        "asked again before the client is answered",
        (_blob(Mode.STATUS, "GET", status=500),),
        comes_again=False,
    ),
    Trouble(
        "registry: reset of each request, once",
        1.0,
        "asked again before the client is answered",
        (_manifest(Mode.DROP), _blob(Mode.DROP, "HEAD"), _blob(Mode.DROP, "GET")),
        comes_again=False,
    ),
    Trouble(
        "wrong Content-Range, four times",
        1 + 4 * _SLICE / SIZE,
        "four slices that are not believed",
        (_cdn(Mode.CONTENT_RANGE, times=4),),
    ),
    Trouble(
        "another ETag from a quarter on",
        2.0,
        "the blob once more; versions are not mixed",
        midway=_another_tag,
        rate=RATE,
    ),
    Trouble(
        "addresses expire (403) at a quarter",
        1.0,
        "a new address is obtained; what was sent stays",
        midway=_expire,
        rate=RATE,
    ),
    Trouble(
        "they expire, and the registry answers 500 once",
        1.0,
        "a new address is obtained; what was sent stays",
        midway=_expire_and_fail,
        rate=RATE,
    ),
    Trouble(
        "200 in place of every 206",
        1.0,
        "one answer brings the whole; what was there before it came is sent again",
        (_cdn(Mode.IGNORE_RANGE, times=None),),
        rate=RATE,
        # What was there, the whole, and what other connections were sent before they could be closed.
        half=2.25,
    ),
    Trouble(
        "gzip, three times",
        1 + 3 * (_SLICE + _ENVELOPE) / SIZE,
        "three slices that are not wanted so",
        (_cdn(Mode.GZIP, times=3),),
    ),
    Trouble(
        "10 kB in place of a slice, three times",
        1 + 3 * 10_000 / SIZE,
        "three answers that are not believed",
        (_cdn(Mode.SHORT_LENGTH, after=10_000, times=3),),
    ),
    Trouble(
        "no Content-Length, three times",
        1 + 3 * _SLICE / SIZE,
        "three slices whose end cannot be told",
        (_cdn(Mode.NO_LENGTH, times=3),),
    ),
    Trouble(
        "upstream away for 1 s at a quarter",
        1 + _CONNECTIONS * _PIECE / SIZE,
        "what each cut connection had sent last, again",
        midway=_restart,
        rate=RATE,
    ),
)

FLIPPED: Final = Trouble(
    "one byte is wrong",
    2.0,
    "the blob once more: which byte it is nobody knows; the pull fails at the client, the next one is right",
    (_cdn(Mode.FLIP, after=SIZE - 100_000),),
)

ALL: Final = (*TROUBLES, FLIPPED)


def markdown() -> str:
    """Return the table of docs/compatibility.md."""
    rows = []
    for trouble in ALL:
        bound = f"{trouble.bound:.3f}"
        if trouble.half is not None:
            bound += f" ({trouble.half:.3f} with a part there)"
        rows.append(f"| {trouble.name} | {bound} | {trouble.why} |")
    return "\n".join(["| trouble | upstream bytes / blob, at most | why |", "| --- | --- | --- |", *rows, ""])


def lines(ratios: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The measured ratios by name and situation, as a table for a terminal."""
    names = [trouble.name for trouble in ALL if trouble.name in ratios]
    situations = list(dict.fromkeys(situation for name in names for situation in ratios[name]))
    width = max(map(len, names))
    yield f"{'':{width}}  " + "".join(f"{situation:14}" for situation in situations) + "at most"
    for trouble in ALL:
        if row := ratios.get(trouble.name):
            bound = f"{trouble.bound:.3f}" + (f", half {trouble.half:.3f}" if trouble.half is not None else "")
            yield f"{trouble.name:{width}}  " + "".join(f"{row.get(each, '-'):14}" for each in situations) + bound
