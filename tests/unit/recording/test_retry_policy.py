"""retry_policy: when to give up, how soon to try again, and which connection counts as silent."""

import pytest

from pullthrough.core.errors import UnexpectedResponse, UpstreamRefused, UpstreamUnreachable
from pullthrough.recording.retry_policy import (
    BACKOFF_LIMIT_S,
    BESIDE_S,
    GIVE_UP_S,
    LATE,
    MAX_UNEXPECTED,
    RATE_LASTS_S,
    RETRY_AFTER_LIMIT_S,
    SILENT_S,
    Pace,
    Patience,
    Rates,
    backoff_s,
    beside_s,
)

NOW = 1000.0
RESET = UpstreamUnreachable("reset")
MB = 1_000_000


def test_given_up_after_a_silence_and_not_after_failures() -> None:
    """Any number of failures is borne while bytes come."""
    patience = Patience(NOW)
    assert not any(patience.fail(RESET, NOW + GIVE_UP_S) for _ in range(100))
    patience.hear(NOW + GIVE_UP_S)
    assert not patience.fail(RESET, NOW + 2 * GIVE_UP_S)
    assert patience.fail(RESET, NOW + 2 * GIVE_UP_S + 1)


def test_who_lies_is_given_up_sooner() -> None:
    """After so many wrong answers in a row; a byte between them begins the count anew."""
    patience = Patience(NOW)
    lie = UnexpectedResponse("lie")
    assert not any(patience.fail(lie, NOW) for _ in range(MAX_UNEXPECTED))
    patience.hear(NOW)
    assert not any(patience.fail(lie, NOW) for _ in range(MAX_UNEXPECTED))
    assert patience.fail(lie, NOW)


@pytest.mark.parametrize(("wish", "granted"), [("", 0.0), ("3", 3.0), ("3600", RETRY_AFTER_LIMIT_S)])
def test_upstream_is_left_alone_as_long_as_it_wishes(wish: str, granted: float) -> None:
    """Within bounds: clients wait."""
    patience = Patience(NOW)
    patience.fail(UpstreamRefused(429, [("Retry-After", wish)]), NOW)
    assert patience.quiet_s(NOW) == granted
    assert patience.quiet_s(NOW + granted) == 0


def test_back_off_doubles_up_to_a_limit() -> None:
    """However often it failed."""
    assert [backoff_s(tries) for tries in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.8]
    assert backoff_s(10_000) == BACKOFF_LIMIT_S


def test_failures_make_patient() -> None:
    """The line may be slow: up to eightfold; a byte ends that."""
    patience = Patience(NOW)
    for expected in (1, 2, 4, 8, 8):
        assert patience.silent_s == expected * SILENT_S
        patience.fail(RESET, NOW)
    patience.hear(NOW)
    assert patience.silent_s == SILENT_S


def test_less_patience_beside_others() -> None:
    """A response may take longer to begin, if the source's usually do."""
    for start_s, expected in ((0.0, BESIDE_S), (BESIDE_S / LATE, BESIDE_S), (0.9, 0.9 * LATE), (60.0, SILENT_S)):
        assert beside_s(start_s) == expected


def test_the_time_before_the_first_byte_is_no_rate() -> None:
    """A connection that took long to begin is not slow by that."""
    pace = Pace(NOW - 2.0)
    pace.bring(256 << 10, NOW)
    assert not pace.is_silent(4 * MB, BESIDE_S, NOW + 0.1)
    assert pace.is_silent(4 * MB, BESIDE_S, NOW + BESIDE_S)


# --- one connection


def steady(rate: float, seconds: float) -> Pace:
    """A connection that has brought so many bytes a second up to NOW."""
    pace = Pace(NOW - seconds)
    for step in range(1, int(seconds * 10) + 1):
        pace.bring(round(rate / 10), NOW - seconds + step / 10)
    return pace


@pytest.mark.parametrize(
    ("rate", "usual", "is_silent"),
    [
        pytest.param(16_000, 4 * MB, True, id="a trickle among fast ones"),
        pytest.param(16_000, 250_000, True, id="a trickle on a slow line"),
        pytest.param(16_000, 20_000, False, id="as slow as the others"),
        pytest.param(16_000, None, False, id="nothing is known of the others"),
        pytest.param(MB, 4 * MB, False, id="slower, but not far below"),
    ],
)
def test_who_trickles_is_silent(rate: float, usual: float | None, is_silent: bool) -> None:
    """What counts is what connections usually deliver."""
    assert steady(rate, 10.0).is_silent(usual, SILENT_S, NOW) == is_silent


def test_what_was_fast_before_does_not_count() -> None:
    """A connection that begins to trickle is silent SILENT_S later."""
    pace = steady(4 * MB, 10.0)
    for step in range(1, 31):
        assert not pace.is_silent(4 * MB, SILENT_S, NOW + step / 10 - 0.5)
        pace.bring(1600, NOW + step / 10)
    pace.bring(1600, NOW + 3.4)
    assert pace.is_silent(4 * MB, SILENT_S, NOW + 3.5)


def test_nobody_is_judged_by_less_than_the_time() -> None:
    """A connection that has just begun has had no chance yet."""
    assert not steady(16_000, SILENT_S - 0.1).is_silent(4 * MB, SILENT_S, NOW)
    assert not steady(16_000, SILENT_S + 0.1).is_silent(4 * MB, 2 * SILENT_S, NOW)


def test_who_brings_nothing_is_silent_whatever_is_usual() -> None:
    """As it has always been."""
    pace = Pace(NOW)
    assert not pace.is_silent(None, SILENT_S, NOW + SILENT_S - 0.1)
    assert pace.is_silent(None, SILENT_S, NOW + SILENT_S)


def test_who_is_held_back_is_not_silent() -> None:
    """The time in which nothing was read from it does not count."""
    pace = steady(4 * MB, 10.0)
    pace.hold_back(NOW + 60)
    assert not pace.is_silent(4 * MB, SILENT_S, NOW + 60 + SILENT_S - 0.1)
    assert pace.is_silent(4 * MB, SILENT_S, NOW + 60 + SILENT_S)


def test_memory_of_a_pace_is_bounded() -> None:
    """However long it lasts."""
    assert len(steady(MB, 600.0)._marks) < 200


# --- hosts


def test_a_host_is_as_fast_as_it_was_lately() -> None:
    """A mean of what its connections have shown, each host by itself, and nothing once that is long ago."""
    rates = Rates()
    assert rates.of("a.example", NOW) is None
    rates.show("a.example", 10.0, NOW)
    rates.show("a.example", 20.0, NOW + 1)
    assert rates.of("a.example", NOW + 1) == pytest.approx(13.0)
    assert rates.of("b.example", NOW + 1) is None
    assert rates.of("a.example", NOW + 1 + RATE_LASTS_S) is None
    rates.show("b.example", 1.0, NOW + 1 + RATE_LASTS_S)
    assert list(rates._shown) == ["b.example"]
