"""What a start sees to before anything else: which program it is part of, and how that writes."""

import io
import logging
import sys
from pathlib import Path

from mitmproxy.addons.termlog import TermLogHandler
from mitmproxy.master import Master
from mitmproxy.tools.dump import DumpMaster

from pullthrough.core.errors import SettingsError


def check_program(master: Master) -> None:
    """Refuse mitmproxy's programs that have a window.

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
        sys.stderr.write(f"ollama-cache: {error}\n")  # mitmproxy would show its log in a window that never opens
    raise error


def own_files(confdir: str) -> list[Path]:
    """Return mitmproxy's own configuration files: their `listen_port` and `mode` count here, too."""
    folder = Path(confdir).expanduser()
    return [path for name in ("config.yaml", "config.yml") if (path := folder / name).is_file()]


def write_by_lines() -> None:
    """Let each line out as it is written, into a file or pipe too: Python would keep some thousand characters back."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
