"""looplag: what holds the loop up is seen."""

import asyncio
import time

import pytest

from pullthrough import looplag
from pullthrough.looplag import LoopLag


def test_a_blocking_call_is_seen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worst sample, and in the log where it is gross."""
    monkeypatch.setattr(looplag, "ALARM_S", 0.2)

    async def main() -> LoopLag:
        lag = LoopLag()
        assert lag.quantiles(0.5, 0.99) == [0, 0]
        lag.open()
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 -- this is what is looked for
        await asyncio.sleep(0.01)
        lag.close()
        return lag

    lag = asyncio.run(main())
    assert lag.quantiles(1.0)[0] > 0.3
    assert "the event loop was held up for 0." in caplog.text
    assert str(lag).startswith("median ")
