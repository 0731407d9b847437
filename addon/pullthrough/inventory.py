"""What a store holds, read from its index beside the daemon that runs on it.

Invariant: nothing is changed and no lock is taken, so it is true of one moment only: who acts on it looks again.
Knows no bytes of blobs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pullthrough.blobfiles import BlobFiles
from pullthrough.contents import look
from pullthrough.digest import Digest
from pullthrough.errors import TransferRefused
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.storefolder import check_marker, load_pins
from pullthrough.traffic import Totals


@dataclass(frozen=True, slots=True)
class Inventory:
    """What is known in the store in `folder`."""

    folder: Path
    blobs: Mapping[Digest, BlobRecord]
    """Those that are not here, too."""
    manifests: Mapping[Name, ManifestRecord]
    children: Mapping[Digest, ManifestRecord]
    """The manifests that stored lists refer to, as far as their bytes are here."""
    pins: frozenset[str]
    days: Mapping[int, Totals]

    @classmethod
    def read(cls, folder: Path) -> "Inventory":
        """What the index says. Raises StoreError where there is no sound store."""
        check_marker(folder)
        contents = look(folder / "index")
        pins = frozenset(load_pins(folder))
        return cls(folder, contents.blobs, contents.manifests, contents.children, pins, contents.days)

    def blob_path(self, digest: Digest) -> Path:
        """Where the blob's file lies, or would."""
        files, record = BlobFiles(self.folder), self.blobs.get(digest, BlobRecord())
        file = files.look(digest, public=record.public)
        return files.path(digest, public=record.public if file is None else file.public)

    def held_sizes(self) -> dict[Digest, int]:
        """The blobs whose files are still those that were verified, with their sizes."""
        files = BlobFiles(self.folder)
        found = {}
        for digest, record in self.blobs.items():
            file = files.look(digest, public=record.public)
            if file is not None and record.is_file(file.size, file.mtime_ns, file.inode):
                found[digest] = file.size
        return found

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
