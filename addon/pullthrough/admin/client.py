"""Ask the daemon that holds a store, over its control socket (`control` has the protocol).

Invariant: either the result, or an error that says whether there was a daemon at all.
"""

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


def ask(
    folder: Path,
    verb: str,
    arguments: Mapping[str, Any],
    *,
    on_progress: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Any:
    """The result of the verb. NoDaemon where nobody listens, ControlError with the daemon's words if it says no."""
    if sys.platform == "win32":
        raise NoDaemon("expected a control socket, got Windows, whose Python has none; stop the cache first")
    try:
        pointer = (folder / POINTER).read_text(encoding="utf-8").strip()
    except OSError:
        pointer = ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(pointer or str(folder / SOCKET))
        except OSError as error:
            raise NoDaemon(f"expected a running cache on {folder}, got {error.strerror or error}") from error
        try:
            sock.sendall(json.dumps({"verb": verb, "arguments": arguments}).encode() + b"\n")
            with sock.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    if "progress" not in answer:
                        break
                    on_progress(answer["progress"])
                else:
                    raise ControlError(f"expected an answer to {verb}, got the end of the connection")
        except (OSError, ValueError) as error:
            raise ControlError(f"expected an answer to {verb}, got {error}") from error
    if "error" in answer:
        raise ControlError(answer["error"])
    return answer["result"]
