"""The contents of a store, read from its index beside a running daemon, or from its files if there is no index.

Invariant: nothing is changed and no lock is taken, so a snapshot is true of one moment only: check again before acting.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError, TransferRefused
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.library.listing import View
from pullthrough.store.blob_files import BlobFiles, partials, quarantined
from pullthrough.store.layout import check_marker, folds_case, load_pins
from pullthrough.store.manifest_files import ModelFiles
from pullthrough.store.places import index_folder
from pullthrough.store.proofs import Proofs
from pullthrough.store.rows import Contents, look
from pullthrough.store.usage import Totals


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The knowledge in the store in `folder`."""

    folder: Path
    blobs: Mapping[Digest, BlobRecord]
    """All known blobs, held or not."""
    manifests: Mapping[Name, ManifestRecord]
    children: Mapping[Digest, ManifestRecord]
    """The manifests that stored lists refer to, as far as their bytes are stored."""
    pins: frozenset[str]
    days: Mapping[int, Totals]

    def view(self, pins: tuple[str, ...]) -> View:
        """Return the snapshot as a view for `listing`, with these pins."""
        return with_leftovers(View(self.manifests, self.blobs, pins, self.days, self.children), self.folder)

    @classmethod
    def read(cls, folder: Path, index_dir: Path | None = None) -> "Snapshot":
        """Read the index, or the files. Raises StoreError if there is no sound store.

        `index_dir` is the folder of the index; by default the kind of disk under the store decides.
        """
        check_marker(folder)
        try:
            contents = look(index_folder(folder, index_dir))
        except StoreError:
            contents = _read_files(folder)
        pins = frozenset(load_pins(folder))
        return cls(folder, contents.blobs, contents.manifests, contents.children, pins, contents.days)

    def blob_path(self, digest: Digest) -> Path:
        """Return where the blob's file is, or would be."""
        files, record = BlobFiles(self.folder), self.blobs.get(digest, BlobRecord())
        file = files.look(digest, public=record.public)
        return files.path(digest, public=record.public if file is None else file.public)

    def held_sizes(self) -> dict[Digest, int]:
        """Return the blobs whose files have not changed since they were verified, with their sizes."""
        files = BlobFiles(self.folder)
        found = {}
        for digest, record in self.blobs.items():
            file = files.look(digest, public=record.public)
            if file is not None and record.is_file(file.size, file.mtime_ns, file.inode):
                found[digest] = file.size
        return found

    def select(self, model: str) -> dict[Name, ManifestRecord]:
        """Return the models of a name, as users type it, or of a pattern; the tag is `latest` by default.

        A manifest that was only asked for by its digest is no model. Raises TransferRefused if there are none.
        """
        found = {
            name: record
            for name, record in self.manifests.items()
            if ":" not in name.reference and (name.matches(model) or name.matches(f"{model}:latest"))
        }
        if not found:
            raise TransferRefused(f"model '{model}' not found; see `ollama-cache ls`")
        return found


def with_leftovers(view: View, folder: Path) -> View:
    """Add what recordings (running or left over) and quarantine take on the disk. Waits for the disk."""
    unfinished, suspect = partials(folder).values(), quarantined(folder).values()
    return replace(view, unfinished=sum(size for size, _ in unfinished), quarantined=sum(size for size, _ in suspect))


def _read_files(folder: Path) -> Contents:
    """Return what the next start will build the index from."""
    proofs, blobs = Proofs(folder), {}
    try:
        for file in BlobFiles(folder).walk():
            record = BlobRecord(file.size, True, file.public, 0, 0, file.mtime_ns / 1e9)
            if (proof := proofs.find(file.digest)) is not None and proof.proves(file.size, file.mtime_ns, file.inode):
                record = record._replace(mtime_ns=file.mtime_ns, inode=file.inode)
            blobs[file.digest] = record
        with closing(ModelFiles(folder, folds_case=folds_case(folder))) as files:
            found = {name: document.record(None) for _, each in files.walk() for name, document in each.items()}
    except OSError as error:
        raise StoreError(f"store {folder}: expected files that can be read, got: {error}") from error
    manifests = {name: record for name, record in found.items() if record is not None}
    return Contents(blobs, manifests, {}, {}, {})
