"""What a store holds, read from its index beside the daemon that runs on it.

Invariant: nothing is changed and no lock is taken, so it is true of one moment only: who acts on it looks again.
Knows no bytes of blobs.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pullthrough.digest import Digest
from pullthrough.errors import StoreError, TransferRefused
from pullthrough.index import Index
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.storefolder import FORMAT, MARKER


@dataclass(frozen=True, slots=True)
class Inventory:
    """Blobs and manifests of the store in `folder`."""

    folder: Path
    blobs: Mapping[Digest, BlobRecord]
    manifests: Mapping[Name, ManifestRecord]

    @classmethod
    def read(cls, folder: Path) -> "Inventory":
        """StoreError where there is no sound store."""
        try:
            found = json.loads((folder / MARKER).read_text())["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"expected an ollama-cache store in {folder}, got none") from error
        if found != FORMAT:
            raise StoreError(f"store {folder}: expected format {FORMAT} in {MARKER}, got {found!r}")
        with closing(Index(folder / "index")) as index:
            contents = index.load()
        return cls(folder, contents.blobs, contents.manifests)

    def blob_path(self, digest: Digest) -> Path:
        return self.folder / "blobs" / digest.file_name

    def select(self, model: str) -> dict[Name, ManifestRecord]:
        """The models of that name, as it is typed, or pattern; `latest` where it has no tag. TransferRefused for none.

        A manifest that was asked for by its digest alone is no model.
        """
        found = {
            name: record
            for name, record in self.manifests.items()
            if ":" not in name.reference and (name.matches(model) or name.matches(f"{model}:latest"))
        }
        if not found:
            raise TransferRefused(f"expected a model of the store, got {model!r}")
        return found
