"""clock: what counts as time, and what does not."""

import asyncio
import time

import pytest

from pullthrough.runtime import clock
from pullthrough.runtime.clock import LONGEST_S, Epoch, RunningTime, lasting, steady


def test_unseen_time_does_not_count() -> None:
    """What passes in small steps counts, a gap does not; the clock never goes back."""
    now = 100.0
    running = RunningTime(lambda: now)
    assert running() == 100
    for now in (101.0, 102.5, 102.5 + LONGEST_S):
        assert running() == now
    before = running()
    now += 3600
    assert running() == before
    now += 1
    assert running() == before + 1


def test_setting_the_clock_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we have signed is good for as long as it says, whatever somebody does to the machine's clock."""
    told = lasting()
    assert abs(told - time.time()) < 60
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= lasting() - told < 60


def test_sleep_counts_where_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the boot clock; without one, by the monotonic one."""
    began = clock.since_boot()
    if hasattr(time, "CLOCK_BOOTTIME"):
        monkeypatch.setattr(time, "clock_gettime", lambda _: began + 8 * 3600)
        assert clock.since_boot() - began == pytest.approx(8 * 3600)
        monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert abs(clock.since_boot() - time.monotonic()) < 1


def test_silence_is_measured_by_the_loop() -> None:
    """So that there is one clock for it."""

    async def main() -> bool:
        return abs(steady() - asyncio.get_running_loop().time()) < 1

    assert asyncio.run(main())


def test_epochs() -> None:
    """What was learnt in a moment counts until the next change of that key, and of no other."""
    epoch, other = Epoch(), Epoch()
    first = epoch.now("a")
    assert first == epoch.now("a") and not first.is_over
    assert first not in (epoch.now("b"), other.now("a"))
    epoch.advance("b")
    other.advance("a")
    assert not first.is_over
    epoch.advance("a")
    assert first.is_over and first != epoch.now("a")
    assert not epoch.now("a").is_over
    assert (first.count, epoch.now("a").count, epoch.now().count) == (0, 1, 0)
