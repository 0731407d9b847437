"""Threads for what must not run on the event loop: calls that wait for disk or network, and hashing.

Invariant: a call that has begun is waited for even if its caller is cancelled, so that no descriptor is closed while a
thread still uses it. `Crew.run_or_leave` and `DiskThread` are the exceptions: they do not wait for a late call.
"""

import asyncio
import contextlib
import errno
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, Final

from pullthrough.runtime import platform

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 1.0
"""The longest that the event loop waits for a disk that may hang."""
_IDLE_S: Final = 5.0
"""How long a thread of a crew waits for more work."""


class Threads:
    """Four pools: writes must not queue behind hashing, hashing of new bytes not behind that of old ones, and nothing
    behind the network."""

    def __init__(self) -> None:
        self._disk = ThreadPoolExecutor(4, thread_name_prefix="ollama-cache-disk")
        self._hashing = ThreadPoolExecutor(2, thread_name_prefix="ollama-cache-hash")
        self._rehashing = ThreadPoolExecutor(
            1, thread_name_prefix="ollama-cache-rehash", initializer=platform.lower_priority
        )

        self._network = ThreadPoolExecutor(8, thread_name_prefix="ollama-cache-network")

    async def disk[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work that may wait for the disk."""
        return await _run(self._disk, lambda: work(*args, **kwargs))

    async def hashing[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run CPU-bound work that releases the GIL."""
        return await _run(self._hashing, lambda: work(*args, **kwargs))

    async def rehashing[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the same kind of work when nobody waits for it: one call at a time, at low priority."""
        return await _run(self._rehashing, lambda: work(*args, **kwargs))

    async def network[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work that waits for another machine and has its own time limit."""
        return await _run(self._network, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Wait for running work to end, then end the pools."""
        self._disk.shutdown(wait=True)
        self._hashing.shutdown(wait=True)
        self._rehashing.shutdown(wait=True)
        self._network.shutdown(wait=True)


async def _run[T](pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _settled(future)
        raise


async def _settled(future: "asyncio.Future[Any]") -> None:
    """Wait until the future is done, even if cancelled meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    if not future.cancelled():
        future.exception()  # marks it as retrieved, or asyncio would log it as lost


class Crew:
    """Up to `most` threads that each wait for another machine, started when needed and ended when idle.

    They are daemon threads: one that the system blocks (resolving a name) does not keep the process from ending.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Condition()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._idle = 0
        self._count = 0

    async def run[T](self, work: Callable[[], T], stop: Callable[[], None]) -> T:
        """Return what `work` returns. If cancelled, call `stop` and wait until the work has ended."""
        future = asyncio.wrap_future(self._submit(work))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop()
            await _settled(future)
            raise

    async def run_or_leave[T](self, work: Callable[[], T], stop: Callable[[], None], discard: Callable[[T], None]) -> T:
        """Return what `work` returns. If cancelled, call `stop` and do not wait; a late result goes to `discard`."""
        future = self._submit(work)
        awaited = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(awaited)
        except asyncio.CancelledError:
            stop()
            future.add_done_callback(lambda done: _discard(done, discard))
            # Its error is nobody's now, which asyncio would log as lost.
            awaited.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    def _submit[T](self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        with self._lock:
            self._work.append((work, future))
            if self._idle >= len(self._work) or self._count >= self._most:
                self._lock.notify()
                return future
            self._count += 1
        try:
            threading.Thread(target=self._run, name="ollama-cache-fetch", daemon=True).start()
        except RuntimeError:
            # The system allows no more threads: the existing ones do the work.
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._work.clear()
                    raise
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                has_work = self._lock.wait_for(lambda: bool(self._work), _IDLE_S)
                self._idle -= 1
                if not has_work:
                    self._count -= 1
                    return
                work, future = self._work.popleft()
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del work, future


def _discard[T](future: "Future[T]", discard: Callable[[T], None]) -> None:
    if future.exception() is None:
        discard(future.result())


class DiskThread:
    """A thread that makes one disk's calls in order; the caller waits PATIENCE_S at most.

    It keeps the event loop from hanging on a share whose server is gone. A local disk always answers, or the machine is
    lost, so without `may_hang` calls run in the caller's thread.
    """

    def __init__(self, *, may_hang: bool) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] | None = SimpleQueue() if may_hang else None
        self._awaited: Future[Any] | None = None
        """The last call that was not answered in time."""
        if self._queue is not None:
            # A daemon thread: if the system blocks it, the process can still end.
            threading.Thread(target=self._run, name="ollama-cache-share", daemon=True).start()

    @property
    def is_silent(self) -> bool:
        """Whether a call was not answered in time, and still is not."""
        return self._awaited is not None and not self._awaited.done()

    def ask[T](self, work: Callable[[], T], discard: Callable[[T], None] = lambda _: None) -> T:
        """Return what `work` returns; a late result goes to `discard`. Raises OSError while the disk is silent."""
        if self._queue is None:
            return work()
        if self.is_silent:
            raise _silence()
        future = self._submit(work)
        if not self._answers(future):
            future.add_done_callback(lambda done: _discard(done, discard))
            raise _silence()
        return future.result()

    def change(self, work: Callable[[], object]) -> None:
        """Do `work` after all earlier calls, even if the disk is silent now. Raises what it raises, if that is known
        in time.
        """
        if self._queue is None:
            work()
        elif self.is_silent:
            self._submit(work)
        elif self._answers(future := self._submit(work)):
            future.result()

    def _submit[T](self, work: Callable[[], T]) -> "Future[T]":
        assert self._queue is not None
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future

    def _answers(self, future: "Future[Any]") -> bool:
        done, _ = wait([future], PATIENCE_S)
        if not done:
            self._awaited = future
            _log.error("the store's disk has not answered for %.1f s: the cache goes on without it", PATIENCE_S)
            future.add_done_callback(lambda _: _log.info("the store's disk answers again"))
        return bool(done)

    def _run(self) -> None:
        assert self._queue is not None
        while True:
            work, future = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del work, future


def _silence() -> OSError:
    return OSError(errno.ETIMEDOUT, "the disk does not answer")
