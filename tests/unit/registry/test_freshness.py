"""freshness: the decision tables."""

import pytest

from pullthrough.config.settings import Withdrawn
from pullthrough.core.records import Version
from pullthrough.registry.freshness import Freshness, Heard, Stored, Verdict, conclude, decide

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


@pytest.mark.parametrize(
    ("oldest", "version", "expected"),
    [
        pytest.param((0, 5, 7), (0, 5, 7), Freshness.SERVE, id="granted to this one"),
        pytest.param((0, 5, 7), (0, 34, 0), Freshness.SERVE, id="a newer one"),
        pytest.param((0, 5, 7), (0, 5, 6), Freshness.FETCH, id="an older one may be refused"),
        pytest.param((0, 10, 0), (0, 9, 9), Freshness.FETCH, id="numbers, not text"),
        pytest.param(None, (0, 34, 0), Freshness.FETCH, id="granted to no Ollama so far"),
        pytest.param((0, 5, 7), None, Freshness.SERVE, id="no Ollama is not gated"),
        pytest.param(None, None, Freshness.SERVE, id="neither"),
    ],
)
def test_version_gate(oldest: Version | None, version: Version | None, expected: Freshness) -> None:
    """A client older than any that upstream has granted the manifest to asks upstream itself; offline it is served."""
    stored = Stored(NOW, oldest)
    assert decide(stored, now=NOW, lifetime_s=300, down_until=0, offline=False, version=version) is expected
    for offline, down_until in ((True, 0.0), (False, NOW + 1)):
        served = decide(stored, now=NOW, lifetime_s=300, down_until=down_until, offline=offline, version=version)
        assert served is (Freshness.SERVE if expected is Freshness.SERVE else Freshness.SERVE_STALE)


@pytest.mark.parametrize(
    ("heard", "nothing_stored", "serving_withdrawn", "dropping_withdrawn"),
    [
        (Heard.NOTHING, Verdict.FAIL, Verdict.SERVE_STALE, Verdict.SERVE_STALE),
        (Heard.MANIFEST, Verdict.ADOPT, Verdict.ADOPT, Verdict.ADOPT),
        (Heard.SOMETHING, Verdict.RELAY, Verdict.SERVE_STALE, Verdict.SERVE_STALE),
        (Heard.GONE, Verdict.RELAY, Verdict.SERVE_STALE, Verdict.RELAY_AND_DROP),
        (Heard.DENIED, Verdict.RELAY_AND_DENY, Verdict.RELAY_AND_DENY, Verdict.RELAY_AND_DENY),
        (Heard.FAILING, Verdict.RELAY, Verdict.SERVE_STALE, Verdict.SERVE_STALE),
        (Heard.REFUSED, Verdict.RELAY, Verdict.RELAY, Verdict.RELAY),
    ],
)
def test_conclusion(
    heard: Heard, nothing_stored: Verdict, serving_withdrawn: Verdict, dropping_withdrawn: Verdict
) -> None:
    """Every answer of upstream: with nothing stored, with a copy, and with a copy where 404 means to forget it."""
    assert conclude(heard, stored=False, withdrawn=Withdrawn.SERVE) is nothing_stored
    assert conclude(heard, stored=False, withdrawn=Withdrawn.DROP) is nothing_stored
    assert conclude(heard, stored=True, withdrawn=Withdrawn.SERVE) is serving_withdrawn
    assert conclude(heard, stored=True, withdrawn=Withdrawn.DROP) is dropping_withdrawn
