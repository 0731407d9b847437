"""Lines of a journal: `<crc32, 8 hexadecimal digits> <JSON object>`.

Invariant: neither a torn line nor any line after it is read. Knows nothing of what the records mean.
"""

import json
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pullthrough.runtime import platform


def line_of(record: Mapping[str, Any]) -> bytes:
    """Return the record's line."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def records_of(lines: list[bytes]) -> Iterable[dict[str, Any]]:
    """Yield the records of a file's lines, up to the first line whose checksum is wrong.

    Raises ValueError if a line with a correct checksum is not JSON.
    """
    # What follows the last newline is torn: the split leaves it as the last item.
    for line in lines[:-1]:
        crc, _, text = line.partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            return
        record = json.loads(text)
        if not isinstance(record, dict):
            return
        yield record


def replace_file(path: Path, lines: Iterable[bytes]) -> None:
    """Write these lines to the file, replacing it atomically and durably."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = platform.open_descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        platform.write_at(descriptor, 0, b"".join(lines))
        platform.sync_data(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    platform.sync_folder(path.parent)
