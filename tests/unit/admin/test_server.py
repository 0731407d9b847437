"""server and client: one line in, progress and one answer out, for the store's owner alone."""

import asyncio
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pullthrough.admin.client import POINTER, SOCKET, ask
from pullthrough.admin.server import ControlServer, Tell
from pullthrough.core.errors import ControlError, NoDaemon, NoSuchModel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such sockets for Python")


async def echo(arguments: Mapping[str, Any], tell: Tell) -> Any:
    for number in range(arguments.get("steps", 0)):
        await tell({"step": number})
    return arguments


async def refuse(_: Mapping[str, Any], __: Tell) -> Any:
    raise NoSuchModel("expected a stored model, got 'x'")


async def break_down(_: Mapping[str, Any], __: Tell) -> Any:
    raise ZeroDivisionError


async def wait(_: Mapping[str, Any], tell: Tell) -> Any:
    await tell({"waiting": True})
    await asyncio.Event().wait()


VERBS = {"echo": echo, "refuse": refuse, "break": break_down, "wait": wait}


def serve(folder: Path, talk: Callable[[ControlServer], Awaitable[None]]) -> None:
    """Let `talk` go on while the socket of `folder` is open."""

    async def run() -> None:
        control = ControlServer(folder, VERBS)
        await control.open()
        try:
            async with asyncio.timeout(30):
                await talk(control)
        finally:
            await control.close()

    asyncio.run(run())


def test_result_and_progress(tmp_path: Path) -> None:
    """What the verb tells on its way, and what it returns; a long answer comes whole."""

    async def talk(_: ControlServer) -> None:
        seen: list[object] = []
        arguments = {"steps": 3, "text": "x" * 500_000}
        result = await asyncio.to_thread(ask, tmp_path, "echo", arguments, on_progress=seen.append)
        assert result == arguments
        assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]

    serve(tmp_path, talk)


def test_errors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon's own words, and for a fault nothing but that there was one; then the next verb works."""

    async def talk(_: ControlServer) -> None:
        with pytest.raises(ControlError, match=r"^expected a stored model, got 'x'$"):
            await asyncio.to_thread(ask, tmp_path, "refuse", {})
        with pytest.raises(ControlError, match=r"^expected one of echo, refuse, break, wait, got 'dance'$"):
            await asyncio.to_thread(ask, tmp_path, "dance", {})
        with pytest.raises(ControlError, match=r"got a fault of the cache; its log has more$"):
            await asyncio.to_thread(ask, tmp_path, "break", {})
        assert await asyncio.to_thread(ask, tmp_path, "echo", {}) == {}

    serve(tmp_path, talk)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"verb": 1, "arguments": {}}\n', b'{"verb": "echo"}\n', b"\n"])
def test_malformed_requests(tmp_path: Path, line: bytes) -> None:
    """A line that is no request is answered by what was expected."""

    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / SOCKET))
            sock.sendall(line)
            return sock.makefile("rb").read()

    async def talk(_: ControlServer) -> None:
        assert (await asyncio.to_thread(send)).startswith(b'{"error": "expected a line of JSON with verb and arguments')

    serve(tmp_path, talk)


def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    """0600, and gone afterwards."""

    async def talk(_: ControlServer) -> None:
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600

    serve(tmp_path, talk)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoDaemon, match="expected a running cache on"):
        ask(tmp_path, "echo", {})


def test_a_stale_socket_gives_way(tmp_path: Path) -> None:
    """What a crash has left is nobody to a client, and no hindrance to the next daemon."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / SOCKET))
    (tmp_path / POINTER).write_text("/nowhere\n")
    with pytest.raises(NoDaemon):
        ask(tmp_path, "echo", {})

    async def talk(_: ControlServer) -> None:
        assert await asyncio.to_thread(ask, tmp_path, "echo", {}) == {}

    serve(tmp_path, talk)


def test_a_store_with_a_long_path(tmp_path: Path) -> None:
    """A socket's path has 108 bytes at most: then it lies elsewhere, in a folder for the owner alone."""
    folder = tmp_path / ("long" * 20) / ("long" * 20)
    folder.mkdir(parents=True)

    async def talk(_: ControlServer) -> None:
        assert await asyncio.to_thread(ask, folder, "echo", {"a": 1}) == {"a": 1}
        places.append(await asyncio.to_thread(look))

    def look() -> Path:
        path = Path((folder / POINTER).read_text().strip())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        return path

    places: list[Path] = []
    serve(folder, talk)
    assert not places[0].parent.exists()
    assert list(folder.iterdir()) == []


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    """A verb that goes on is cut off when the daemon ends, and its asker told so."""

    async def talk(control: ControlServer) -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        asking = loop.run_in_executor(
            None, lambda: ask(tmp_path, "wait", {}, on_progress=lambda _: loop.call_soon_threadsafe(begun.set))
        )
        await begun.wait()
        await control.close()
        with pytest.raises(ControlError, match="expected an answer to wait, got"):
            await asking

    serve(tmp_path, talk)
