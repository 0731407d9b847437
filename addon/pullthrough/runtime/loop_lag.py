"""How late the event loop is: everything else waits at least as long, and for that long nobody was silent.

While it looks, the loop's own clock leaves out what the process has not run (`clock`). Invariant: looking costs one
short timer, whatever runs.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Final

from pullthrough.core.access_log import SHOWN
from pullthrough.runtime.clock import RunningTime

_log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.05
SAMPLES: Final = 12_000
"""Ten minutes."""

ALARM_S: Final = 1.0
"""Clients of v0.1.23-v0.5.7 give a part up after 5 s without a byte; long before that an operator should know."""


class LoopLag:
    """Samples of the last ten minutes, in seconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        loop = asyncio.get_running_loop()
        # An instance's attribute stands before the method of its class.
        vars(loop)["time"] = RunningTime()
        self._task = loop.create_task(self._watch(), name="loop lag")

    async def close(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            vars(task.get_loop()).pop("time", None)
            await asyncio.wait([task])
            _log.debug("event loop lag: %s", self)

    def quantiles(self, *parts: float) -> list[float]:
        """Return the lags that these parts of the samples do not exceed; 0 where there are none."""
        ordered = sorted(self._samples) or [0.0]
        return [ordered[min(len(ordered) - 1, int(len(ordered) * part))] for part in parts]

    def __str__(self) -> str:
        median, late, worst = (1000 * seconds for seconds in self.quantiles(0.5, 0.99, 1.0))
        return f"median {median:.1f} ms, p99 {late:.1f} ms, worst {worst:.1f} ms"

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            lag = max(0.0, time.monotonic() - due)
            self._samples.append(lag)
            if lag > ALARM_S:
                _log.warning("the event loop was held up for %.1f s", lag, extra=SHOWN)
