"""happy_eyeballs: the address that answers, whichever stands first."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from pullthrough.net.happy_eyeballs import first_to_answer, interleaved, version_of


@contextlib.contextmanager
def listening(*hosts: str) -> Iterator[int]:
    """A port of these addresses that accepts."""
    with contextlib.ExitStack() as stack:
        port = 0
        for host in hosts:
            port = stack.enter_context(socket.create_server((host, port))).getsockname()[1]
        yield port


@contextlib.contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """An address at which a SYN gets no answer: a listener that accepts nothing, with a full queue."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield


@pytest.mark.parametrize(
    ("addresses", "order"),
    [
        ([], []),
        (["192.0.2.1"], ["192.0.2.1"]),
        (["::1", "::2", "192.0.2.1", "192.0.2.2"], ["::1", "192.0.2.1", "::2", "192.0.2.2"]),
        (["192.0.2.1", "::1", "::2"], ["192.0.2.1", "::1", "::2"]),
    ],
)
def test_families_take_turns(addresses: list[str], order: list[str]) -> None:
    """A family without a way out costs one delay, however many addresses it has."""
    assert interleaved(addresses, version_of) == order


def test_the_first_is_preferred() -> None:
    """Where all answer, the system's own order counts."""
    with listening("127.0.0.1", "127.0.0.2") as port:
        assert asyncio.run(first_to_answer(["127.0.0.2", "127.0.0.1"], port)) == "127.0.0.2"


def test_a_refusal_costs_nothing() -> None:
    """The next address is tried at once."""
    with listening("127.0.0.2") as port:
        began = time.monotonic()
        found = asyncio.run(first_to_answer(["127.0.0.1", "127.0.0.3", "127.0.0.2"], port, delay_s=30))
        assert (found, time.monotonic() - began < 5) == ("127.0.0.2", True)


def test_silence_costs_a_delay() -> None:
    """An address that answers nothing keeps nobody waiting."""
    with listening("127.0.0.2") as port, black_hole("127.0.0.1", port):
        began = time.monotonic()
        assert asyncio.run(first_to_answer(["127.0.0.1", "127.0.0.2"], port)) == "127.0.0.2"
        assert 0.2 < time.monotonic() - began < 1


def test_nobody_answers() -> None:
    """In time, at once, and without a task left behind."""
    with listening("127.0.0.2") as port, black_hole("127.0.0.1", port):
        assert asyncio.run(first_to_answer(["127.0.0.1"], port, timeout_s=0.3)) is None
        assert asyncio.run(first_to_answer(["127.0.0.3"], port)) is None
        assert asyncio.run(first_to_answer([], port)) is None
