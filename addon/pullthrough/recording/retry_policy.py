"""How long to go on with a source that fails, how soon to try again, which connection counts as silent, and how
fast hosts are.

The one place for back-off and failure: whoever fetches notes what it hears and what goes wrong, and is told what
follows.

Invariant: with one byte of progress a minute nothing is ever given up, but for a source that answers wrongly all the
time. Pure state: `now` is a parameter, in seconds of any steady clock.
"""

from collections import deque
from typing import Final

from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamRefused, UpstreamTimeout

GIVE_UP_S: Final = 60.0
"""Without one byte of progress for this long a recording fails; Ollama's own six tries take 63 s."""

MAX_UNEXPECTED: Final = 20
"""Wrong answers in a row: a source that lies does not get better by asking."""

BACKOFF_S: Final = 0.1
BACKOFF_LIMIT_S: Final = 2.0
RETRY_AFTER_LIMIT_S: Final = 10.0
"""Clients wait 30 s for a byte: upstream's wish for peace is granted up to a third of it."""

SILENT_S: Final = 3.0
"""A connection that has brought no byte for this long while a reader waits for its slice loses the slice to another
one: clients of v0.1.23-v0.5.7 wait 5 s. Doubled by each failure in a row, up to eightfold: the line may be slow."""

FAR_BELOW: Final = 1 / 8
"""A connection that delivers less than this part of what connections usually do counts as silent, too: a line that
drops packets leaves single connections at a hundredth of the others for many seconds."""

FIRST_S: Final = 15.0
FIRST_TRY_S: Final = 4.0
FIRST_BACKOFF_S: Final = 1.0
MAX_LIES: Final = 4
"""How often a wrong first answer is asked for again: a source that lies does not get better by asking."""
NEAR_SILENT_S: Final = 2.5
"""So long without a byte on any connection: a source of the fleet's is let go. Clients wait 5 s for one."""

_STEP_S: Final = 0.25
_REMEMBERED_S: Final = 8 * SILENT_S + 1.0


class Patience:
    """With all sources of one blob together."""

    def __init__(self, now: float) -> None:
        self.heard = now
        """When the last byte came."""
        self.failures = 0
        """In a row, without a byte between them."""
        self._quiet_until = 0.0

    @property
    def silent_s(self) -> float:
        """How long a connection may bring nothing while a reader waits for its bytes."""
        return SILENT_S * 2.0 ** min(self.failures, 3)

    def hear(self, now: float) -> None:
        """Note that bytes have come."""
        self.heard, self.failures = now, 0

    def listen(self, now: float) -> None:
        """Count silence from now on: before, nobody waited."""
        self.heard = now

    def fail(self, error: UpstreamError, now: float) -> bool:
        """Note a failure; return whether nothing speaks for another try."""
        self.failures += 1
        if isinstance(error, UpstreamRefused):
            self._quiet_until = max(self._quiet_until, now + min(error.retry_after_s, RETRY_AFTER_LIMIT_S))
        is_wrong = isinstance(error, UnexpectedResponse) and self.failures > MAX_UNEXPECTED
        return is_wrong or now - self.heard > GIVE_UP_S

    def quiet_s(self, now: float) -> float:
        """Return how long upstream still wants to be left alone."""
        return max(0.0, self._quiet_until - now)


class Backoff:
    """Of one connection, which tries again and again."""

    def __init__(self) -> None:
        self._tries = 0
        self._failed_at = 0.0

    def fail(self, heard: float, now: float) -> float:
        """Return how long to wait before the next try, where any connection has `heard` a byte then."""
        self._tries = 1 if heard > self._failed_at else self._tries + 1
        self._failed_at = now
        return backoff_s(self._tries)


def backoff_s(tries: int) -> float:
    """Return how long to wait after so many tries in vain; callers that are many take a random part of it."""
    return min(BACKOFF_LIMIT_S, BACKOFF_S * 2.0 ** min(max(tries - 1, 0), 10))


class FirstTries:
    """Tries to get a first response: clients have not been answered yet, and wait 30 s for that."""

    def __init__(self, now: float) -> None:
        self._until = now + FIRST_S
        self.count = 0
        """In vain."""

    def fail(self, error: UpstreamError, now: float) -> float | None:
        """Return how long to wait before the next try; None where nothing speaks for one."""
        self.count += 1
        peace_s = error.retry_after_s if isinstance(error, UpstreamRefused) else 0.0
        is_settled = isinstance(error, UpstreamRefused) and 400 <= error.status_hint < 429
        is_lie = isinstance(error, UnexpectedResponse) and self.count > MAX_LIES
        pause_s = max(peace_s, min(FIRST_BACKOFF_S, backoff_s(self.count)))
        return None if is_settled or is_lie or now + pause_s > self._until else pause_s


def lets_go(error: UpstreamError, silent_s: float) -> bool:
    """Return whether a source of the fleet's that has failed so is done without, with no byte from it for `silent_s`.

    Not for one connection that is slow among others. Upstream's is tried again.
    """
    return silent_s >= NEAR_SILENT_S or not isinstance(error, UpstreamTimeout)


class Pace:
    """What one connection has brought lately."""

    def __init__(self, now: float) -> None:
        self.heard = now
        """When it brought its last byte, or began; in the future while it is held back."""
        self._brought = 0
        self._marks = deque([(now, 0)])
        """(when, how much until then), oldest first."""

    def bring(self, count: int, now: float) -> None:
        """Note that it has brought so many bytes."""
        self.heard = now
        self._brought += count
        if now - self._marks[-1][0] >= _STEP_S:
            self._marks.append((now, self._brought))
            while self._marks[1][0] <= now - _REMEMBERED_S:
                self._marks.popleft()

    def hold_back(self, until: float) -> None:
        """Note that nothing is read from it until then, which is no fault of its own."""
        self.heard = until
        self._marks = deque([(until, self._brought)])

    def is_silent(self, usual: float | None, silent_s: float, now: float) -> bool:
        """Return whether it has brought nothing for `silent_s`, or far less than the `usual` bytes a second."""
        if now - self.heard >= silent_s:
            return True
        since = now - silent_s
        before = [brought for at, brought in self._marks if at <= since]
        if usual is None or not before:
            return False
        return self._brought - before[-1] < FAR_BELOW * usual * silent_s


RATE_LASTS_S: Final = 10.0
"""How long what a host has shown says something of what it will show."""
RATE_WEIGHT: Final = 0.3


class Rates:
    """What one connection to each host delivers, in bytes a second, as it has lately shown."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[float, float]] = {}

    def show(self, host: str, rate: float, now: float) -> None:
        """Note what a connection has delivered."""
        before = self.of(host, now)
        self._shown = {each: shown for each, shown in self._shown.items() if now - shown[1] < RATE_LASTS_S}
        self._shown[host] = (rate if before is None else before + RATE_WEIGHT * (rate - before), now)

    def of(self, host: str, now: float) -> float | None:
        """Return what a connection to the host delivers; None if it has shown nothing lately."""
        rate, at = self._shown.get(host, (0.0, -RATE_LASTS_S))
        return rate if now - at < RATE_LASTS_S else None
