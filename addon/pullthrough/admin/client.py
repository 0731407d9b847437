"""Ask the daemon that holds a store, over its control socket (`server` has the protocol).

Invariant: the outcome is a result, or an error that says whether a daemon is running.
"""

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pullthrough.core.errors import ControlError, NoDaemon

SOCKET: Final = "control.sock"
POINTER: Final = "control.path"
"""A file that says where the socket is, when the store's own path is too long for one."""
ADDRESS: Final = "/v1/"
"""What the path of every command begins with."""
LONGEST: Final = 16 << 20
"""Bytes of a request's body: as many as name all blobs of the largest manifest."""
LINES: Final = "application/x-ndjson"
"""The content type of progress and what came of it."""


def ask(
    folder: Path,
    command: str,
    arguments: Mapping[str, Any],
    *,
    on_progress: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Any:
    """Return the result of a command. Raises NoDaemon where nobody listens, ControlError if the daemon says no."""
    if sys.platform == "win32":
        raise NoDaemon("there is no control socket on Windows; stop the cache first")
    try:
        pointer = (folder / POINTER).read_text(encoding="utf-8").strip()
    except OSError:
        pointer = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(pointer or str(folder / SOCKET))
        except PermissionError as error:
            raise ControlError(
                f"{folder}: {error.strerror}: whether a cache runs on this store, only its owner and root may ask; "
                "run this as that user, or with sudo"
            ) from error
        except OSError as error:
            raise NoDaemon(f"no cache runs on {folder} ({error.strerror or error})") from error
        return _exchange(sock, command, arguments, on_progress)


def _exchange(
    sock: socket.socket,
    command: str,
    arguments: Mapping[str, Any],
    on_progress: Callable[[Mapping[str, Any]], None],
) -> Any:
    # Loading this takes longer than most commands, and no cache may be running.
    import http.client

    connection = http.client.HTTPConnection("cache")
    connection.sock = sock
    broken = f"the running cache closed the connection before it had answered {command}; its log may say why"
    try:
        # A daemon that closes the connection early may have said why.
        with contextlib.suppress(BrokenPipeError):
            connection.request("POST", f"{ADDRESS}{command}", json.dumps(arguments).encode())
        response = connection.getresponse()
        if response.headers.get_content_type() == LINES:
            last = {}
            for line in response:
                last = json.loads(line)
                if "progress" in last:
                    on_progress(last["progress"])
        else:
            answer = json.loads(response.read())
            last = {"result": answer} if response.status == http.client.OK else dict(answer)
    except http.client.RemoteDisconnected as error:
        raise ControlError(broken) from error
    except http.client.BadStatusLine as error:
        raise ControlError(
            "the running cache does not speak HTTP at its control socket: it is older than this program; start it again"
        ) from error
    except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
        raise ControlError(f"{broken} ({error})") from error
    if "result" in last:
        return last["result"]
    raise ControlError(last.get("error", broken))
