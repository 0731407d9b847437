"""Stores as earlier versions have left them, made of one of today's.

Format 1: all blobs in `blobs/`, manifests and pins in the index alone, no proofs, no version of the index.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.storefiles import blob_files


def make_format_1(folder: Path, *, references: bool = True) -> None:
    """Turn a closed store back; without `references` its rows are of the versions before manifest lists."""
    (folder / "blobs").mkdir()
    for path in blob_files(folder):
        path.rename(folder / "blobs" / path.name)
    with closing(sqlite3.connect(folder / "index" / "cache.db")) as connection, connection:
        connection.execute("DELETE FROM Cache WHERE key = 'index version'")
        for pattern in (folder / "pins").read_text().splitlines() if (folder / "pins").exists() else ():
            columns, values = "key, raw, store_time, access_time, size, mode, value", "?, 1, 0, 0, 0, 1, ''"
            connection.execute(f"INSERT INTO Cache ({columns}) VALUES ({values})", (f"pin {pattern}",))
        rows = connection.execute("SELECT key, value FROM Cache WHERE key GLOB 'manifest *' OR key GLOB 'child *'")
        for key, text in rows.fetchall():
            facts = json.loads(text)
            del facts["sum"], facts["brought"]
            if not references:
                del facts["references"]
            connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (json.dumps(facts), key))
    for name in ("public", "private"):
        shutil.rmtree(folder / name)
    for name in ("pins", "verified"):
        (folder / name).unlink(missing_ok=True)
    (folder / "ollama-cache.json").write_text('{"format": 1}\n')
