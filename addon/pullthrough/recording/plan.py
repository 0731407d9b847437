"""The plan of one recording: which bytes are here, who waits for which, who fetches which, and what upstream said.

All that is decided while bytes come is decided here. Readers, connections and the disk tell the plan what has
happened and ask it what is next, each from the event loop: its turns are the plan's lock.

Invariant: a byte is claimed by one attempt at most, and given up however that ends; whatever a reader misses is
claimed, or is the next slice, unless the plan is held or over. Pure state: `now` is a parameter, in seconds of any
steady clock.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from pullthrough.config.settings import Finish
from pullthrough.core.errors import UpstreamError
from pullthrough.core.intervals import Intervals
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.retry_policy import RATE_WEIGHT, Pace, Patience, Rates
from pullthrough.recording.slicing import MAX_SLICE, MIN_SLICE, Demand, Slice, next_slice
from pullthrough.recording.states import LEARN, Event, Got, Ranges

MAX_RESTARTS: Final = 3
"""Changes of version: then the source cannot make up its mind."""


@dataclass
class Counters:
    """What recordings have done since the start of the daemon."""

    upstream_bytes: int = 0
    near_bytes: int = 0
    """From the fleet's own sources."""
    retries: int = 0
    mismatches: int = 0
    restarts: int = 0
    ended: Counter[Event] = field(default_factory=Counter)

    def take(self, count: int, *, near: bool) -> None:
        """Count bytes that have come, each once."""
        if near:
            self.near_bytes += count
        else:
            self.upstream_bytes += count


@dataclass(frozen=True, slots=True)
class Line:
    """What all recordings share of the way to upstream."""

    per_recording: int
    """Connections."""
    rate_limit: RateLimit
    rates: Rates = field(default_factory=Rates)
    counters: Counters = field(default_factory=Counters)

    @property
    def connections(self) -> int:
        """Return how many of its connections a recording can keep busy."""
        return self.rate_limit.connections(self.per_recording)


@dataclass(eq=False, slots=True)
class Interest:
    """How much of a blob is wanted, and by whom."""

    readers: Collection[Demand]
    finish: Finish
    is_wanted: bool = False
    """It is to be whole even if nobody reads."""
    is_pulled: bool = False
    """Somebody pulls the blob, and does not only look into it."""

    def is_whole(self, assembly: Assembly) -> bool:
        """Return whether bytes that no reader asks for are fetched too."""
        is_half = self.finish is Finish.AUTO and assembly.present.size * 2 >= assembly.size
        return self.is_pulled and bool(self.readers or self.is_wanted or self.finish is Finish.ALWAYS or is_half)


@dataclass(eq=False, slots=True)
class Attempt:
    """One connection at work on one slice."""

    claimed: Slice
    pace: Pace
    position: int
    """Up to where its bytes are written."""
    stop: int
    """Where the response ends."""
    is_whole: bool = False
    """The response is the whole blob."""
    is_dropped: bool = False
    """Nobody wants it any more."""


class Plan:
    """What the readers and the connections of one recording share."""

    def __init__(self, assembly: Assembly, interest: Interest, line: Line, *, host: str, now: float) -> None:
        """`host` is the one that the blob comes from now, "" while that is not known."""
        self.assembly = assembly
        self.interest = interest
        self.host = host
        self.attempts: set[Attempt] = set()
        self.ranges = Ranges.YES
        self.fetched = 0
        """Bytes that have come, whether or not they were of use."""
        self.is_held = False
        """Nothing is asked for until it has been begun again."""
        self.is_over = False
        """Nothing is asked for any more."""
        self._line = line
        self._patience = Patience(now)
        self._rate: float | None = None
        self._restarts = 0
        self._landing = Intervals()

    # --- what is next

    def next(self, now: float) -> Slice | None:
        """Return the slice that a free connection should ask for; None where there is nothing for it to do."""
        is_served = self.ranges is Ranges.NO and any(attempt.is_whole for attempt in self.attempts)
        if self.is_over or self.is_held or is_served:
            return None
        return next_slice(
            self.assembly,
            self.interest.readers,
            rate=self.usual(now),
            connections=self._line.connections,
            complete=self.interest.is_whole(self.assembly),
            now=now,
        )

    def wants_another(self, working: int, now: float) -> bool:
        """Return whether there is something to do for one connection more than those at work."""
        limit = self._line.connections if self.ranges is Ranges.YES else 1
        # Those that have just been started have not claimed yet, but each will take this much at least.
        worth = -(-self.assembly.unclaimed // MIN_SLICE)
        return working < min(limit, worth) and self.next(now) is not None

    def begin(self, claimed: Slice, now: float) -> Attempt:
        """Claim a slice for a connection; `end` gives it up. An empty one is the answer for an empty blob."""
        if claimed.start < claimed.stop:
            self.assembly.claim(claimed.start, claimed.stop)
        attempt = Attempt(claimed, Pace(now), claimed.start, claimed.stop)
        self.attempts.add(attempt)
        return attempt

    def end(self, attempt: Attempt) -> None:
        """Give up the claim, however the attempt went; what has come stays."""
        self.attempts.discard(attempt)
        self.assembly.release(attempt.claimed.start, attempt.claimed.stop)

    @staticmethod
    def first_claim(start: int, stop: int, got: Got) -> Slice:
        """Return what a first response claims of `[start, stop)`, which it has.

        One that was asked for without Range says nothing of whether the source knows it. So it counts as a slice,
        while another connection tries; where that gets the whole too, this one goes on.
        """
        return Slice(start, min(stop, MAX_SLICE) if got is Got.UNASKED else stop)

    # --- what upstream says

    def answer(self, attempt: Attempt, start: int, stop: int, got: Got) -> bool:
        """Note the response of an attempt; return whether it is of use: the whole is read from one connection."""
        self.ranges = LEARN[self.ranges, got]
        if got is not Got.PART and any(other.is_whole for other in self.attempts):
            return False
        attempt.is_whole = got is not Got.PART
        attempt.position, attempt.stop = start, stop
        return True

    def reach(self, attempt: Attempt) -> int:
        """Return up to where the response of an attempt is read, as far as is known by now."""
        is_bounded = attempt.is_whole and self.ranges is not Ranges.NO
        return min(attempt.claimed.stop, attempt.stop) if is_bounded else attempt.stop

    def unwritten(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first part of `[start, stop)` that is neither present nor just being written, for a response that
        is longer than what was claimed: it may overlap with others, and may differ from them.
        """
        missing = self.assembly.present.missing(start, stop)
        return next((free for gap in missing for free in self._landing.missing(*gap)), None)

    def write(self, start: int, stop: int) -> None:
        """Note that these bytes are just being written: no byte is written twice."""
        self._landing.add(start, stop)

    def written(self, start: int, stop: int) -> None:
        """Note that they are not being written any more."""
        self._landing.remove(start, stop)

    def come(self, attempt: Attempt, count: int, now: float, *, near: bool) -> float:
        """Note that bytes have come, `near` ones from the fleet; return for how long to read no more."""
        self._line.counters.take(count, near=near)
        self.fetched += count
        self._patience.hear(now)
        attempt.pace.bring(count, now)
        pause_s = self._line.rate_limit.spend(count, live=bool(self.interest.readers), now=now)
        if pause_s:
            attempt.pace.hold_back(now + pause_s)  # not silent: held back by ourselves
        return pause_s

    @property
    def is_limited(self) -> bool:
        """Whether bytes must be accounted for before more are read."""
        return self._line.rate_limit.is_limited

    # --- how fast it is

    def usual(self, now: float) -> float | None:
        """Return what one connection delivers, in bytes a second; None while that is not known."""
        return self._rate or self._line.rates.of(self.host, now)

    def show_rate(self, host: str | None, count: int, elapsed_s: float, now: float) -> None:
        """Note what a connection to the host has brought in so much time.

        What was too slow counts as well: so a line that has become slow is not taken for slow connections.
        """
        if elapsed_s <= 0 or count < MIN_SLICE:
            return
        rate = count / elapsed_s
        self._rate = rate if self._rate is None else self._rate + RATE_WEIGHT * (rate - self._rate)
        if host is not None:
            self._line.rates.show(host, rate, now)

    # --- what fails

    def listen(self, now: float) -> None:
        """Note that somebody has begun to wait: silence is counted from now."""
        self._patience.listen(now)

    def overdue(self, position: int, now: float) -> list[Attempt]:
        """Return who should bring the byte at `position` to a reader that waits for it, and is silent."""
        usual, silent_s = self.usual(now), self._patience.silent_s
        return [
            attempt
            for attempt in self.attempts
            if self._brings(attempt, position) and attempt.pace.is_silent(usual, silent_s, now)
        ]

    def _brings(self, attempt: Attempt, position: int) -> bool:
        if attempt.is_whole and self.ranges is Ranges.NO:
            return position < attempt.stop
        return attempt.claimed.start <= position < attempt.claimed.stop

    @property
    def heard(self) -> float:
        """When the last byte came."""
        return self._patience.heard

    def quiet_s(self, now: float) -> float:
        """Return how long upstream still wants to be left alone."""
        return self._patience.quiet_s(now)

    def fail(self, error: UpstreamError, now: float) -> bool:
        """Note a failure of an attempt; return whether nothing speaks for another."""
        self._line.counters.retries += 1
        return self._patience.fail(error, now) or error.discards

    def restart(self) -> bool:
        """Hold the plan, as the source serves another version, until all attempts have ended and it is begun again;
        False if that happens all the time.
        """
        self.is_held = True
        self._restarts += 1
        self._line.counters.restarts += 1
        return self._restarts <= MAX_RESTARTS
