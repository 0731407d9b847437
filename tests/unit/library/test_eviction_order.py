"""eviction_order: what goes when room is needed, by tables and by any sequence of pulls."""

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.records import Name
from pullthrough.library.eviction_order import Holding, choose

SIZES: dict[Hashable, int] = {"a": 10, "b": 20, "c": 30, "shared": 100, "loose": 5}


def model(tag: str, parts: str, used: float, *, kept: bool = False) -> Holding:
    return Holding(Name("h", "r", tag), frozenset(parts.split()), used, kept)


OLD, MIDDLE, NEW = model("old", "a shared", 1), model("middle", "b shared", 2), model("new", "c", 3)
LOOSE = Holding(None, frozenset(["loose"]), 2.5)


@pytest.mark.parametrize(
    ("excess", "busy", "gone", "parts"),
    [
        pytest.param(0, "", "", "", id="no need"),
        pytest.param(10, "", "old", "a", id="the one not pulled for longest; what others need stays"),
        pytest.param(11, "", "middle", "b", id="the least that is enough"),
        pytest.param(31, "", "old middle", "a b shared", id="a shared blob goes with the last that needs it"),
        pytest.param(131, "", "old middle -", "a b shared loose", id="what no model lists counts as a model"),
        pytest.param(10, "a", "middle", "b", id="nothing in flight goes"),
        pytest.param(10, "shared", "new", "c", id="nor what belongs to it"),
        pytest.param(165, "", "old middle - new", "a b c shared loose", id="everything"),
    ],
)
def test_choice(excess: int, busy: str, gone: str, parts: str) -> None:
    """Least recently used first, whole models, no more than is needed."""
    choice = choose([NEW, OLD, LOOSE, MIDDLE], SIZES, excess=excess, busy=set(busy.split()))
    assert choice is not None
    assert [holding.name.reference if holding.name else "-" for holding in choice.holdings] == gone.split()
    assert choice.parts == frozenset(parts.split())
    assert choice.freed == sum(SIZES[part] for part in choice.parts)


@pytest.mark.parametrize(
    ("excess", "busy", "holdings"),
    [
        pytest.param(166, "", [NEW, OLD, LOOSE, MIDDLE], id="more than there is"),
        pytest.param(111, "c", [NEW, OLD], id="what is in flight does not count"),
        pytest.param(1, "", [model("pin", "a", 1, kept=True)], id="pinned"),
        pytest.param(100, "", [OLD, model("pin", "shared", 1, kept=True)], id="shared with a pinned one"),
        pytest.param(1, "", [], id="nothing there"),
    ],
)
def test_no_choice(excess: int, busy: str, holdings: list[Holding]) -> None:
    """What would not be enough is not begun."""
    assert choose(holdings, SIZES, excess=excess, busy=set(busy.split())) is None


PARTS = st.sampled_from("abcdefgh")
HOLDINGS = st.lists(
    st.builds(
        Holding,
        st.builds(Name, st.just("h"), st.just("r"), st.text("xyz", min_size=1, max_size=3)),
        st.frozensets(PARTS, max_size=4),
        st.floats(0, 100),
        st.booleans(),
    ),
    max_size=8,
)


@given(HOLDINGS, st.dictionaries(PARTS, st.integers(0, 50)), st.integers(0, 200), st.frozensets(PARTS, max_size=3))
def test_any_choice_is_sound(
    holdings: list[Holding], sizes: dict[Hashable, int], excess: int, busy: frozenset[str]
) -> None:
    """Enough goes, whole, nothing pinned, in flight or needed by what stays; none of it could have stayed."""
    choice = choose(holdings, sizes, excess=excess, busy=busy)
    may_go = [holding for holding in holdings if not holding.kept and holding.parts.isdisjoint(busy)]

    def freed_by(gone: list[Holding]) -> int:
        staying = list(holdings)
        for holding in gone:
            staying.remove(holding)
        needed = {part for holding in staying for part in holding.parts}
        return sum(sizes.get(part, 0) for part in {part for holding in gone for part in holding.parts} - needed)

    if choice is None:
        assert freed_by(may_go) < excess
        return
    gone = list(choice.holdings)
    assert all(holding in may_go for holding in gone)
    assert choice.freed == freed_by(gone) == sum(sizes.get(part, 0) for part in choice.parts) >= excess
    for holding in gone:
        rest = gone.copy()
        rest.remove(holding)
        assert freed_by(rest) < excess
