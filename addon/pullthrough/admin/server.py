"""The control socket: where the command line asks the daemon that holds the store.

One request a connection: a line of JSON `{"verb": …, "arguments": {…}}`, answered by lines `{"progress": {…}}` and a
last one, `{"result": …}` or `{"error": "expected …, got …"}`.

Invariant: only the store's owner can ask (0600 before anybody can connect), and whoever asks goes when the daemon
does. Not on Windows, whose Python has no such sockets.
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
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pullthrough.admin.client import POINTER, SOCKET
from pullthrough.core.errors import CacheError, InvalidRequest

_log = logging.getLogger(__name__)

LONGEST_PATH: Final = 100
"""sun_path has 108 bytes on Linux and 104 on macOS, one of them for the end."""

LONGEST_REQUEST: Final = 1 << 20
PATIENCE_S: Final = 10.0
"""How long a connection may take for its request."""

Tell = Callable[[Mapping[str, Any]], Awaitable[None]]
"""Send a progress object."""
Verb = Callable[[Mapping[str, Any], Tell], Awaitable[Any]]
"""From arguments to a result that is JSON; CacheError says no."""


class ControlServer:
    """The socket of one store, which the caller has locked."""

    def __init__(self, folder: Path, verbs: Mapping[str, Verb]) -> None:
        self._folder = folder
        self._verbs = verbs
        self._server: asyncio.Server | None = None
        self._runtime: tempfile.TemporaryDirectory[str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen from now on; a socket that a crash has left gives way. OSError is logged: pulls need no socket."""
        if sys.platform == "win32":
            _log.info("no control socket on Windows: stop the cache before a verb that changes the store")
            return
        self._clear()
        try:
            path = self._folder / SOCKET
            if len(os.fsencode(path)) > LONGEST_PATH:
                self._runtime = tempfile.TemporaryDirectory(prefix="ollama-cache-")  # 0700
                path = Path(self._runtime.name) / SOCKET
                (self._folder / POINTER).write_text(f"{path}\n", encoding="utf-8")
            with contextlib.ExitStack() as undo:
                sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sock.bind(os.fspath(path))
                path.chmod(0o600)
                self._server = await asyncio.start_unix_server(self._accept, sock=sock, limit=LONGEST_REQUEST)
                undo.pop_all()
        except OSError as error:
            _log.warning("no control socket in %s: %s", self._folder, error)

    async def close(self) -> None:
        """Answer nobody any more. May be called twice, and without `open`."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._clear()
        if self._runtime is not None:
            self._runtime.cleanup()
            self._runtime = None

    def _clear(self) -> None:
        path = self._folder / SOCKET
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        (self._folder / POINTER).unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="control")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def tell(progress: Mapping[str, Any]) -> None:
            await _send(writer, {"progress": progress})

        try:
            answer = await self._answer(reader, tell)
            await _send(writer, answer)
        except ConnectionError:
            pass  # whoever asked has gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, tell: Tell) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(PATIENCE_S):
                line = await reader.readline()
            verb, arguments = _parse(line)
            if verb not in self._verbs:
                raise InvalidRequest(f"expected one of {', '.join(self._verbs)}, got {verb!r}")
            return {"result": await self._verbs[verb](arguments, tell)}
        except CacheError as error:
            return {"error": str(error)}
        except (TimeoutError, ValueError):
            return {"error": f"expected a request of one line within {PATIENCE_S:.0f} s, got none"}
        except ConnectionError:
            raise
        except Exception:
            _log.exception("a verb of the control socket failed")
            return {"error": "expected an answer, got a fault of the cache; its log has more"}


def _parse(line: bytes) -> tuple[str, Mapping[str, Any]]:
    try:
        request = json.loads(line)
        verb, arguments = request["verb"], request["arguments"]
    except (ValueError, KeyError, TypeError):
        verb, arguments = None, None
    if not isinstance(verb, str) or not isinstance(arguments, dict):
        raise InvalidRequest(f"expected a line of JSON with verb and arguments, got {line[:80]!r}")
    return verb, arguments


async def _send(writer: asyncio.StreamWriter, value: Mapping[str, Any]) -> None:
    writer.write(json.dumps(value).encode() + b"\n")
    await writer.drain()
