"""circuit_breaker: left alone after failures, tried again by one at a time."""

from hypothesis import given
from hypothesis import strategies as st

from pullthrough.fleet.circuit_breaker import FAILURES, PAUSE_LIMIT_S, PAUSE_S, TRIAL_S, CircuitBreaker


def broken(failures: int = FAILURES) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(failures):
        breaker.failed(0.0)
    return breaker


def test_single_failure_changes_nothing() -> None:
    """As long as it is not the last of FAILURES in a row."""
    breaker = broken(FAILURES - 1)
    assert breaker.permits(0.0)
    breaker.succeeded()
    breaker.failed(1.0)
    assert breaker.permits(1.0) and not breaker.is_open(1.0)


def test_open_then_tried_by_one() -> None:
    """Nobody within the pause; then one, and the next one only once that one has taken too long."""
    breaker = broken()
    assert [breaker.permits(now) for now in (0.0, PAUSE_S - 0.1)] == [False, False]
    assert [breaker.permits(PAUSE_S), breaker.permits(PAUSE_S + 0.1)] == [True, False]
    assert breaker.permits(PAUSE_S + TRIAL_S)


def test_success_closes() -> None:
    """At once, for all."""
    breaker = broken()
    assert breaker.permits(PAUSE_S)
    breaker.succeeded()
    assert breaker.permits(PAUSE_S) and breaker.permits(PAUSE_S) and not breaker.is_open(PAUSE_S)


@given(st.integers(FAILURES, 10_000))
def test_pause_is_bounded(failures: int) -> None:
    """However long it has failed, it is tried again within PAUSE_LIMIT_S."""
    breaker = broken(failures)
    assert breaker.is_open(PAUSE_S - 0.1) and breaker.permits(PAUSE_LIMIT_S)
