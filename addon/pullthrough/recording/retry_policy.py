"""How long to keep trying a source that fails, how soon to retry, which connections count as silent, and how fast
hosts are.

The one place for back-off and failure: fetchers report received bytes and failures, and are told what to do next.

Invariant: one byte of progress a minute keeps a recording alive, unless the source keeps giving wrong answers. Pure
state: `now` is a parameter, in seconds of any steady clock.
"""

from collections import deque
from typing import Final

from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamRefused, UpstreamTimeout

GIVE_UP_S: Final = 60.0
"""A recording without a byte of progress for this long fails; Ollama's own six tries take 63 s."""

MAX_UNEXPECTED: Final = 20
"""The most failures in a row after which a wrong answer is still retried: more requests will not correct the source."""

BACKOFF_S: Final = 0.1
BACKOFF_LIMIT_S: Final = 2.0
RETRY_AFTER_LIMIT_S: Final = 10.0
"""Clients wait 30 s for a byte: upstream's Retry-After is honoured up to a third of that."""

SILENT_S: Final = 3.0
"""A connection that brings no byte for this long while a reader waits for its slice loses the slice to another one:
clients of v0.1.23-v0.5.7 wait 5 s. Doubled by each failure in a row, up to eightfold: the line may be slow."""

LIVELY_S: Final = 0.5
BESIDE_S: Final = 1.5
"""While another connection has brought bytes within LIVELY_S, one may bring nothing only this long: packets of its own
are lost, and a new request does better."""
LATE: Final = 3.0
"""How many times as long as usual a response may take to begin."""

FAR_BELOW: Final = 1 / 8
"""A connection that delivers less than this fraction of the usual rate also counts as silent: a line that drops packets
can leave single connections at a hundredth of the others' rate for many seconds."""

FIRST_S: Final = 15.0
FIRST_TRY_S: Final = 4.0
FIRST_BACKOFF_S: Final = 1.0
MAX_LIES: Final = 4
"""How often a wrong first answer is retried: more requests will not correct the source."""
NEAR_SILENT_S: Final = 2.5
"""A source of the fleet is dropped after this long without a byte on any connection. Clients wait 5 s for one."""

_STEP_S: Final = 0.25
_REMEMBERED_S: Final = 8 * SILENT_S + 1.0


class Patience:
    """The patience with all sources of one blob together."""

    def __init__(self, now: float) -> None:
        self.heard = now
        """When the last byte came."""
        self.failures = 0
        """Failures in a row, without a byte between them."""
        self._quiet_until = 0.0

    @property
    def silent_s(self) -> float:
        """How long a connection may bring nothing, or little, while a reader waits for its bytes."""
        return SILENT_S * 2.0 ** min(self.failures, 3)

    def hear(self, now: float) -> None:
        """Note that bytes have come."""
        self.heard, self.failures = now, 0

    def listen(self, now: float) -> None:
        """Count silence from now on: no reader was waiting before."""
        self.heard = now

    def fail(self, error: UpstreamError, now: float) -> bool:
        """Note a failure; returns whether to give up."""
        self.failures += 1
        if isinstance(error, UpstreamRefused):
            self._quiet_until = max(self._quiet_until, now + min(error.retry_after_s, RETRY_AFTER_LIMIT_S))
        is_wrong = isinstance(error, UnexpectedResponse) and self.failures > MAX_UNEXPECTED
        return is_wrong or now - self.heard > GIVE_UP_S

    def quiet_s(self, now: float) -> float:
        """Return how long upstream still asks for no requests."""
        return max(0.0, self._quiet_until - now)


class Backoff:
    """The back-off of one connection, which tries again and again."""

    def __init__(self) -> None:
        self._tries = 0
        self._failed_at = 0.0

    def fail(self, heard: float, now: float) -> float:
        """Return how long to wait before the next try; `heard` is when any connection last brought a byte."""
        self._tries = 1 if heard > self._failed_at else self._tries + 1
        self._failed_at = now
        return backoff_s(self._tries)


def backoff_s(tries: int) -> float:
    """Return how long to wait after so many failed tries; callers with many connections wait a random part of it."""
    return min(BACKOFF_LIMIT_S, BACKOFF_S * 2.0 ** min(max(tries - 1, 0), 10))


class FirstTries:
    """The tries to get a first response, while clients wait up to 30 s for their own."""

    def __init__(self, now: float) -> None:
        self._until = now + FIRST_S
        self.count = 0
        """Tries that have failed."""

    def fail(self, error: UpstreamError, now: float) -> float | None:
        """Note a failed try; returns how long to wait before the next one, None to give up."""
        self.count += 1
        peace_s = error.retry_after_s if isinstance(error, UpstreamRefused) else 0.0
        is_settled = isinstance(error, UpstreamRefused) and 400 <= error.status_hint < 429
        is_lie = isinstance(error, UnexpectedResponse) and self.count > MAX_LIES
        pause_s = max(peace_s, min(FIRST_BACKOFF_S, backoff_s(self.count)))
        return None if is_settled or is_lie or now + pause_s > self._until else pause_s


def lets_go(error: UpstreamError, silent_s: float) -> bool:
    """Return whether to drop a source of the fleet after this error, with no byte from it for `silent_s`.

    Not because one connection is slower than others. Upstream's own sources are always tried again.
    """
    return silent_s >= NEAR_SILENT_S or not isinstance(error, UpstreamTimeout)


class Pace:
    """The recent progress of one connection."""

    def __init__(self, now: float) -> None:
        self.heard = now
        """When it brought its last byte, or began; in the future while it is held back."""
        self.began = now
        self._brought = 0
        self._marks = deque([(now, 0)])
        """(time, bytes brought until then), oldest first."""

    @property
    def has_begun(self) -> bool:
        """Whether it has brought a byte."""
        return self._brought > 0

    def bring(self, count: int, now: float) -> None:
        """Note that it has brought `count` bytes."""
        self.heard = now
        if not self._brought:
            self._marks = deque([(now, 0)])  # its rate does not count the time until then
        self._brought += count
        if now - self._marks[-1][0] >= _STEP_S:
            self._marks.append((now, self._brought))
            while self._marks[1][0] <= now - _REMEMBERED_S:
                self._marks.popleft()

    def hold_back(self, until: float) -> None:
        """Note that we read nothing from it until then, so that it does not count as silent."""
        self.heard = until
        self._marks = deque([(until, self._brought)])

    def is_silent(self, usual: float | None, silent_s: float, now: float) -> bool:
        """Return whether it has brought nothing for `silent_s`, or far less than the `usual` rate (bytes/s)."""
        if now - self.heard >= silent_s:
            return True
        since = now - silent_s
        before = [brought for at, brought in self._marks if at <= since]
        if usual is None or not before:
            return False
        return self._brought - before[-1] < FAR_BELOW * usual * silent_s


def beside_s(start_s: float) -> float:
    """Return what `Patience.silent_s` is for a connection beside others that bring bytes.

    `start_s` is how long responses usually take to begin, 0 if this one has begun.
    """
    return min(SILENT_S, max(BESIDE_S, LATE * start_s))


RATE_LASTS_S: Final = 10.0
"""How long a host's measured rate stays valid."""
_WEIGHT: Final = 0.3


def averaged(before: float | None, value: float) -> float:
    """Return the moving average after another value."""
    return value if before is None else before + _WEIGHT * (value - before)


class Rates:
    """The recent rate (bytes/s) of one connection to each host."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[float, float]] = {}

    def show(self, host: str, rate: float, now: float) -> None:
        """Note a connection's rate."""
        before = self.of(host, now)
        self._shown = {each: shown for each, shown in self._shown.items() if now - shown[1] < RATE_LASTS_S}
        self._shown[host] = (averaged(before, rate), now)

    def of(self, host: str, now: float) -> float | None:
        """Return the rate of a connection to the host; None if none was measured lately."""
        rate, at = self._shown.get(host, (0.0, -RATE_LASTS_S))
        return rate if now - at < RATE_LASTS_S else None
