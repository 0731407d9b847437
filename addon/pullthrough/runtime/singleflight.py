"""Run equal work once: whoever asks while it runs gets the same result.

Invariant: a follower's cancellation never touches the work; the work is cancelled only when nobody waits any more;
every exit (value, error, cancellation) releases all who wait.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable


class SingleFlight[K: Hashable, V]:
    """Collapses concurrent calls by key."""

    def __init__(self) -> None:
        self._running: dict[K, tuple[asyncio.Task[V], list[None]]] = {}

    async def join(self, key: K, work: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """(result, collapsed): the result of `work` for `key`, and whether another caller had started it.

        Raises what the work raises.
        """
        entry = self._running.get(key)
        collapsed = entry is not None
        if entry is None:
            # mitmproxy's loop starts tasks eagerly: the work could even end before create_task returns, so its end
            # is looked at by a callback, which never runs before this function has registered the task.
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
                # Forgotten before it has ended: nobody may join work that is being cancelled.
                self._forget(key, task)
                task.cancel()

    def _forget(self, key: K, task: asyncio.Task[V]) -> None:
        entry = self._running.get(key)
        if entry is not None and entry[0] is task:
            del self._running[key]

    @staticmethod
    async def _run(work: Callable[[], Awaitable[V]]) -> V:
        return await work()
