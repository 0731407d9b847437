"""Log records as lines of JSON, for programs that collect logs.

Invariant: one object a line, whatever is logged; `time`, `level`, `logger` and `message` are always there, and beside
them the fields that a record brings along.
"""

import json
import logging
from datetime import UTC, datetime

from pullthrough.monitoring.text_log import shorten


class JsonLines(logging.Formatter):
    """A record's own fields are in its attribute `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shorten(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
