"""redirect_failures: whoever comes back for the same part is not sent on again."""

from pullthrough.registry.redirect_failures import PARTS, RETURN_S, SETTLED_S, RedirectFailures


def test_other_parts_are_no_return() -> None:
    """Neither of this client, nor the same part of another one, nor the same part much later."""
    returns = RedirectFailures()
    assert [returns.permits("a", part, now=0.0) for part in (1, 2)] == [True, True]
    assert returns.permits("b", 1, now=0.0)
    assert returns.permits("a", 1, now=RETURN_S)


def test_a_return_settles_it_for_an_hour() -> None:
    """For all parts of the client, and nobody else's; then it is sent on again, the returned part too."""
    told: list[str] = []
    returns = RedirectFailures(told.append)
    assert returns.permits("a", 1, now=0.0)
    assert not returns.permits("a", 1, now=1.0)
    assert not returns.permits("a", 2, now=SETTLED_S)
    assert returns.permits("b", 1, now=2.0)
    assert told == ["a"]
    assert returns.permits("a", 1, now=1.0 + SETTLED_S)


def test_memory_is_bounded() -> None:
    """Of too many parts and of too many clients the oldest are forgotten."""
    returns = RedirectFailures(limit=2)
    assert all(returns.permits("a", part, now=0.0) for part in range(PARTS + 1))
    assert returns.permits("a", 0, now=1.0)
    assert not returns.permits("a", 5, now=1.0)
    for client in ("b", "c"):
        assert returns.permits(client, 0, now=2.0)
    assert returns.permits("a", 0, now=3.0)
