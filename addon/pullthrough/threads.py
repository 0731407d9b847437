"""Threads for what must not run on the event loop: calls that wait for disk or network, and hashing.

Invariant: a call that was begun is waited for even when its caller is cancelled, so that no descriptor is closed
under a thread that still uses it. Knows nothing of what is called.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pullthrough import platform


class Threads:
    """Four pools: writes must not queue behind hashing, nor what has just come behind what has long been there, nor
    anything behind the network."""

    def __init__(self) -> None:
        self._disk = ThreadPoolExecutor(4, thread_name_prefix="ollama-cache-disk")
        self._hashing = ThreadPoolExecutor(2, thread_name_prefix="ollama-cache-hash")
        self._rehashing = ThreadPoolExecutor(
            1, thread_name_prefix="ollama-cache-rehash", initializer=platform.lower_priority
        )

        self._network = ThreadPoolExecutor(8, thread_name_prefix="ollama-cache-network")

    async def disk[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what may wait for the disk."""
        return await _run(self._disk, lambda: work(*args, **kwargs))

    async def hashing[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what burns CPU outside the interpreter lock."""
        return await _run(self._hashing, lambda: work(*args, **kwargs))

    async def rehashing[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same, for what nobody waits for: one at a time, behind everything else."""
        return await _run(self._rehashing, lambda: work(*args, **kwargs))

    async def network[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what waits for another machine, and limits that itself."""
        return await _run(self._network, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """End the pools once what runs in them has ended."""
        self._disk.shutdown(wait=True)
        self._hashing.shutdown(wait=True)
        self._rehashing.shutdown(wait=True)
        self._network.shutdown(wait=True)


async def _run[T](pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at, so that it is not reported as lost
        raise
