"""Where the blobs of a store lie.

Knows the folders' names and nothing else of a store.
"""

from pathlib import Path


def blob_files(store: Path) -> list[Path]:
    """The files of all blobs, in either root."""
    return sorted(path for root in ("public", "private") for path in (store / root / "blobs").iterdir())


def blob_file(store: Path, name: str) -> Path:
    """The blob's file, or where it would be if it were public."""
    private = store / "private" / "blobs" / name
    return private if private.exists() else store / "public" / "blobs" / name
