"""Convert a store of an earlier format to the current one, in place.

Invariant: a conversion that is interrupted starts over, because the marker changes last; no blob is copied or hashed.
Access rights come from the old index: without one, blobs are private until upstream grants them. The caller must hold
the store's lock.
"""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from pullthrough.runtime import platform
from pullthrough.store import rows
from pullthrough.store.blob_files import BlobFiles
from pullthrough.store.index import DATABASE
from pullthrough.store.layout import FORMAT, folds_case, save_pins, write_marker
from pullthrough.store.manifest_files import ModelFiles
from pullthrough.store.ollama_dir import BLOBS, parse_blob_path
from pullthrough.store.proofs import Proof, Proofs
from pullthrough.store.rows import Contents

_log = logging.getLogger(__name__)

_FORMER: Final = BLOBS
"""Where all blobs were in format 1."""


def migrate(folder: Path, found: int) -> None:
    """Convert the store from format `found` to ours. Raises StoreError, OSError."""
    if found == FORMAT:
        return
    _log.info("store %s: converting format %d to %d", folder, found, FORMAT)
    known, pins = _read(folder / "index")
    files = BlobFiles(folder)
    with contextlib.suppress(FileNotFoundError):
        for path in list((folder / _FORMER).iterdir()):
            if (digest := parse_blob_path(f"{BLOBS}/{path.name}")) is not None:
                record = known.blobs.get(digest)
                os.replace(path, files.path(digest, public=record is not None and record.public))
        with contextlib.suppress(OSError):  # leave files that are not ours where they are
            (folder / _FORMER).rmdir()
    held = {digest: record for digest, record in known.blobs.items() if record.held}
    # Without inodes: the store may have been copied since.
    Proofs(folder).tidy({digest: Proof(r.size or 0, r.mtime_ns, 0) for digest, r in held.items()})
    models = ModelFiles(folder, folds_case=folds_case(folder), durable=False)
    for model, manifest in known.manifests.items():
        models.put(model, manifest.body, denied=manifest.denied)
    models.close()
    _renew(folder / "index")
    save_pins(folder, pins)
    platform.sync_all()
    write_marker(folder)


def _read(folder: Path) -> tuple[Contents, set[str]]:
    """Return the contents of the old index, and its pins; nothing if it is not sound."""
    try:
        with contextlib.closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
            rows.rename_aliases(connection.execute)
            return rows.read(connection.execute), rows.read_pins(connection.execute)
    except rows.UNSOUND as error:
        _log.warning("the index in %s cannot be read (%s): blobs are private until upstream grants them", folder, error)
        return Contents({}, {}, {}, {}, {}), set()


def _renew(folder: Path) -> None:
    """Convert the index to the current version, keeping its facts. Opening it will find any damage."""
    with (
        contextlib.suppress(*rows.UNSOUND),
        contextlib.closing(sqlite3.connect(folder / DATABASE)) as connection,
        connection,
    ):
        connection.execute("DELETE FROM Cache WHERE key GLOB 'pin *' OR key IS ?", (rows.VERSION_KEY,))
        connection.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value) VALUES (?, 1, 0, 0, 0, 1, ?)",
            (rows.VERSION_KEY, rows.VERSION),
        )
