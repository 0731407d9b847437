"""The proofs that blobs were verified: size, mtime and inode at that moment, a line for each in one file of the store.

    ollama-cache verified <inode of this file>
    <64 hexadecimal digits> <size> <mtime in ns> <inode>

A blob's last line counts. Copying a store (`cp -a`, `rsync -t`, a backup) keeps the times of files but not their
inodes. This file was copied if its first line names another inode than its own: then size and mtime are the proof, the
mtime perhaps rounded down.

Invariant: a line is believed whole or not at all. A line that was never flushed may be lost: the blob is hashed again.
"""

import contextlib
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Final, NamedTuple

from pullthrough.core.digest import Digest
from pullthrough.runtime import platform

VERIFIED: Final = "verified"

_HEAD: Final = re.compile(rb"ollama-cache verified ([0-9]{1,20})\n")
_LINE: Final = re.compile(rb"^([0-9a-f]{64}) ([0-9]{1,20}) ([0-9]{1,20}) ([0-9]{1,20})\n", re.MULTILINE)
_UNITS: Final = (1, 100, 1000, 10_000_000, 1_000_000_000, 2_000_000_000)
"""The units (ns) to which a copy may round times down: NTFS, archives, exFAT, GNU tar and FAT."""


class Proof(NamedTuple):
    """The facts about one blob's file when it was verified."""

    size: int
    mtime_ns: int
    inode: int
    """0 if it is unknown or from another disk."""

    def proves(self, size: int, mtime_ns: int, inode: int) -> bool:
        """Return whether these facts are the verified file's; copying may have rounded its mtime down."""
        if size != self.size or self.inode not in (inode, 0):
            return False
        units = (1,) if self.inode else _UNITS
        return any(mtime_ns == self.mtime_ns - self.mtime_ns % unit for unit in units)


class Proofs:
    """The proofs of one store. Any thread may call its methods, which wait for the disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VERIFIED
        self._temporary = folder / "ingest"
        self._lock = threading.Lock()
        self._known: dict[Digest, Proof] | None = None
        """The file's contents, until `tidy`."""
        self._added: dict[Digest, Proof] = {}
        """The proofs added since the start, until `tidy`."""
        self._is_tidy = False
        self._is_copy = False

    def load(self) -> None:
        """Read the file if that has not been done yet; a long one takes some tenths of a second."""
        with self._lock:
            self._read()

    def find(self, digest: Digest) -> Proof | None:
        """Return the blob's proof as last read from the file, or None."""
        with self._lock:
            return self._read().get(digest)

    def add(self, digest: Digest, proof: Proof) -> None:
        """Note that the blob was verified. Raises OSError if the disk refuses."""
        with self._lock:
            if not self._is_tidy:
                self._read()[digest] = self._added[digest] = proof
            if not self._path.exists():
                self._write({})
            descriptor = platform.open_descriptor(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                # The newline keeps a line that a crash has cut off from merging with this one.
                os.write(descriptor, b"\n" + _line(digest, proof))
            finally:
                os.close(descriptor)

    def tidy(self, proofs: dict[Digest, Proof]) -> None:
        """Keep only these proofs, and those added since the start. Raises OSError if the disk refuses."""
        with self._lock:
            wanted = proofs | self._added
            if self._read() != wanted or self._is_copy:
                self._write(wanted)
            self._known, self._added, self._is_tidy = None, {}, True

    def _read(self) -> dict[Digest, Proof]:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError), self._path.open("rb") as file:
                data = file.read()
                head = _HEAD.match(data)
                is_ours = head is not None and int(head[1]) == os.fstat(file.fileno()).st_ino
                self._is_copy = not is_ours
                for line in _LINE.finditer(data):  # one by one: building a list would hold the GIL for long
                    digest, size, mtime_ns, inode = line.groups()
                    proof = Proof(int(size), int(mtime_ns), int(inode) if is_ours else 0)
                    self._known[Digest(digest.decode())] = proof
        return self._known

    def _write(self, proofs: dict[Digest, Proof]) -> None:
        """Replace the file atomically."""
        temporary = self._temporary / f".{VERIFIED}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            head = f"ollama-cache verified {os.fstat(descriptor).st_ino}\n".encode()
            platform.write_at(descriptor, 0, head + b"".join(_line(*item) for item in proofs.items()))
            platform.sync_data(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, self._path)
        platform.sync_folder(self._path.parent)


def _line(digest: Digest, proof: Proof) -> bytes:
    return f"{digest.hex} {proof.size} {proof.mtime_ns} {proof.inode}\n".encode()
