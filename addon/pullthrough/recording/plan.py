"""The plan of one recording: which bytes are here, which are awaited or being fetched, and what upstream has said.

It makes every decision while bytes come. Readers, connections and the disk tell the plan what has happened and ask it
what is next. They all run on the event loop, so the plan needs no lock.

Invariant: a byte is claimed by one attempt at most, and released however that ends. A byte that a reader misses is
claimed, or is in the next slice, unless the plan is held or over. Pure state: `now` is a parameter, in seconds of any
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
from pullthrough.recording.retry_policy import LIVELY_S, Pace, Patience, Rates, averaged, beside_s
from pullthrough.recording.slicing import MAX_SLICE, MIN_SLICE, Demand, Slice, next_slice
from pullthrough.recording.states import LEARN, Event, Got, Ranges

MAX_RESTARTS: Final = 3
"""The most changes of version that are tolerated: a source that changes more often never settles."""


@dataclass
class Counters:
    """The counts of all recordings since the daemon started."""

    upstream_bytes: int = 0
    near_bytes: int = 0
    """Bytes from the fleet's own sources."""
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
    """The path to upstream that all recordings share."""

    per_recording: int
    """Connections of each recording."""
    rate_limit: RateLimit
    rates: Rates = field(default_factory=Rates)
    counters: Counters = field(default_factory=Counters)

    @property
    def connections(self) -> int:
        """How many connections a recording can keep busy."""
        return self.rate_limit.connections(self.per_recording)


@dataclass(eq=False, slots=True)
class Interest:
    """The demand for a blob: its readers, and whether it is wanted whole."""

    readers: Collection[Demand]
    finish: Finish
    is_wanted: bool = False
    """Whether it is to be completed even without readers."""
    is_pulled: bool = False
    """Whether a client pulls the blob, rather than only reading its head."""

    def is_whole(self, assembly: Assembly) -> bool:
        """Return whether bytes that no reader requests are fetched too."""
        is_half = self.finish is Finish.AUTO and assembly.present.size * 2 >= assembly.size
        return self.is_pulled and bool(self.readers or self.is_wanted or self.finish is Finish.ALWAYS or is_half)


@dataclass(eq=False, slots=True)
class Attempt:
    """One connection at work on one slice."""

    claimed: Slice
    pace: Pace
    position: int
    """The end of the bytes it has written."""
    stop: int
    """Where the response ends."""
    is_whole: bool = False
    """Whether the response is the whole blob."""
    is_dropped: bool = False
    """Whether its bytes are no longer wanted."""


class Plan:
    """The state that the readers and the connections of one recording share."""

    def __init__(self, assembly: Assembly, interest: Interest, line: Line, *, host: str, now: float) -> None:
        """`host` is the blob's current host, "" while unknown."""
        self.assembly = assembly
        self.interest = interest
        self.host = host
        self.attempts: set[Attempt] = set()
        self.ranges = Ranges.YES
        self.fetched = 0
        """Bytes that have come, whether or not they were of use."""
        self.is_held = False
        """Whether requests must wait until the blob has been begun again."""
        self.is_over = False
        """Whether no more requests are to be made."""
        self._line = line
        self._patience = Patience(now)
        self._rate: float | None = None
        self._start_s: float | None = None
        """How long a response usually takes to begin, from its request on."""
        self._late: set[int] = set()
        """Where slices begin whose response has not begun in that time."""
        self._restarts = 0
        self._landing = Intervals()

    # --- what is next

    def next(self, now: float) -> Slice | None:
        """Return the slice that a free connection should request; None if there is nothing for it to do."""
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
        """Return whether there is work for one more connection than the `working` ones."""
        limit = self._line.connections if self.ranges is Ranges.YES else 1
        # Connections that have just started have not claimed yet, but each will claim MIN_SLICE at least.
        worth = -(-self.assembly.unclaimed // MIN_SLICE)
        return working < min(limit, worth) and self.next(now) is not None

    def begin(self, claimed: Slice, now: float) -> Attempt:
        """Claim a slice for a connection; `end` releases it. The slice of an empty blob is empty."""
        if claimed.start < claimed.stop:
            self.assembly.claim(claimed.start, claimed.stop)
        attempt = Attempt(claimed, Pace(now), claimed.start, claimed.stop)
        self.attempts.add(attempt)
        return attempt

    def end(self, attempt: Attempt) -> None:
        """Release the claim, however the attempt went; bytes that have come stay."""
        self.attempts.discard(attempt)
        self.assembly.release(attempt.claimed.start, attempt.claimed.stop)

    @staticmethod
    def first_claim(start: int, stop: int, got: Got) -> Slice:
        """Return the part of `[start, stop)` that a first response with these bytes claims.

        One requested without Range does not show whether the source serves ranges. So it counts as one slice while
        another connection tries; if that one gets the whole blob too, this one goes on.
        """
        return Slice(start, min(stop, MAX_SLICE) if got is Got.UNASKED else stop)

    # --- what upstream says

    def answer(self, attempt: Attempt, start: int, stop: int, got: Got) -> bool:
        """Note an attempt's response; returns whether to read it: only one connection reads the whole blob."""
        self.ranges = LEARN[self.ranges, got]
        if got is not Got.PART and any(other.is_whole for other in self.attempts):
            return False
        attempt.is_whole = got is not Got.PART
        attempt.position, attempt.stop = start, stop
        return True

    def reach(self, attempt: Attempt) -> int:
        """Return the offset up to which an attempt's response is to be read, as far as is known by now."""
        is_bounded = attempt.is_whole and self.ranges is not Ranges.NO
        return min(attempt.claimed.stop, attempt.stop) if is_bounded else attempt.stop

    def unwritten(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first part of `[start, stop)` that is neither present nor being written.

        For a response that is longer than its claim: it may overlap with others, and differ from them.
        """
        missing = self.assembly.present.missing(start, stop)
        return next((free for gap in missing for free in self._landing.missing(*gap)), None)

    def write(self, start: int, stop: int) -> None:
        """Note that these bytes are being written, so that none is written twice."""
        self._landing.add(start, stop)

    def written(self, start: int, stop: int) -> None:
        """Note that these bytes are no longer being written."""
        self._landing.remove(start, stop)

    def come(self, attempt: Attempt, count: int, now: float, *, near: bool) -> float:
        """Note that bytes have come, from the fleet if `near`; returns how long to pause before reading more."""
        self._line.counters.take(count, near=near)
        self.fetched += count
        self._patience.hear(now)
        attempt.pace.bring(count, now)
        pause_s = self._line.rate_limit.spend(count, live=bool(self.interest.readers), now=now)
        if pause_s:
            attempt.pace.hold_back(now + pause_s)  # not silent: we hold it back
        return pause_s

    @property
    def is_limited(self) -> bool:
        """Whether bytes must be accounted for before more are read."""
        return self._line.rate_limit.is_limited

    # --- how fast it is

    def usual(self, now: float) -> float | None:
        """Return what one connection usually delivers (bytes/s); None while unknown."""
        return self._rate or self._line.rates.of(self.host, now)

    def show_rate(self, host: str | None, count: int, elapsed_s: float, now: float) -> None:
        """Note the bytes that a connection to the host has brought in that time.

        Slow connections count too: when the whole line becomes slow, its connections are then not taken for silent.
        """
        if elapsed_s <= 0 or count < MIN_SLICE:
            return
        rate = count / elapsed_s
        self._rate = averaged(self._rate, rate)
        if host is not None:
            self._line.rates.show(host, rate, now)

    def show_start(self, seconds: float) -> None:
        """Note how long a response took to begin."""
        self._start_s = averaged(self._start_s, seconds)

    def give_up(self, attempt: Attempt) -> None:
        """Note that an overdue attempt is ended: if its response has not begun, the next one gets more time."""
        if not attempt.pace.has_begun:
            self._late.add(attempt.claimed.start)

    # --- what fails

    def listen(self, now: float) -> None:
        """Note that a reader has come: silence is counted from now."""
        self._patience.listen(now)

    def overdue(self, position: int, now: float) -> list[Attempt]:
        """Return the silent attempts that should bring the byte at `position`, for which a reader waits."""
        return [
            attempt
            for attempt in self.attempts
            if self._brings(attempt, position)
            and attempt.pace.is_silent(self.usual(now), self._silent_s(attempt, now), now)
        ]

    def _silent_s(self, attempt: Attempt, now: float) -> float:
        start_s = 0.0 if attempt.pace.has_begun else self._start_s
        if not attempt.pace.has_begun and attempt.claimed.start in self._late:
            return self._patience.silent_s
        others = [other.pace for other in self.attempts if other is not attempt]
        if start_s is not None and any(pace.has_begun and now - pace.heard < LIVELY_S for pace in others):
            return beside_s(start_s)
        return self._patience.silent_s

    def _brings(self, attempt: Attempt, position: int) -> bool:
        if attempt.is_whole and self.ranges is Ranges.NO:
            return position < attempt.stop
        return attempt.claimed.start <= position < attempt.claimed.stop

    @property
    def heard(self) -> float:
        """When the last byte came."""
        return self._patience.heard

    def quiet_s(self, now: float) -> float:
        """Return how long upstream still asks for no requests."""
        return self._patience.quiet_s(now)

    def fail(self, error: UpstreamError, now: float) -> bool:
        """Note a failed attempt; returns whether to give up."""
        self._line.counters.retries += 1
        return self._patience.fail(error, now) or error.discards

    def restart(self) -> bool:
        """Hold the plan, because the source serves another version, until all attempts have ended and the blob is begun
        again; returns False after too many changes.
        """
        self.is_held = True
        self._restarts += 1
        self._line.counters.restarts += 1
        return self._restarts <= MAX_RESTARTS
