"""byte_threads: places, waiting, parking, deadlines, and the end."""

import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pullthrough.delivery import byte_threads
from pullthrough.delivery.byte_threads import MOST, ByteThreads, ceiling

PATIENCE_S = 20.0


class Served:
    """A connection of a socket pair that does what it is told, and notes what becomes of it."""

    def __init__(self, events: "queue.Queue[tuple[str, Served]]", work: Callable[["Served"], bool]) -> None:
        self.deadline = math.inf
        self.sock, self.client = socket.socketpair()
        self.go = threading.Event()
        self._events = events
        self._work = work

    def fileno(self) -> int:
        return self.sock.fileno()

    def run(self) -> bool:
        self._events.put(("runs", self))
        return self._work(self)

    def stop(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.go.set()

    def close(self) -> None:
        self.sock.close()
        self._events.put(("closed", self))


class Scene:
    """Threads, and what has happened."""

    def __init__(self, places: int) -> None:
        self.threads = ByteThreads(places)
        self.events: queue.Queue[tuple[str, Served]] = queue.Queue()
        self.served: list[Served] = []

    def start(self, work: Callable[[Served], bool]) -> Served:
        served = Served(self.events, work)
        self.served.append(served)
        self.threads.start(served)
        return served

    def next(self) -> tuple[str, Served]:
        return self.events.get(timeout=PATIENCE_S)


def waits(served: Served) -> bool:
    """Until it is told to go on, and then it is over."""
    assert served.go.wait(PATIENCE_S)
    return False


def reads(served: Served) -> bool:
    """One byte, and then it is idle; over when there is none."""
    return served.sock.recv(1) != b""


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene(2)
    scene.threads.open()
    yield scene
    scene.threads.close(0.0)
    for served in scene.served:
        served.client.close()


def test_who_is_over_the_places_waits(scene: Scene) -> None:
    """First come, first served, and one is served as soon as another is over."""
    served = [scene.start(waits) for _ in range(4)]
    assert {scene.next(), scene.next()} == {("runs", served[0]), ("runs", served[1])}
    assert scene.threads.waiting == 2
    for number in (0, 1):
        served[number].go.set()
        assert scene.next() == ("closed", served[number])
        assert scene.next() == ("runs", served[number + 2])
    assert scene.threads.waiting == 0


def test_the_idle_give_their_thread_back(scene: Scene) -> None:
    """More connections than places, each served when it says something, on and on."""
    served = [scene.start(reads) for _ in range(6)]
    for _ in range(3):
        for one in served:
            one.client.send(b"x")
        assert {scene.next()[0] for _ in served} == {"runs"}
    for one in served:
        one.client.close()
    ends = [scene.next() for _ in range(12)]
    assert sum(what == "closed" for what, _ in ends) == 6


def test_a_deadline_frees_who_is_blocked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that is over its time returns, though nothing came."""
    monkeypatch.setattr(byte_threads, "TICK_S", 0.01)

    def blocks(served: Served) -> bool:
        served.deadline = time.monotonic()
        return served.sock.recv(1) != b""

    served = scene.start(blocks)
    assert [scene.next(), scene.next()] == [("runs", served), ("closed", served)]


def test_the_parked_do_not_stay_for_ever(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing for PARKED_S is let go."""
    monkeypatch.setattr(byte_threads, "TICK_S", 0.01)
    monkeypatch.setattr(byte_threads, "PARKED_S", 0.0)
    served = scene.start(lambda _: True)
    assert [scene.next(), scene.next()] == [("runs", served), ("closed", served)]
    assert served.client.recv(1) == b""


def test_close_ends_all_kinds(scene: Scene) -> None:
    """Those at work, those that wait for a place, and those that are parked; later ones are turned away."""
    parked = scene.start(lambda _: True)
    assert scene.next() == ("runs", parked)
    busy = [scene.start(waits) for _ in range(2)]
    waiting = scene.start(waits)
    for _ in busy:
        assert scene.next()[0] == "runs"
    scene.threads.close(0.0)
    late = scene.start(waits)
    closed = {scene.next() for _ in range(5)}
    assert closed == {("closed", one) for one in (parked, *busy, waiting, late)}


def test_a_system_without_threads(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be served from a thread of its own is served by the next that is free, or let go."""
    first = scene.start(waits)
    assert scene.next() == ("runs", first)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        second = scene.start(waits)
    first.go.set()
    assert [scene.next(), scene.next()] == [("closed", first), ("runs", second)]
    second.go.set()
    assert scene.next() == ("closed", second)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        deadline = time.monotonic() + PATIENCE_S
        while (event := scene.start(waits)) and scene.next() != ("closed", event):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("descriptors", "memory", "expected"),
    [(65_536, 64 << 30, MOST), (1024, 64 << 30, 384), (65_536, 1 << 30, 512), (64, 1, 16)],
)
def test_ceiling(descriptors: int, memory: int, expected: int) -> None:
    """As many as descriptors and memory are for, and a few in any case."""
    assert ceiling(descriptors, memory) == expected
