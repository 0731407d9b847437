"""A store of many models, made by writing its index and empty blob files of the right times.

Knows the index's rows, so that ten thousand models cost a second and not minutes.
"""

import json
import os
import sqlite3
from hashlib import sha256
from pathlib import Path

from pullthrough.records import BlobRecord, ManifestRecord
from pullthrough.store import Store


def fill(folder: Path, *, models: int, layers: int, day: float) -> None:
    """`models` models of `layers` layers (the last one is the same in all), each pulled `day` seconds after another."""
    Store.open(folder).close()
    rows: list[tuple[str, str | bytes]] = []
    shared = "sha256:" + sha256(b"shared").hexdigest()
    digests = {shared}
    for number in range(models):
        own = ["sha256:" + sha256(f"{number} {layer}".encode()).hexdigest() for layer in range(layers - 1)]
        digests.update(own)
        body = json.dumps(
            {"layers": [{"mediaType": "application/x", "digest": d, "size": 1000} for d in [*own, shared]]}
        )
        record = ManifestRecord.parse(body.encode(), "application/json", now=number * day)
        assert record is not None
        facts = {
            "body": record.digest,
            "content_type": "application/json",
            "confirmed": number * day,
            "oldest": None,
            "denied": False,
            "pulled": number * day,
            "sizes": {str(digest): size for digest, size in record.sizes.items()},
        }
        rows.append((f"body {record.digest}", body.encode()))
        rows.append((f"manifest registry.ollama.ai library/m{number} latest", json.dumps(facts)))
    for digest in digests:
        path = folder / "blobs" / digest.replace(":", "-")
        with path.open("wb") as file:
            os.truncate(file.fileno(), 1000)
        status = path.stat()
        blob = BlobRecord(1000, True, True, status.st_mtime_ns, status.st_ino, 0.0)
        rows.append((f"blob {digest}", json.dumps(blob)))
    with sqlite3.connect(folder / "index" / "cache.db") as connection:
        connection.executemany(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value) VALUES (?, 1, 0, 0, 0, 1, ?)",
            rows,
        )
    connection.close()
