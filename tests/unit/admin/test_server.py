"""server and client: HTTP over the store's Unix socket, for its owner alone."""

import asyncio
import http.client
import json
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pullthrough.admin.client import POINTER, SOCKET, ask
from pullthrough.admin.command import Arguments, Change, Command, Job, Look, Tell
from pullthrough.admin.server import ControlServer
from pullthrough.core.errors import ControlError, NoDaemon, NoSuchModel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such sockets for Python")


async def echo(arguments: Arguments) -> Any:
    return arguments.values


async def refuse(_: Arguments) -> Any:
    raise NoSuchModel("expected a stored model, got 'x'")


async def break_down(_: Arguments) -> Any:
    raise ZeroDivisionError


async def count(arguments: Arguments, tell: Tell) -> Any:
    for number in range(arguments.values.get("steps", 0)):
        await tell({"step": number})
    if arguments.flag("fail"):
        raise NoSuchModel("expected a stored model, got 'x'")
    return arguments.values


async def wait(_: Arguments, tell: Tell) -> Any:
    await tell({"waiting": True})
    await asyncio.Event().wait()


COMMANDS: dict[str, Command] = {
    "echo": Look(echo),
    "refuse": Change(refuse),
    "break": Change(break_down),
    "count": Job(count),
    "wait": Job(wait),
}


def serve(folder: Path, talk: Callable[[ControlServer], Awaitable[None]], **more: Command) -> None:
    """Let `talk` go on while the socket of `folder` is open."""

    async def run() -> None:
        control = ControlServer(folder, COMMANDS | more)
        await control.open()
        try:
            async with asyncio.timeout(30):
                await talk(control)
        finally:
            await control.close()

    asyncio.run(run())


def send(folder: Path, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """Return status and JSON of what any client of HTTP may ask."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(folder / SOCKET))
        connection = http.client.HTTPConnection("cache")
        connection.sock = sock
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_result_and_progress(tmp_path: Path) -> None:
    """What the command tells on its way, and what it returns; a long answer comes whole."""

    async def talk(_: ControlServer) -> None:
        seen: list[object] = []
        arguments = {"steps": 3, "text": "x" * 5_000_000}
        assert await asyncio.to_thread(ask, tmp_path, "echo", arguments) == arguments
        assert await asyncio.to_thread(ask, tmp_path, "count", arguments, on_progress=seen.append) == arguments
        assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]

    serve(tmp_path, talk)


def test_errors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon's own words, and for a fault nothing but that there was one; then the next command works."""

    async def talk(_: ControlServer) -> None:
        with pytest.raises(ControlError, match=r"^expected a stored model, got 'x'$"):
            await asyncio.to_thread(ask, tmp_path, "refuse", {})
        with pytest.raises(
            ControlError, match=r"^there is no /v1/dance at the control socket of this cache, only /v1/e"
        ):
            await asyncio.to_thread(ask, tmp_path, "dance", {})
        with pytest.raises(ControlError, match=r"^an internal error of the cache; its log has more$"):
            await asyncio.to_thread(ask, tmp_path, "break", {})
        for steps in (0, 2):
            with pytest.raises(ControlError, match=r"^expected a stored model, got 'x'$"):
                await asyncio.to_thread(ask, tmp_path, "count", {"steps": steps, "fail": True})
        assert await asyncio.to_thread(ask, tmp_path, "echo", {}) == {}

    serve(tmp_path, talk)
    assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/v1/refuse", b"", 404, "expected a stored model, got 'x'"),
        ("POST", "/v1/break", b"{}", 500, "an internal error of the cache; its log has more"),
        ("POST", "/v1/echo", b"hello", 400, "the body of a request is a JSON object of arguments, not b'hello'"),
        ("POST", "/v1/echo", b"[]", 400, "the body of a request is a JSON object of arguments, not b'[]'"),
        ("POST", "/v1/count", b'{"fail": 1}', 400, "argument fail: expected true or false, got 1"),
        ("POST", "/v1/count", b'{"fail": true}', 404, "expected a stored model, got 'x'"),
        ("POST", "/v1/echo", b" " * 17_000_000, 413, "Maximum request body size 16777216 exceeded."),
        ("GET", "/v1/refuse", None, 405, "/v1/refuse is asked by POST, not by GET"),
        ("PUT", "/v1/echo", b"{}", 405, "/v1/echo is asked by GET or POST, not by PUT"),
        ("GET", "/echo", None, 404, "there is no /echo at the control socket of this cache, only /v1/echo"),
    ],
)
def test_statuses(tmp_path: Path, method: str, path: str, body: bytes | None, status: int, error: str) -> None:
    """What cannot be done has a status that says whose fault it is."""

    async def talk(_: ControlServer) -> None:
        got, answer = await asyncio.to_thread(send, tmp_path, method, path, body)
        assert got == status
        assert list(answer) == ["error"] and answer["error"].startswith(error)

    serve(tmp_path, talk)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(tmp_path: Path) -> None:
    """Any client of HTTP will do: a query, a body, progress line by line."""

    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--unix-socket", str(tmp_path / SOCKET), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    async def talk(_: ControlServer) -> None:
        shown = await asyncio.to_thread(curl, "http://cache/v1/echo?model=hf.co/me/x:q")
        assert json.loads(shown) == {"model": "hf.co/me/x:q"}
        lines = await asyncio.to_thread(curl, "http://cache/v1/count", "-d", '{"steps": 1}')
        assert lines == '{"progress": {"step": 0}}\n{"result": {"steps": 1}}\n'
        lines = await asyncio.to_thread(curl, "http://cache/v1/count", "-d", '{"steps": 1, "fail": true}')
        assert json.loads(lines.splitlines()[1]) == {"error": "expected a stored model, got 'x'", "status": 404}

    serve(tmp_path, talk)


def test_a_client_from_before_http(tmp_path: Path) -> None:
    """Its bare line of JSON is answered in kind, by what to do about it."""

    def line() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / SOCKET))
            sock.sendall(b'{"verb": "ls", "arguments": {}}\n')
            return sock.makefile("rb").read()

    async def talk(_: ControlServer) -> None:
        error = json.loads(await asyncio.to_thread(line))["error"]
        assert error.startswith("this ollama-cache is older than the cache that runs; use the program")
        assert await asyncio.to_thread(in_two_parts) == b'{"a": 1}'

    def in_two_parts() -> bytes:
        """A brace that begins a body, and no connection."""
        head = b"POST /v1/echo HTTP/1.1\r\nHost: cache\r\nContent-Length: %d\r\n\r\n"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / SOCKET))
            sock.sendall(head % 0 + head % 8)
            assert http_body(sock) == b"{}"  # so what came with it was read, too
            sock.sendall(b'{"a": 1}')
            return http_body(sock)

    def http_body(sock: socket.socket) -> bytes:
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.read()

    serve(tmp_path, talk)


@contextmanager
def listener(folder: Path, answer: bytes) -> Iterator[None]:
    """What is no cache of today: it reads a bit, answers that, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / SOCKET))
        listening.listen()

        def serve_one() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(answer)

        thread = threading.Thread(target=serve_one)
        thread.start()
        yield
        thread.join(timeout=20)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b'{"error": "expected a line of JSON with verb and arguments, got b\'POST /v1\'"}\n',
            "older than this program",
        ),
        (b"", "^the running cache closed the connection before it had answered ls; its log may say why$"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[", "closed the connection before it had answered ls"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n[", "closed the connection before it had answered ls"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'12\r\n{"progress": {}}\n\r\n',
            "closed the connection before it had answered ls",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", ""),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\nnull", "closed the connection before it had answered ls"),
    ],
)
def test_what_is_no_answer(tmp_path: Path, answer: bytes, words: str) -> None:
    """An older daemon and one that dies end in one sentence."""
    with listener(tmp_path, answer):
        if not words:
            assert ask(tmp_path, "ls", {}) is None
            return
        with pytest.raises(ControlError, match=words):
            ask(tmp_path, "ls", {})


def test_hanging_up_ends_the_command(tmp_path: Path) -> None:
    """Whoever goes has no use for the rest; no other is disturbed."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work(_: Arguments, tell: Tell) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def talk(_: ControlServer) -> None:
        _, writer = await asyncio.open_unix_connection(tmp_path / SOCKET)
        writer.write(b"POST /v1/work HTTP/1.1\r\nHost: cache\r\nContent-Length: 0\r\n\r\n")
        await begun.wait()
        assert not ended.is_set()
        writer.close()
        await ended.wait()
        assert await asyncio.to_thread(ask, tmp_path, "echo", {}) == {}

    serve(tmp_path, talk, work=Job(work))


def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    """0600, and gone afterwards."""

    async def talk(_: ControlServer) -> None:
        assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600

    serve(tmp_path, talk)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoDaemon, match="no cache runs on"):
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
    """A command that goes on is cut off when the daemon ends, and its asker told so."""

    async def talk(control: ControlServer) -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        asking = loop.run_in_executor(
            None, lambda: ask(tmp_path, "wait", {}, on_progress=lambda _: loop.call_soon_threadsafe(begun.set))
        )
        await begun.wait()
        await control.close()
        with pytest.raises(ControlError, match="closed the connection before it had answered wait"):
            await asking

    serve(tmp_path, talk)
