"""mismatches: what had another digest twice is not recorded a third time for ten minutes."""

from pullthrough.library.mismatches import MISMATCHES, PASSED_S, Mismatches


def test_two_mismatches() -> None:
    """The first is an accident; the second counts for ten minutes, and then all is forgotten."""
    mismatches = Mismatches()
    assert not mismatches.holds("a", now=0)
    for number in range(MISMATCHES):
        assert not mismatches.holds("a", now=number)
        mismatches.note("a", now=number)
    assert mismatches.holds("a", now=PASSED_S) and not mismatches.holds("b", now=PASSED_S)
    assert not mismatches.holds("a", now=MISMATCHES - 1 + PASSED_S)
    mismatches.note("a", now=2 * PASSED_S + 1)
    assert not mismatches.holds("a", now=2 * PASSED_S + 1)


def test_it_is_bounded() -> None:
    """The oldest are forgotten."""
    mismatches = Mismatches(limit=2)
    for blob in "aabbcc":
        mismatches.note(blob, now=0)
    assert [blob for blob in "abc" if mismatches.holds(blob, now=1)] == ["b", "c"]
