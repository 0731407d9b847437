"""Lines of a journal: `<crc32, 8 hexadecimal digits> <JSON object>`.

Invariant: a line that was torn, and all behind it, is not read. Knows no meaning of what is said.
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
    """Return the line that says this."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def records_of(lines: list[bytes]) -> Iterable[dict[str, Any]]:
    """Yield what the lines of a file say, up to the first that does not check. Raises ValueError for one that is no
    JSON.
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


def replace_file(path: Path, lines: Iterable[bytes], *, sync: bool) -> None:
    """Put a file of these lines in the place of another, whole or not at all; durable when this returns if `sync`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = platform.open_descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        platform.write_at(descriptor, 0, b"".join(lines))
        if sync:
            platform.sync_data(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    if sync:
        platform.sync_folder(path.parent)
