"""Log records as lines of JSON, for programs that collect logs.

Invariant: one object per line, whatever is logged; it always has `time`, `level`, `logger` and `message`, and the
record's own fields beside them.
"""

import json
import logging
from datetime import UTC, datetime

from pullthrough.monitoring.text_log import shorten


class JsonLines(logging.Formatter):
    """The formatter. A record's own fields are in its attribute `fields`."""

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
