"""The log of this process: mitmproxy's own handler, with our formats and limits."""

import logging
import time

from mitmproxy.addons.termlog import TermLogHandler

from pullthrough.config.settings import Log
from pullthrough.monitoring.json_log import JsonLines
from pullthrough.monitoring.text_log import PlainText, Sparing


def set_up_logs(kind: Log, level: str) -> None:
    """Log in the format `kind`, and our own lines from `level` on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TermLogHandler):
            inner = handler.formatter or logging.Formatter()
            handler.setFormatter(JsonLines() if kind is Log.JSON else PlainText(inner))
            handler.addFilter(Sparing(time.monotonic))
            if level == "debug":
                handler.addFilter(_Ours(handler.level))
                handler.setLevel(logging.DEBUG)
    logging.getLogger("pullthrough").setLevel(level.upper())
    # A line for each connect and disconnect of every client would drown the cache's own lines.
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    logging.getLogger("mitmproxy.proxy.server").setLevel(quiet)
    logging.getLogger("mitmproxy.proxy.layers").setLevel(quiet)


class _Ours(logging.Filter):
    """Lets our own lines pass, and of others those from `level` on."""

    def __init__(self, level: int) -> None:
        super().__init__("pullthrough")
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return record.levelno >= self._level or super().filter(record)
