"""loop_lag: what holds the loop up is seen."""

import asyncio
import time

import pytest

from pullthrough.runtime import clock, loop_lag
from pullthrough.runtime.loop_lag import LoopLag


def test_a_blocking_call_is_seen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worst sample, and in the log where it is gross."""
    monkeypatch.setattr(loop_lag, "ALARM_S", 0.2)

    async def main() -> LoopLag:
        lag = LoopLag()
        assert lag.quantiles(0.5, 0.99) == [0, 0]
        lag.open()
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 -- this is what is looked for
        await asyncio.sleep(0.01)
        await lag.close()
        return lag

    lag = asyncio.run(main())
    assert lag.quantiles(1.0)[0] > 0.3
    assert "the event loop was held up for 0." in caplog.text
    assert str(lag).startswith("median ")


def test_what_was_not_run_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that was set before the process stood still is not due at once when it goes on."""
    monkeypatch.setattr(clock, "LONGEST_S", 0.3)

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        lag = LoopLag()
        lag.open()
        await asyncio.sleep(0.1)
        began = loop.time()
        fired = loop.create_future()
        loop.call_later(0.6, fired.set_result, None)
        time.sleep(1.0)  # noqa: ASYNC251 -- as SIGSTOP does it
        await asyncio.sleep(0.05)
        assert not fired.done()
        await fired
        spent = loop.time() - began
        await lag.close()
        return spent, loop.time() - time.monotonic()

    spent, difference = asyncio.run(main())
    assert 0.55 < spent < 0.9
    assert abs(difference) < 0.1
