"""A store of many models, made by writing its index, its manifests, and empty blob files of the right times.

Writes the index's rows itself, so that ten thousand models cost seconds and not minutes.
"""

import json
import os
import sqlite3
from hashlib import sha256
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.store.proofs import Proof, Proofs
from pullthrough.store.rows import (
    blob_key,
    blob_value,
    body_key,
    manifest_key,
    manifest_value,
    members_key,
)
from pullthrough.store.store import Store


def fill(folder: Path, *, models: int, layers: int, day: float) -> None:
    """`models` models of `layers` layers (the last one is the same in all), each pulled `day` seconds after another."""
    Store.open(folder).close()
    rows: list[tuple[str, str | bytes]] = []
    shared = "sha256:" + sha256(b"shared").hexdigest()
    digests = {Digest.parse(shared)}
    proofs = {}
    for number in range(models):
        own = ["sha256:" + sha256(f"{number} {layer}".encode()).hexdigest() for layer in range(layers - 1)]
        body = json.dumps(
            {"layers": [{"mediaType": "application/x", "digest": d, "size": 1000} for d in [*own, shared]]}
        )
        record = ManifestRecord.parse(body.encode(), "application/json", now=number * day)
        assert record is not None
        digests.update(record.digests)
        name = Name("registry.ollama.ai", f"library/m{number}", "latest")
        value = manifest_value(record._replace(pulled=number * day))
        rows += [(body_key(record.digest), body.encode()), (manifest_key(name), value)]
        rows.append((members_key(*name.place), " ".join(record.digests)))
        path = folder / "public" / "manifests" / name.host / name.repository / name.reference
        path.parent.mkdir(parents=True)
        path.write_bytes(record.body)
    for digest in digests:
        path = folder / "public" / "blobs" / digest.file_name
        with path.open("wb") as file:
            os.truncate(file.fileno(), 1000)
        status = path.stat()
        blob = BlobRecord(1000, True, True, status.st_mtime_ns, status.st_ino, 0.0)
        rows.append((blob_key(digest), blob_value(blob)))
        proofs[digest] = Proof(1000, status.st_mtime_ns, status.st_ino)
    Proofs(folder).tidy(proofs)
    with sqlite3.connect(folder / "index" / "cache.db") as connection:
        connection.executemany(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value) VALUES (?, 1, 0, 0, 0, 1, ?)",
            rows,
        )
    connection.close()
