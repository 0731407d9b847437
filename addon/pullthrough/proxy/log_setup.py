"""How this process logs: mitmproxy's own handler, in our formats and within bounds."""

import logging
import time

from mitmproxy.addons.termlog import TermLogHandler

from pullthrough.config.settings import Log
from pullthrough.monitoring.json_log import JsonLines
from pullthrough.monitoring.text_log import PlainText, Sparing


def set_up_logs(kind: Log, level: str) -> None:
    """Log lines of this kind, and of ours those from the level on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TermLogHandler):
            inner = handler.formatter or logging.Formatter()
            handler.setFormatter(JsonLines() if kind is Log.JSON else PlainText(inner))
            handler.addFilter(Sparing(time.monotonic))
    logging.getLogger("pullthrough").setLevel(level.upper())
    # One line per connect and disconnect of every client drowns what the cache has to say.
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    logging.getLogger("mitmproxy.proxy.server").setLevel(quiet)
    logging.getLogger("mitmproxy.proxy.layers").setLevel(quiet)
