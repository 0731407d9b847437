"""plan: whatever readers, connections and upstream do in whatever order, no byte is fetched twice or forgotten."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pullthrough.config.settings import Finish
from pullthrough.core.errors import UpstreamUnreachable
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.plan import MAX_RESTARTS, Attempt, Interest, Line, Plan
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.retry_policy import BESIDE_S, GIVE_UP_S, LATE, SILENT_S
from pullthrough.recording.slicing import KIB, MAX_SLICE, MIB, MIN_SLICE, Demand, Slice
from pullthrough.recording.states import Got, Ranges

SIZE = 40 * MIN_SLICE + 17
NOW = 1000.0
CONNECTIONS = 4


def plan_of(*readers: Demand, size: int = SIZE, rate: float | None = None, **interest: bool) -> Plan:
    """A plan of a recording that is just open."""
    wanted = Interest(readers, Finish.AUTO, **interest)
    return Plan(Assembly(size), wanted, Line(CONNECTIONS, RateLimit(rate)), host="r2.example", now=NOW)


class Plans(RuleBasedStateMachine):
    """Readers come and go, connections bring bytes or fail, the source shows what it is and begins again."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Demand] = []
        self.now = NOW
        interest = Interest(self.readers, Finish.NEVER, is_pulled=True)
        self.plan = Plan(Assembly(SIZE), interest, Line(CONNECTIONS, RateLimit(None)), host="", now=NOW)
        self.answered: set[Attempt] = set()
        self.came = 0

    @rule(start=st.integers(0, SIZE - 1), length=st.integers(1, SIZE))
    def read(self, start: int, length: int) -> None:
        self.readers.append(Demand(start, min(start + length, SIZE), self.now))

    @precondition(lambda self: self.readers)
    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        self.readers.pop(index % len(self.readers))

    @rule(seconds=st.floats(0.0, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.plan.wants_another(len(self.plan.attempts), self.now))
    @rule()
    def begin(self) -> None:
        found = self.plan.next(self.now)
        assert found is not None
        assert found.start < found.stop <= SIZE
        self.plan.begin(found, self.now)

    @precondition(lambda self: self.plan.attempts - self.answered)
    @rule(is_whole=st.sampled_from([False, False, False, True]), index=st.integers(0, 9))
    def answer(self, is_whole: bool, index: int) -> None:
        waiting = sorted(self.plan.attempts - self.answered, key=lambda each: each.claimed.start)
        attempt = waiting[index % len(waiting)]
        if is_whole:
            is_of_use = self.plan.answer(attempt, 0, SIZE, Got.WHOLE)
            assert self.plan.ranges is Ranges.NO
            assert is_of_use != any(other.is_whole for other in self.plan.attempts - {attempt})
        else:
            is_of_use = self.plan.answer(attempt, attempt.claimed.start, attempt.claimed.stop, Got.PART)
            assert is_of_use
        if is_of_use:
            self.answered.add(attempt)
        else:
            self.plan.end(attempt)

    @precondition(lambda self: self.plan.attempts & self.answered)
    @rule(count=st.integers(1, SIZE), index=st.integers(0, 9))
    def come(self, count: int, index: int) -> None:
        going = sorted(self.plan.attempts & self.answered, key=lambda each: each.claimed.start)
        attempt = going[index % len(going)]
        stop = min(attempt.position + count, self.plan.reach(attempt))
        came = stop - attempt.position
        while (gap := self.plan.unwritten(attempt.position, stop)) is not None:
            assert self.plan.assembly.next_free(*gap) in (None, gap) or attempt.is_whole
            self.plan.write(*gap)
            assert self.plan.unwritten(*gap) is None
            self.plan.assembly.add(*gap)
            self.plan.written(*gap)
        attempt.position = stop
        self.plan.come(attempt, came, self.now, near=False)
        self.came += came
        assert self.plan.heard == attempt.pace.heard == self.now
        if attempt.position == self.plan.reach(attempt):
            self.plan.end(attempt)

    @precondition(lambda self: self.plan.attempts)
    @rule(index=st.integers(0, 9))
    def fail(self, index: int) -> None:
        attempts = sorted(self.plan.attempts, key=lambda each: each.claimed.start)
        self.plan.end(attempts[index % len(attempts)])
        assert self.plan.fail(UpstreamUnreachable("reset"), self.now) == (self.now - self.plan.heard > GIVE_UP_S)

    @rule()
    def change_version(self) -> None:
        self.plan.restart()
        assert self.plan.next(self.now) is None
        for attempt in list(self.plan.attempts):
            self.plan.end(attempt)
        self.plan.assembly.begin_again()
        self.plan.is_held = False

    @invariant()
    def each_byte_is_claimed_once(self) -> None:
        present = self.plan.assembly.present
        missing = sum(
            gap[1] - gap[0]
            for attempt in self.plan.attempts
            for gap in present.missing(attempt.claimed.start, attempt.claimed.stop)
        )
        assert self.plan.assembly.unclaimed == SIZE - present.size - missing

    @invariant()
    def no_reader_is_forgotten(self) -> None:
        """What a reader waits for is claimed, or comes with the whole, or is asked for next."""
        for reader in self.readers:
            position = self.plan.assembly.first_missing(reader.position)
            if position < reader.stop and not any(
                attempt.claimed.start <= position < attempt.claimed.stop
                or (attempt.is_whole and attempt.position <= position)
                for attempt in self.plan.attempts
            ):
                is_served = any(attempt.is_whole for attempt in self.plan.attempts)
                assert is_served or self.plan.next(self.now) is not None

    @invariant()
    def bytes_are_counted_once(self) -> None:
        assert self.plan.fetched == self.came


TestPlans = Plans.TestCase


def test_a_source_that_may_not_know_range_gets_one_more_connection() -> None:
    """The first answer counts as a slice; what it is good for is known by the second."""
    plan = plan_of(is_pulled=True, is_wanted=True, size=4 * MAX_SLICE)
    first = plan.begin(plan.first_claim(0, 4 * MAX_SLICE, Got.UNASKED), NOW)
    assert plan.answer(first, 0, 4 * MAX_SLICE, Got.UNASKED)
    assert (plan.ranges, plan.reach(first)) == (Ranges.UNKNOWN, MAX_SLICE)
    assert plan.wants_another(0, NOW) and not plan.wants_another(1, NOW)
    second = plan.begin(Slice(MAX_SLICE, MAX_SLICE + MIN_SLICE), NOW)
    assert not plan.answer(second, 0, 4 * MAX_SLICE, Got.WHOLE)
    assert (plan.ranges, plan.reach(first)) == (Ranges.NO, 4 * MAX_SLICE)
    plan.end(second)
    assert plan.next(NOW) is None, "the first answer brings the rest"


def test_a_source_that_knows_range_after_all() -> None:
    """The first answer is let go behind its slice, and all connections go to work."""
    plan = plan_of(is_pulled=True, is_wanted=True, size=4 * MAX_SLICE)
    first = plan.begin(plan.first_claim(0, 4 * MAX_SLICE, Got.UNASKED), NOW)
    plan.answer(first, 0, 4 * MAX_SLICE, Got.UNASKED)
    second = plan.begin(Slice(MAX_SLICE, MAX_SLICE + MIN_SLICE), NOW)
    assert plan.answer(second, MAX_SLICE, MAX_SLICE + MIN_SLICE, Got.PART)
    assert (plan.ranges, plan.reach(first)) == (Ranges.YES, MAX_SLICE)
    assert plan.wants_another(CONNECTIONS - 1, NOW)


def test_who_trickles_is_overdue_for_those_who_wait_for_it() -> None:
    """And only for them; whoever brings what is usual is not."""
    plan = plan_of(size=64 * MIB)
    plan.show_rate("r2.example", 16 * MIB, 4.0, NOW)
    slow, quick = plan.begin(Slice(0, 8 * MIB), NOW), plan.begin(Slice(8 * MIB, 16 * MIB), NOW)
    for second in range(1, 5):
        plan.come(slow, 16 * KIB, NOW + second, near=False)
        plan.come(quick, 4 * MIB, NOW + second, near=False)
    later = NOW + 4
    assert plan.overdue(16 * KIB, later) == [slow]
    assert plan.overdue(9 * MIB, later) == []
    assert plan.overdue(20 * MIB, later) == []


def test_who_stalls_beside_others_is_overdue_sooner() -> None:
    """And sooner still than one whose response may yet begin; alone, each has the whole time."""
    plan = plan_of(size=64 * MIB)
    plan.show_start(0.9)
    lone, begun = plan.begin(Slice(0, 8 * MIB), NOW), plan.begin(Slice(8 * MIB, 16 * MIB), NOW)
    plan.come(begun, 16 * KIB, NOW, near=False)
    assert plan.overdue(8 * MIB + 16 * KIB, NOW + SILENT_S - 0.1) == [], "its own bytes do not count"
    quick = plan.begin(Slice(16 * MIB, 24 * MIB), NOW)
    for late, at, expected in ((begun, 9 * MIB, BESIDE_S), (lone, 0, 0.9 * LATE)):
        plan.come(quick, 64 * KIB, NOW + expected - 0.2, near=False)
        assert plan.overdue(at, NOW + expected - 0.1) == []
        assert plan.overdue(at, NOW + expected) == [late]
    # The source may need longer there: the next attempt gets the whole time.
    plan.give_up(lone)
    assert plan.overdue(0, NOW + 0.9 * LATE) == []


def test_who_brings_the_whole_is_overdue_for_all_of_it() -> None:
    """Where there is but one connection, it has every byte that is missing."""
    plan = plan_of(size=64 * MIB)
    only = plan.begin(Slice(8 * MIB, 16 * MIB), NOW)
    plan.answer(only, 0, 64 * MIB, Got.WHOLE)
    assert [plan.overdue(at * MIB, NOW + SILENT_S) for at in (0, 8, 63)] == [[only]] * 3


def test_who_is_held_back_by_the_limit_is_not_overdue() -> None:
    """The rate is ours, not the connection's."""
    plan = plan_of(rate=1 * MIB)
    only = plan.begin(Slice(0, MIN_SLICE), NOW)
    pause_s = plan.come(only, 16 * MIB, NOW, near=False)
    assert pause_s > SILENT_S
    assert plan.overdue(0, NOW + SILENT_S) == []
    assert plan.overdue(0, NOW + pause_s + SILENT_S) == [only]


def test_a_source_that_cannot_make_up_its_mind() -> None:
    """It is begun again so often, and no more."""
    plan = plan_of()
    assert [plan.restart() for _ in range(MAX_RESTARTS + 1)] == [True] * MAX_RESTARTS + [False]


@pytest.mark.parametrize(
    ("finish", "is_pulled", "is_wanted", "reads", "present", "is_whole"),
    [
        (Finish.AUTO, False, False, True, SIZE, False),
        (Finish.AUTO, True, False, True, 0, True),
        (Finish.AUTO, True, False, False, 0, False),
        (Finish.AUTO, True, False, False, SIZE // 2 + 1, True),
        (Finish.AUTO, True, True, False, 0, True),
        (Finish.NEVER, True, False, False, SIZE // 2 + 1, False),
        (Finish.NEVER, True, False, True, 0, True),
        (Finish.ALWAYS, True, False, False, 0, True),
        (Finish.ALWAYS, False, False, False, 0, False),
    ],
)
def test_what_is_fetched_that_no_reader_asks_for(
    finish: Finish, is_pulled: bool, is_wanted: bool, reads: bool, present: int, is_whole: bool
) -> None:
    """All of a blob that somebody pulls while it is read, or as the option says; nothing of one that is looked into."""
    assembly = Assembly(SIZE)
    assembly.add(0, present)
    readers = [Demand(0, 1, NOW)] if reads else []
    interest = Interest(readers, finish, is_wanted=is_wanted, is_pulled=is_pulled)
    assert interest.is_whole(assembly) == is_whole
