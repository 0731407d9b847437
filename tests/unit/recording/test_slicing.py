"""slicing: which slice comes next; single rules, then whole downloads with any readers, connections and failures.

test_assembly.py has the rules for one reader and for a blob that is wanted whole.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.recording.assembly import Assembly
from pullthrough.recording.slicing import (
    ALONE_SLICE_S,
    FIRST_SLICE,
    LEAST_SLICE_S,
    MAX_SLICE,
    MIB,
    MIN_SLICE,
    PROBE_SLICE,
    SHARED_SLICE_S,
    STARVING_S,
    Demand,
    Slice,
    first_slice,
    next_slice,
)

NOW = 1000.0
FED = NOW
STARVING = NOW - STARVING_S
PLENTY = 1 << 30  # a blob so large that sharing out the rest plays no part


def ask(
    assembly: Assembly,
    *demands: Demand,
    rate: float | None = None,
    connections: int = 1,
    complete: bool = False,
    now: float = NOW,
) -> Slice | None:
    return next_slice(assembly, demands, rate=rate, connections=connections, complete=complete, now=now)


# --- which byte


def test_the_longest_starving_comes_first() -> None:
    """Of two that starve, the one that has waited longer, wherever it reads."""
    demands = [Demand(8 * MIB, 9 * MIB, STARVING), Demand(32 * MIB, 33 * MIB, STARVING - 1), Demand(0, MIB, FED)]
    found = ask(Assembly(64 * MIB), *demands)
    assert found is not None
    assert found.start == 32 * MIB


def test_nobody_starves_before_the_time() -> None:
    """A moment short of it the front still comes first."""
    demands = [Demand(0, MIB, FED), Demand(32 * MIB, 33 * MIB, STARVING + 0.01)]
    found = ask(Assembly(64 * MIB), *demands)
    assert found is not None
    assert found.start == 0


def test_who_is_being_fetched_for_does_not_starve() -> None:
    """Its bytes are on the way: another connection for it would not bring them sooner."""
    assembly = Assembly(64 * MIB)
    assembly.claim(32 * MIB, 33 * MIB)
    found = ask(assembly, Demand(0, MIB, FED), Demand(32 * MIB, 40 * MIB, STARVING))
    assert found is not None
    assert found.start == 0


@pytest.mark.parametrize(
    "demand",
    [
        pytest.param(Demand(4, 4, STARVING), id="it needs no more"),
        pytest.param(Demand(0, 8, STARVING), id="all of it is present"),
        pytest.param(Demand(8, 16, STARVING), id="all of it is on the way"),
        pytest.param(Demand(4, 16, STARVING), id="the one and the other"),
    ],
)
def test_a_reader_that_lacks_nothing_asks_for_nothing(demand: Demand) -> None:
    """However long ago its last byte was: that is its client's doing."""
    assembly = Assembly(64)
    assembly.add(0, 8)
    assembly.claim(8, 16)
    assert ask(assembly, demand) is None
    assert ask(assembly, demand, Demand(20, 21, FED)) == Slice(16, 64)


def test_a_reader_is_fed_to_its_stop() -> None:
    """What a reader will not need is not fetched for it, but for the rest of an aligned slice."""
    assembly = Assembly(64 * MIB)
    demand = Demand(MIB, 2 * MIB, FED)
    fetched = []
    while (found := ask(assembly, demand)) is not None:
        assembly.claim(found.start, found.stop)
        fetched.append((found.start, found.stop))
    assert fetched == list(itertools.pairwise(range(MIB, 2 * MIB + 1, PROBE_SLICE)))


def test_readers_come_before_completion() -> None:
    """A blob that is wanted whole is fetched from where somebody reads, and from its start when nobody does."""
    assembly = Assembly(64 * MIB)
    demand = Demand(32 * MIB, 33 * MIB, FED)
    found = ask(assembly, demand, complete=True)
    assert found is not None
    assert found.start == 32 * MIB
    assembly.add(32 * MIB, 33 * MIB)
    assert ask(assembly, demand, complete=True) == Slice(0, PROBE_SLICE)


# --- how much


@pytest.mark.parametrize(
    ("waiting", "starving", "seconds"),
    [
        pytest.param(1, 0, ALONE_SLICE_S, id="one reader"),
        pytest.param(2, 0, SHARED_SLICE_S, id="two readers"),
        pytest.param(16, 0, SHARED_SLICE_S, id="sixteen readers"),
        pytest.param(1, 1, ALONE_SLICE_S, id="one reader, starving"),
        pytest.param(4, 1, ALONE_SLICE_S / 4, id="one of four starves"),
        pytest.param(16, 16, ALONE_SLICE_S / 16, id="sixteen starve"),
    ],
)
def test_a_slice_is_smaller_when_others_wait(waiting: int, starving: int, seconds: float) -> None:
    """A connection is busy with one slice no longer than those who wait for it can bear."""
    demands = [Demand(n * 32 * MIB, (n + 1) * 32 * MIB, STARVING if n < starving else FED) for n in range(waiting)]
    rate = 2.5 * MIB
    found = ask(Assembly(PLENTY), *demands, rate=rate)
    assert found is not None
    size = found.stop - found.start
    assert size <= rate * seconds < 2 * size


@pytest.mark.parametrize(
    ("unclaimed", "connections", "size"),
    [
        pytest.param(64 * MIB, 4, MAX_SLICE, id="plenty"),
        pytest.param(16 * MIB, 4, 4 * MIB, id="a fair share"),
        pytest.param(16 * MIB, 5, 2 * MIB, id="a fair share, a power of two"),
        pytest.param(MIB, 16, MIN_SLICE, id="never less than the least"),
    ],
)
def test_a_fair_share_of_the_rest(unclaimed: int, connections: int, size: int) -> None:
    """The rest is what is neither present nor being fetched, not the blob."""
    assembly = Assembly(256 * MIB)
    assembly.add(0, 128 * MIB)
    assembly.claim(128 * MIB, 256 * MIB - unclaimed)
    found = ask(assembly, Demand(0, 256 * MIB, FED), rate=8 * MIB, connections=connections)
    least = MIB  # 0.1 s of the rate, rounded up
    assert found == Slice(256 * MIB - unclaimed, 256 * MIB - unclaimed + min(unclaimed, max(size, least)))


@pytest.mark.parametrize(
    ("size", "rate", "slices"),
    [
        pytest.param(4 * MIB, 40 * MIB, 1, id="one slice takes 0.1 s"),
        pytest.param(4 * MIB, 20 * MIB, 2, id="two do"),
        pytest.param(4 * MIB, 2.0 * MIB, 16, id="a slow line is shared"),
    ],
)
def test_small_blobs_are_few_slices(size: int, rate: float | None, slices: int) -> None:
    """A slice that takes less than LEAST_SLICE_S is not worth a request."""
    assembly = Assembly(size)
    count = 0
    while (found := ask(assembly, Demand(0, size, FED), rate=rate, connections=16, complete=True)) is not None:
        assembly.claim(found.start, found.stop)
        count += 1
    assert count == slices


@pytest.mark.parametrize(
    ("rate", "wanted", "size"),
    [
        pytest.param(None, 1 << 62, FIRST_SLICE, id="nothing is known of the line"),
        pytest.param(1e9, 1, FIRST_SLICE, id="only a look"),
        pytest.param(1e9, 4 * MIB - 1, 4 * MIB, id="a small blob, up to the grid"),
        pytest.param(1e9, 1 << 62, MAX_SLICE, id="all of it"),
        pytest.param(10 * MIB, 1 << 62, MIB, id="as much as comes in LEAST_SLICE_S"),
    ],
)
def test_the_first_slice(rate: float | None, wanted: int, size: int) -> None:
    """It is as large as the line and the first reader allow, and never smaller than FIRST_SLICE."""
    assert first_slice(rate, wanted) == size
    assert rate is None or size in (FIRST_SLICE, MAX_SLICE) or size >= min(wanted, rate * LEAST_SLICE_S)


def test_a_starving_reader_does_not_share() -> None:
    """Its slice is as large as the rate allows, however many connections there are."""
    found = ask(Assembly(16 * MIB), Demand(0, MIB, STARVING), rate=1e9, connections=16, complete=True)
    assert found == Slice(0, MAX_SLICE)


@pytest.mark.parametrize("fed", [FED, STARVING])
def test_nothing_is_fetched_past_readers_of_a_blob_that_is_not_pulled(fed: float) -> None:
    """But for the rest of the grid."""
    for stop, expected in ((MIB, MIB), (MIB - 1, MIB), (MIB + 1, MIB + MIN_SLICE)):
        found = ask(Assembly(16 * MIB), Demand(0, stop, fed), rate=1e9)
        assert found == Slice(0, expected)


def test_without_a_rate() -> None:
    """The first slices of a recording are small enough to learn the rate from."""
    assert ask(Assembly(PLENTY), Demand(0, PLENTY, FED)) == Slice(0, PROBE_SLICE)
    assert ask(Assembly(PLENTY), Demand(0, PLENTY, STARVING)) == Slice(0, PROBE_SLICE)


@given(
    position=st.integers(0, 40 * MIN_SLICE),
    rate=st.none() | st.floats(0, 1e12),
    starving=st.booleans(),
    connections=st.integers(1, 64),
)
def test_bounds_of_a_slice(position: int, rate: float | None, starving: bool, connections: int) -> None:
    """In a blob with nothing in it: aligned at both ends, around the byte, and within the bounds of sizes."""
    found = ask(
        Assembly(PLENTY), Demand(position, PLENTY, STARVING if starving else FED), rate=rate, connections=connections
    )
    assert found is not None
    assert found.start == position - position % MIN_SLICE
    assert found.stop % MIN_SLICE == 0
    assert MIN_SLICE <= found.stop - found.start <= MAX_SLICE


# --- whole downloads


@dataclass
class Reader:
    """Takes what is present, as fast as its client does."""

    position: int
    stop: int
    fed: float

    @property
    def demand(self) -> Demand:
        return Demand(self.position, self.stop, self.fed)

    def read(self, assembly: Assembly, chance: Random, now: float) -> None:
        ready = min(self.stop, assembly.first_missing(self.position))
        if ready > self.position:
            self.position, self.fed = chance.randint(self.position + 1, ready), now


def is_free(assembly: Assembly, offset: int) -> bool:
    return assembly.next_free(offset, offset + 1) is not None


def first_choice(assembly: Assembly, demands: Sequence[Demand], *, complete: bool, now: float) -> int | None:
    """The byte that the next slice is about, told anew."""
    starving = [
        (each.fed, each.position)
        for each in demands
        if each.position < each.stop and is_free(assembly, each.position) and now - each.fed >= STARVING_S
    ]
    if starving:
        return min(starving)[1]
    gaps = [gap[0] for each in demands if (gap := assembly.next_free(each.position, each.stop)) is not None]
    if not gaps and complete and (gap := assembly.next_free(0, assembly.size)) is not None:
        gaps.append(gap[0])
    return min(gaps, default=None)


@given(
    size=st.integers(1, 24 * MIN_SLICE),
    parts=st.lists(st.tuples(st.integers(0, 24 * MIN_SLICE), st.integers(1, 12 * MIN_SLICE)), max_size=4),
    connections=st.integers(1, 4),
    rate=st.none() | st.floats(1, 1e6),
    complete=st.booleans(),
    chance=st.randoms(use_true_random=False),
)
def test_every_wanted_byte_arrives_once(
    size: int, parts: list[tuple[int, int]], connections: int, rate: float | None, complete: bool, chance: Random
) -> None:
    """Slices that arrive whole, in part or not at all, in any order: the right one is next, and nothing comes twice."""
    assembly = Assembly(size)
    intervals = [(min(start, size), min(start + length, size)) for start, length in parts]
    readers = [Reader(start, stop, NOW) for start, stop in intervals]
    running: list[Slice] = []
    now, received, failures = NOW, 0, 20
    while True:
        demands = [reader.demand for reader in readers]
        found = ask(assembly, *demands, rate=rate, connections=connections, complete=complete, now=now)
        chosen = first_choice(assembly, demands, complete=complete, now=now)
        assert (found is None) == (chosen is None)
        if found is not None:
            assert chosen is not None
            assert found.start <= chosen < found.stop <= found.start + MAX_SLICE
            assert all(found.stop <= other.start or other.stop <= found.start for other in running)
            assert not assembly.present.within(found.start, found.stop)
            # No crumbs: a slice begins and ends at the grid, or where somebody else's bytes do.
            assert found.start % MIN_SLICE == 0 or not is_free(assembly, found.start - 1)
            assert found.stop % MIN_SLICE == 0 or found.stop == size or not is_free(assembly, found.stop)
            if len(running) < connections:
                assembly.claim(found.start, found.stop)
                running.append(found)
                continue
        if not running:
            break
        ended = running.pop(chance.randrange(len(running)))
        arrived = ended.stop
        if failures and chance.random() < 0.5:
            failures -= 1
            arrived = chance.randint(ended.start, ended.stop)
        assembly.add(ended.start, arrived)
        assembly.release(ended.start, ended.stop)
        received += arrived - ended.start
        now += chance.uniform(0, STARVING_S)
        for reader in chance.sample(readers, chance.randint(0, len(readers))):
            reader.read(assembly, chance, now)
    assert received == assembly.present.size
    assert all(assembly.present.covers(start, stop) for start, stop in intervals)
    assert assembly.complete or not complete
