"""The control socket: HTTP at a Unix socket in the store, where the command line asks the daemon that holds it.

A command is at `/v1/NAME`: POST with its arguments as a JSON object, or GET with a query where it only looks. The
answer is its result as JSON; of a Job, lines of JSON: `{"progress": {...}}` as it goes on, and a last one,
`{"result": ...}` or `{"error": "...", "status": ...}`. Any other error has its HTTP status and `{"error": "..."}`.

Invariant: only the store's owner can connect (0600 from the beginning); a caller that hangs up ends its command, and so
does the end of the daemon. Not on Windows, where Python has no such sockets.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp import hdrs, web

from pullthrough.admin.client import ADDRESS, LINES, LONGEST, POINTER, SOCKET
from pullthrough.admin.command import Arguments, Command, Job, Look
from pullthrough.core.errors import CacheError, InvalidRequest

_log = logging.getLogger(__name__)

LONGEST_PATH: Final = 100
"""sun_path has 108 bytes on Linux and 104 on macOS, one of them for the end."""

PATIENCE_S: Final = 10.0
"""How long a connection may take to send its request."""

TO_OLDER_CLIENT: Final = {
    "error": "this ollama-cache is older than the cache that runs; use the program that the cache was installed with"
}
"""The answer to a client that sends a bare line of JSON, as this socket took before it spoke HTTP."""


def _bound(path: Path) -> socket.socket:
    """Return a socket that only our own user can connect to."""
    if sys.platform == "win32":
        raise OSError("Python has no Unix sockets on Windows")
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.bind(os.fspath(path))
        path.chmod(0o600)
        undo.pop_all()
    return sock


class ControlServer:
    """The socket of one store, which the caller has locked."""

    def __init__(self, folder: Path, commands: Mapping[str, Command]) -> None:
        self._folder = folder
        self._commands = commands
        self._runner: web.ServerRunner | None = None
        self._elsewhere: tempfile.TemporaryDirectory[str] | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Listen from now on, in place of a socket left by a crash. An OSError is logged: pulls need no socket."""
        if sys.platform == "win32":
            _log.info("no control socket on Windows: stop the cache before a verb that changes the store")
            return
        self._clear()
        server = _Server(self._answer, handler_cancellation=True, access_log=None, keepalive_timeout=PATIENCE_S)
        self._runner = web.ServerRunner(server)
        try:
            with contextlib.ExitStack() as undo:
                sock = undo.enter_context(self._bind())
                await self._runner.setup()
                await web.SockSite(self._runner, sock).start()
                undo.pop_all()
        except OSError as error:
            _log.warning("no control socket in %s: %s", self._folder, error)
            await self.close()

    def _bind(self) -> socket.socket:
        """Return a socket in the store, else in a folder that a file of the store names. Raises OSError."""
        path = self._folder / SOCKET
        if len(os.fsencode(path)) <= LONGEST_PATH:
            with contextlib.suppress(OSError):  # a disk without sockets, as exFAT
                return _bound(path)
        self._elsewhere = tempfile.TemporaryDirectory(prefix="ollama-cache-")  # 0700
        path = Path(self._elsewhere.name) / SOCKET
        (self._folder / POINTER).write_text(f"{path}\n", encoding="utf-8")
        return _bound(path)

    async def close(self) -> None:
        """Stop listening. May be called twice, and without `open`."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await runner.cleanup()
        self._clear()
        if self._elsewhere is not None:
            self._elsewhere.cleanup()
            self._elsewhere = None

    def _clear(self) -> None:
        path = self._folder / SOCKET
        with contextlib.suppress(OSError):  # nothing is there, or the disk is read-only
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        with contextlib.suppress(OSError):
            (self._folder / POINTER).unlink()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            command = self._command(request)
            arguments = await _arguments(request)
            if isinstance(command, Job):
                return await _stream(request, command, arguments)
            return web.json_response(await command.run(arguments))
        except web.HTTPException as refusal:
            return web.json_response({"error": refusal.text}, status=refusal.status, headers=_allow(refusal))
        except ConnectionError:
            raise  # the caller has gone
        except Exception as error:
            status, answer = _in_words(error)
            return web.json_response(answer, status=status)
        finally:
            self._running.discard(task)

    def _command(self, request: web.BaseRequest) -> Command:
        """Return the command of the request. Raises HTTPException."""
        name = request.path.removeprefix(ADDRESS)
        command = self._commands.get(name) if name != request.path else None
        if command is None and name.startswith("tier-"):
            raise web.HTTPNotFound(text="this cache has no fleet: its option object_store is not set")
        if command is None:
            known = ", ".join(f"{ADDRESS}{name}" for name in self._commands)
            raise web.HTTPNotFound(text=f"there is no {request.path} at the control socket of this cache, only {known}")
        methods = [hdrs.METH_GET, hdrs.METH_POST] if isinstance(command, Look) else [hdrs.METH_POST]
        if request.method not in methods:
            text = f"{request.path} is asked by {' or '.join(methods)}, not by {request.method}"
            raise web.HTTPMethodNotAllowed(request.method, methods, text=text)
        return command


async def _arguments(request: web.BaseRequest) -> Arguments:
    """Return the arguments in the query or the body. Raises InvalidRequest, HTTPRequestEntityTooLarge."""
    if request.method == hdrs.METH_GET:
        return Arguments(dict(request.query))
    body = await request.clone(client_max_size=LONGEST).read()
    try:
        values = json.loads(body or b"{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body of a request is a JSON object of arguments, not {body[:80]!r}")
    return Arguments(values)


async def _stream(request: web.BaseRequest, job: Job, arguments: Arguments) -> web.StreamResponse:
    """Send progress as it comes, and the outcome; a failure before anything was sent is raised."""
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: LINES})

    async def send(line: Mapping[str, Any]) -> None:
        if not response.prepared:
            await response.prepare(request)
        await response.write(json.dumps(line).encode() + b"\n")

    async def tell(progress: Mapping[str, Any]) -> None:
        await send({"progress": progress})

    try:
        last = {"result": await job.run(arguments, tell)}
    except ConnectionError:
        raise
    except Exception as error:
        if not response.prepared:
            raise
        status, answer = _in_words(error)
        last = {**answer, "status": status}
    await send(last)
    await response.write_eof()
    return response


def _in_words(error: Exception) -> tuple[int, dict[str, str]]:
    """Return the status and body for an error; an unexpected one is logged."""
    if isinstance(error, CacheError):
        return error.status_hint, {"error": str(error)}
    _log.error("a command of the control socket failed", exc_info=error)
    return 500, {"error": "an internal error of the cache; its log has more"}


def _allow(refusal: web.HTTPException) -> dict[str, str]:
    return {name: value for name, value in refusal.headers.items() if name == hdrs.ALLOW}


class _Server(web.Server):
    """aiohttp's server, which also answers clients older than itself."""

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    """A connection whose first byte shows the protocol: no HTTP request begins with a brace."""

    has_begun = False

    def data_received(self, data: bytes) -> None:
        begins, self.has_begun = not self.has_begun, True
        if begins and data.startswith(b"{") and self.transport is not None:
            self.transport.write(json.dumps(TO_OLDER_CLIENT).encode() + b"\n")
            self.close()
            self.transport.close()
        else:
            super().data_received(data)
