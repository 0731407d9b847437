"""Run equal work once: callers that come while it runs share its result.

Invariant: a caller that is cancelled does not affect the work, which is cancelled only when no caller waits any more.
Every outcome (value, error, cancellation) releases all waiting callers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable


class SingleFlight[K: Hashable, V]:
    """Concurrent calls collapsed by key."""

    def __init__(self) -> None:
        self._running: dict[K, tuple[asyncio.Task[V], list[None]]] = {}

    async def join(self, key: K, work: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """Return the result of `work` for `key`, and whether another caller had started it.

        Raises what the work raises.
        """
        entry = self._running.get(key)
        collapsed = entry is not None
        if entry is None:
            # mitmproxy's loop starts tasks eagerly: the work could even end before create_task returns. A callback
            # handles its end, because callbacks never run before this function has registered the task.
            task = asyncio.get_running_loop().create_task(self._run(work), name=f"collapsed {key}")
            entry = (task, [])
            if not task.done():
                self._running[key] = entry
                task.add_done_callback(lambda ended: self._forget(key, ended))
        task, waiters = entry
        waiters.append(None)
        try:
            return await asyncio.shield(task), collapsed
        finally:
            waiters.pop()
            if not waiters and not task.done():
                # Forgotten at once: no caller may join work that is being cancelled.
                self._forget(key, task)
                task.cancel()

    def _forget(self, key: K, task: asyncio.Task[V]) -> None:
        entry = self._running.get(key)
        if entry is not None and entry[0] is task:
            del self._running[key]

    @staticmethod
    async def _run(work: Callable[[], Awaitable[V]]) -> V:
        return await work()
