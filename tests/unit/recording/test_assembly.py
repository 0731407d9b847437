"""assembly and slicing: against a set of offsets, with tiny geometry."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from pullthrough.core.intervals import Intervals
from pullthrough.recording import slicing
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.slicing import KIB, MAX_SLICE, MIB, MIN_SLICE, PROBE_SLICE, Demand, Slice, next_slice


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (-1, 2), (5, 17), (4, 2)])
def test_claims_lie_within_the_blob(start: int, stop: int) -> None:
    """A claim is a non-empty interval of the blob."""
    with pytest.raises(ValueError, match="expected a free interval"):
        Assembly(16).claim(start, stop)


def test_claims_are_exclusive() -> None:
    """What is present or claimed cannot be claimed again, until it is released."""
    assembly = Assembly(16)
    assembly.claim(4, 8)
    with pytest.raises(ValueError, match="got 6-10"):
        assembly.claim(6, 10)
    assembly.add(4, 6)
    assembly.release(4, 8)
    assembly.claim(6, 10)
    with pytest.raises(ValueError, match="got 5-6"):
        assembly.claim(5, 6)


def test_foreign_intervals_are_refused() -> None:
    """A journal that tells of bytes beyond the end is not believed."""
    with pytest.raises(ValueError, match="expected intervals within 0-16"):
        Assembly(16, Intervals([(8, 17)]))


class AgainstBytes(RuleBasedStateMachine):
    """Any order of claims, arrivals, failures and restarts assembles the blob, each byte fetched for good once."""

    claims = Bundle("claims")

    @initialize(blob=st.binary(min_size=1, max_size=48))
    def start(self, blob: bytes) -> None:
        self.blob = blob
        self.file = bytearray(len(blob))
        self.model: set[int] = set()
        self.claimed: set[int] = set()
        self.assembly = Assembly(len(blob))

    @rule(target=claims, start=st.integers(0, 47), size=st.integers(1, 16))
    def claim(self, start: int, size: int) -> tuple[int, int]:
        gap = self.assembly.next_free(start, len(self.blob))
        if gap is None:
            return (0, 0)
        taken = (gap[0], min(gap[0] + size, gap[1]))
        assert not set(range(*taken)) & (self.model | self.claimed)
        self.assembly.claim(*taken)
        self.claimed |= set(range(*taken))
        return taken

    @rule(taken=consumes(claims), arrived=st.integers(0, 16))
    def fetch(self, taken: tuple[int, int], arrived: int) -> None:
        """A fetch delivers some prefix of its claim, then ends."""
        stop = min(taken[0] + arrived, taken[1])
        if stop > taken[0]:
            self.file[taken[0] : stop] = self.blob[taken[0] : stop]
            self.assembly.add(taken[0], stop)
            self.model |= set(range(taken[0], stop))
        self.assembly.release(*taken)
        self.claimed -= set(range(*taken))

    @rule(count=st.integers(0, 16))
    def hash_on(self, count: int) -> None:
        self.assembly.hashed += min(count, self.assembly.frontier - self.assembly.hashed)

    @precondition(lambda self: not self.claimed)
    @rule()
    def reopen(self) -> None:
        self.assembly = Assembly(len(self.blob), Intervals(list(self.assembly.present)))

    @invariant()
    def holds(self) -> None:
        present = {offset for pair in self.assembly.present for offset in range(*pair)}
        assert present == self.model
        frontier = 0
        while frontier in self.model:
            frontier += 1
        assert self.assembly.frontier == frontier
        assert self.assembly.hashed <= frontier
        assert hashlib.sha256(self.file[:frontier]).digest() == hashlib.sha256(self.blob[:frontier]).digest()
        assert self.assembly.unclaimed == len(self.blob) - len(self.model | self.claimed)
        assert self.assembly.complete == (len(self.model) == len(self.blob))


TestAgainstBytes = AgainstBytes.TestCase


def ask(
    assembly: Assembly,
    *demands: Demand,
    rate: float | None = None,
    complete: bool = False,
    now: float = 100.0,
    connections: int = 1,
) -> Slice | None:
    return next_slice(assembly, demands, rate=rate, connections=connections, complete=complete, now=now)


def test_nobody_asks() -> None:
    """Without readers nothing is fetched, unless the blob is wanted whole."""
    assembly = Assembly(MIB)
    assert ask(assembly) is None
    assert ask(assembly, complete=True) == Slice(0, PROBE_SLICE)


def test_lowest_needed_byte_first() -> None:
    """The frontier follows: the reader at the front comes before one further on."""
    assembly = Assembly(64 * MIB)
    front, back = Demand(0, 8 * MIB, fed=100), Demand(32 * MIB, 40 * MIB, fed=100)
    assert ask(assembly, back, front) == Slice(0, PROBE_SLICE)
    assembly.claim(0, 8 * MIB)
    assert ask(assembly, back, front) == Slice(32 * MIB, 32 * MIB + PROBE_SLICE)


def test_a_starving_reader_comes_first() -> None:
    """Who has had no byte for long gets the next free connection, with a slice small enough to share."""
    assembly = Assembly(64 * MIB)
    front, back = Demand(0, 8 * MIB, fed=100), Demand(32 * MIB, 40 * MIB, fed=100 - slicing.STARVING_S)
    assert ask(assembly, front, back, rate=MIB) == Slice(32 * MIB, 33 * MIB)


def test_a_reader_with_bytes_does_not_starve() -> None:
    """A slow client whose next byte is present is fed by itself."""
    assembly = Assembly(64 * MIB)
    assembly.add(32 * MIB, 33 * MIB)
    front, slow = Demand(0, 8 * MIB, fed=100), Demand(32 * MIB, 40 * MIB, fed=0)
    assert ask(assembly, front, slow) == Slice(0, PROBE_SLICE)


@pytest.mark.parametrize(
    ("rate", "size"),
    [(1, MIN_SLICE), (100 * KIB, 128 * KIB), (10**7, MAX_SLICE), (10**12, MAX_SLICE)],
)
def test_slice_follows_the_rate(rate: float, size: int) -> None:
    """About two seconds of one connection, a power of two within bounds."""
    assert ask(Assembly(1 << 30), Demand(0, 1 << 30, fed=100), rate=rate) == Slice(0, size)


def test_the_rest_is_shared() -> None:
    """Towards the end no connection is left alone with a large slice."""
    assembly = Assembly(16 * MIB)
    assert ask(assembly, complete=True, rate=8 * MIB, connections=16) == Slice(0, MIB)


def test_unaligned_start_is_rounded_down_into_the_gap() -> None:
    """A part that starts anywhere leaves no crumbs in front of it, and nothing present is fetched again."""
    assembly = Assembly(16 * MIB)
    assert ask(assembly, Demand(MIB + 5, 2 * MIB, fed=100)) == Slice(MIB, MIB + PROBE_SLICE)
    assembly.add(MIB, MIB + 3)
    assert ask(assembly, Demand(MIB + 5, 2 * MIB, fed=100)) == Slice(MIB + 3, MIB + PROBE_SLICE)


@given(
    size=st.integers(1, 40 * MIN_SLICE),
    present=st.lists(st.tuples(st.integers(0, 40 * MIN_SLICE), st.integers(1, 4 * MIN_SLICE)), max_size=6),
    claims=st.lists(st.tuples(st.integers(0, 40 * MIN_SLICE), st.integers(1, 4 * MIN_SLICE)), max_size=6),
    demands=st.lists(
        st.tuples(st.integers(0, 40 * MIN_SLICE), st.integers(1, 8 * MIN_SLICE), st.floats(90, 100)), max_size=6
    ),
    rate=st.none() | st.floats(1, 1e9),
    complete=st.booleans(),
    connections=st.integers(1, 16),
)
def test_a_slice_is_always_free_and_wanted(
    size: int,
    present: list[tuple[int, int]],
    claims: list[tuple[int, int]],
    demands: list[tuple[int, int, float]],
    rate: float | None,
    complete: bool,
    connections: int,
) -> None:
    """Whatever the state: a slice can be claimed; None only when no wanted byte is free."""
    assembly = Assembly(size)
    for start, length in present:
        assembly.add(min(start, size), min(start + length, size))
    for start, length in claims:
        if gap := assembly.next_free(start, min(start + length, size)):
            assembly.claim(*gap)
    asked = [Demand(start, min(start + length, size), fed) for start, length, fed in demands if start < size]
    found = ask(assembly, *asked, rate=rate, complete=complete, connections=connections)
    wanted = any(assembly.next_free(demand.position, demand.stop) for demand in asked)
    if found is None:
        assert not wanted
        assert not (complete and assembly.unclaimed)
    else:
        assert found.stop - found.start <= MAX_SLICE
        assembly.claim(found.start, found.stop)


@given(size=st.integers(1, 300 * MIN_SLICE), rate=st.floats(1, 1e8), connections=st.integers(1, 16))
def test_slices_tile_the_blob(size: int, rate: float, connections: int) -> None:
    """Fetched one after the other, the slices are the blob: nothing twice, nothing left."""
    assembly = Assembly(size)
    while (taken := ask(assembly, complete=True, rate=rate, connections=connections)) is not None:
        assembly.claim(taken.start, taken.stop)
        assembly.add(taken.start, taken.stop)
    assert assembly.complete
