"""The first steps of a start: checking which program it is part of, and how that writes its output."""

import io
import logging
import sys
from pathlib import Path

from mitmproxy.addons.termlog import TermLogHandler
from mitmproxy.master import Master
from mitmproxy.tools.dump import DumpMaster

from pullthrough.core.errors import SettingsError


def check_program(master: Master) -> None:
    """Refuse mitmproxy's programs with a user interface.

    Raises:
        SettingsError: this is not mitmdump.
    """
    if isinstance(master, DumpMaster):
        return
    error = SettingsError(
        "mitmweb and mitmproxy keep every request to show it; start the cache by `ollama-cache run` or `mitmdump -s`, "
        "and look at its own page"
    )
    if not any(isinstance(handler, TermLogHandler) for handler in logging.getLogger().handlers):
        sys.stderr.write(f"ollama-cache: {error}\n")  # mitmproxy's log would be in an interface that never opens
    raise error


def own_files(confdir: str) -> list[Path]:
    """Return mitmproxy's own configuration files, whose `listen_port` and `mode` apply here, too."""
    folder = Path(confdir).expanduser()
    return [path for name in ("config.yaml", "config.yml") if (path := folder / name).is_file()]


def write_by_lines() -> None:
    """Flush each line, to a file or pipe, too: Python would hold back some thousand characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
