"""distrust: what had another digest twice is not recorded a third time for ten minutes."""

from pullthrough.library.distrust import MISMATCHES, PASSED_S, Distrust


def test_two_mismatches() -> None:
    """The first is an accident; the second counts for ten minutes, and then all is forgotten."""
    distrust = Distrust()
    assert not distrust.holds("a", now=0)
    for number in range(MISMATCHES):
        assert not distrust.holds("a", now=number)
        distrust.note("a", now=number)
    assert distrust.holds("a", now=PASSED_S) and not distrust.holds("b", now=PASSED_S)
    assert not distrust.holds("a", now=MISMATCHES - 1 + PASSED_S)
    distrust.note("a", now=2 * PASSED_S + 1)
    assert not distrust.holds("a", now=2 * PASSED_S + 1)


def test_it_is_bounded() -> None:
    """The oldest are forgotten."""
    distrust = Distrust(limit=2)
    for blob in "aabbcc":
        distrust.note(blob, now=0)
    assert [blob for blob in "abc" if distrust.holds(blob, now=1)] == ["b", "c"]
