"""executors: a crew of threads that nobody waits for longer than its work lasts."""

import asyncio
import functools
import gc
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pullthrough.runtime import executors as module
from pullthrough.runtime.executors import Crew, DiskThread

WAIT_S = 20.0


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **options: Any) -> None:
        asyncio.run(test(*arguments, **options))

    return run


def nothing(*_: object) -> None:
    pass


@on_loop
async def test_what_it_returns_and_raises() -> None:
    """As if it had been called here."""
    crew = Crew(2)
    assert await crew.run(lambda: 5, nothing) == 5
    assert await crew.run_or_leave(lambda: 6, nothing, nothing) == 6
    with pytest.raises(ZeroDivisionError):
        await crew.run(lambda: 1 / 0, nothing)
    with pytest.raises(ZeroDivisionError):
        await crew.run_or_leave(lambda: 1 / 0, nothing, nothing)


@on_loop
async def test_no_more_threads_than_allowed() -> None:
    """The others wait, and all are served."""
    crew = Crew(3)
    lock, gate = threading.Lock(), threading.Event()
    running = most = 0

    def work() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                gate.set()
        assert gate.wait(WAIT_S)
        with lock:
            running -= 1
        return threading.get_ident()

    found = await asyncio.gather(*(crew.run(work, nothing) for _ in range(12)))
    assert most == 3
    assert len(set(found)) == 3


@on_loop
async def test_threads_end_when_there_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """And come again."""
    monkeypatch.setattr(module, "_IDLE_S", 0.0)
    crew = Crew(2)
    first = await crew.run(threading.current_thread, nothing)
    first.join(WAIT_S)
    assert not first.is_alive()
    assert await crew.run(lambda: 1, nothing) == 1


@on_loop
async def test_a_cancelled_call_is_stopped_and_waited_for() -> None:
    """What it uses is in use until it has ended."""
    crew = Crew(1)
    begun, stopped, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert stopped.wait(WAIT_S)
        ended.set()

    task = asyncio.get_running_loop().create_task(crew.run(work, stopped.set))
    await asyncio.to_thread(begun.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@on_loop
async def test_a_cancelled_call_may_be_left_alone() -> None:
    """What it returns too late is given to who puts it away."""
    crew = Crew(1)
    begun, stopped, gate, discarded = (threading.Event() for _ in range(4))
    found: list[int] = []

    def work() -> int:
        begun.set()
        assert gate.wait(WAIT_S)
        return 7

    def discard(value: int) -> None:
        found.append(value)
        discarded.set()

    task = asyncio.get_running_loop().create_task(crew.run_or_leave(work, stopped.set, discard))
    await asyncio.to_thread(begun.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped.is_set()
    gate.set()
    assert await asyncio.to_thread(discarded.wait, WAIT_S)
    assert found == [7]


@on_loop
async def test_a_late_failure_is_nobodys() -> None:
    """It is not told as an error that was lost."""
    crew = Crew(1)
    begun, gate = threading.Event(), threading.Event()
    lost: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: lost.append(context))

    def work() -> None:
        begun.set()
        gate.wait(WAIT_S)
        raise ZeroDivisionError

    task = loop.create_task(crew.run_or_leave(work, nothing, nothing))
    await asyncio.to_thread(begun.wait, WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await crew.run(nothing, nothing)  # by the same thread, after it
    await asyncio.sleep(0)
    del task
    gc.collect()
    assert lost == []


# --- a disk that may hang


def test_a_disk_that_answers() -> None:
    """What is asked for is done in another thread, one after the other; of a disk of this machine, here."""
    here = threading.current_thread()
    for may_hang in (False, True):
        disk = DiskThread(may_hang=may_hang)
        assert (disk.ask(threading.current_thread) is here) is not may_hang
        done: list[int] = []
        for number in range(3):
            disk.change(functools.partial(done.append, number))
        assert done == [0, 1, 2]
        for ask in (disk.ask, disk.change):
            with pytest.raises(ZeroDivisionError):
                ask(lambda: 1 / 0)
        assert not disk.is_silent


def test_a_disk_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is waited for once; then nothing is asked of it, changes come in their order when it answers, results go."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    disk, answer = DiskThread(may_hang=True), threading.Event()
    done: list[object] = []

    def hang() -> str:
        assert answer.wait(WAIT_S)
        return "late"

    with pytest.raises(OSError, match="does not answer"):
        disk.ask(hang, discard=done.append)
    monkeypatch.setattr(module, "PATIENCE_S", WAIT_S)
    assert disk.is_silent
    disk.change(functools.partial(done.append, 1))
    with pytest.raises(OSError, match="does not answer"):
        disk.ask(nothing)
    disk.change(functools.partial(done.append, 2))
    assert done == []
    over = threading.Event()
    disk.change(over.set)
    answer.set()
    assert over.wait(WAIT_S)
    assert done == ["late", 1, 2]
    assert not disk.is_silent
    assert disk.ask(lambda: 5) == 5
