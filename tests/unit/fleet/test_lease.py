"""lease: who fetches, decided by whoever creates a number first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.fleet.lease import LIFETIME_S, Lease, Step, decide

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("node", "expires", "deposed", "step"),
    [
        pytest.param("me", NOW - 60, (), Step.HOLD, id="ours-however-old"),
        pytest.param("you", NOW + 5, (), Step.FOLLOW, id="another's"),
        pytest.param("you", NOW, (), Step.NEXT, id="expired"),
        pytest.param("you", NOW + 5, ("you",), Step.NEXT, id="has-failed-us"),
        pytest.param("you", NOW + 5, ("they",), Step.FOLLOW, id="another-has-failed-us"),
        pytest.param("you", NOW + 2 * LIFETIME_S, (), Step.FOLLOW, id="clock-ahead"),
        pytest.param("you", NOW + 86400, (), Step.NEXT, id="clock-a-day-ahead"),
    ],
)
def test_what_a_lease_means(node: str, expires: float, deposed: tuple[str, ...], step: Step) -> None:
    """One row each."""
    assert decide(Lease(node, "http://10.0.0.1:9200", expires), node="me", deposed=deposed, now=NOW) is step


def test_unreadable_lease_is_passed_over() -> None:
    """One that was forged or has just been taken away holds nobody up."""
    assert decide(None, node="me", deposed=(), now=NOW) is Step.NEXT


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.sets(st.sampled_from("abcd")))
def test_one_fetches_of_those_alive(callers: list[str], dead: set[str]) -> None:
    """Whoever asks in whatever order: caches that live end at one holder, once the dead ones have failed them."""
    leases = [Lease(name, "", NOW + LIFETIME_S) for name in sorted(dead)]
    holders = set()
    for caller in callers:
        if caller in dead:
            continue
        for number in range(len(leases) + 1):
            if number == len(leases):
                leases.append(Lease(caller, "", NOW + LIFETIME_S))
            step = decide(leases[number], node=caller, deposed=dead, now=NOW)
            if step is not Step.NEXT:
                holders.add(leases[number].node)
                break
    assert len(holders) == (1 if set(callers) - dead else 0)
