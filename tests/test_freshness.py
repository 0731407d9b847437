"""freshness: the decision table."""

import pytest

from pullthrough.freshness import Freshness, Stored, decide

NOW = 10_000.0


@pytest.mark.parametrize(
    ("confirmed", "down_until", "offline", "expected"),
    [
        pytest.param(None, 0, False, Freshness.FETCH, id="nothing stored"),
        pytest.param(None, NOW + 5, False, Freshness.FETCH, id="nothing stored, upstream down: ask all the same"),
        pytest.param(None, 0, True, Freshness.FETCH, id="nothing stored, offline: the client is told"),
        pytest.param(NOW, 0, False, Freshness.SERVE, id="just confirmed"),
        pytest.param(NOW - 299, 0, False, Freshness.SERVE, id="fresh"),
        pytest.param(NOW - 300, 0, False, Freshness.REVALIDATE, id="stale at its lifetime"),
        pytest.param(NOW - 300, NOW + 1, False, Freshness.SERVE_STALE, id="stale, upstream down"),
        pytest.param(NOW - 300, NOW, False, Freshness.REVALIDATE, id="upstream may be asked again"),
        pytest.param(NOW - 1e9, 0, True, Freshness.SERVE_STALE, id="however old when offline"),
        pytest.param(NOW + 50, 0, False, Freshness.REVALIDATE, id="confirmed in the future: the clock was set back"),
    ],
)
def test_decision(confirmed: float | None, down_until: float, offline: bool, expected: Freshness) -> None:
    """Serve, revalidate, fetch or serve stale."""
    stored = Stored(confirmed) if confirmed is not None else None
    assert decide(stored, now=NOW, lifetime_s=300, down_until=down_until, offline=offline) is expected
