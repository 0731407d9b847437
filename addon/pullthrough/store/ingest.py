"""One blob being recorded: a sparse file, and a journal of which bytes are written and which are durable.

Invariant: what `resume` reports present was written before it was journalled. During the same boot "written" is
enough (the kernel has it even after `kill -9`); after a reboot only what was flushed counts. None of these bytes are
trusted: a resumed prefix is hashed again like all others.

The journal is lines of `<crc32, 8 hex> <JSON>`: a header, then `{"w": [start, stop]}` for a written interval,
`{"f": [[start, stop], …]}` for all that was durable at that moment and, on disks that fill gaps, `{"p": [window, …]}`
for the windows that got the next places. Reading stops at the first line whose checksum is wrong, so a torn tail loses
only what it described.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest, StoreUnwritable
from pullthrough.core.intervals import Intervals
from pullthrough.runtime import fallocate, file_system, platform
from pullthrough.runtime.journal_lines import line_of, records_of, replace_file
from pullthrough.runtime.shared_file import SharedFile, at_once
from pullthrough.runtime.window_map import IN_ORDER, WindowMap

_log = logging.getLogger(__name__)

FORMAT: Final = 1

INGEST: Final = "ingest"
QUARANTINE: Final = "quarantine"
WINDOW: Final = 256 << 20
"""Bytes of disk space that are reserved at a time while a blob is pulled."""
SMALL: Final = 8 << 20
"""Smaller blobs come in few writes, which the file system keeps together by itself."""
_SLACK: Final = 1 << 20
STRETCH: Final = 64 << 20
"""Bytes that any disk makes durable in a moment."""
SLOW_STRETCH: Final = 8 << 20  # USB sticks and cards, whose drivers do one thing at a time

PARTIAL: Final = ".partial"
JOURNAL: Final = ".journal"
WHOLE: Final = ".whole"
"""The copy, in order, of a partial whose bytes are not."""


class Ingest:
    """The partial file and journal of `digest`. All methods may block on the disk and raise StoreUnwritable.

    Call `resume` or `begin` first: they set `file`. Several threads may write at once as long as their intervals do
    not overlap.
    """

    def __init__(
        self,
        folder: Path,
        digest: Digest,
        stranger: Path | None = None,
        fills_gaps: bool = False,
        largest: int | None = None,
        change: Callable[[Callable[[], object]], None] = at_once,
    ) -> None:
        """`stranger` is where an unverified file of this blob may lie; `resume` uses it in place.

        On a disk that `fills_gaps`, a large file grows at its end, and `arrange` puts it in order. `largest` is the
        longest file the disk can hold (bytes); `change` runs the call that closes a file.
        """
        self.digest = digest
        self._share = partial(SharedFile, change=change)
        self._fills_gaps = fills_gaps
        self.stretch = SLOW_STRETCH if fills_gaps else STRETCH
        """Bytes that this disk makes durable in a moment."""
        self._largest = largest
        self.in_place = False
        """Whether the bytes already lie among the blobs and need only be verified."""
        self._stranger = stranger
        self.partial_path = folder / f"{digest.file_name}{PARTIAL}"
        self.journal_path = folder / f"{digest.file_name}{JOURNAL}"
        self._whole_path = folder / f"{digest.file_name}{WHOLE}"
        self.file: SharedFile | None = None
        self._journal: int | None = None
        self._journal_size = 0
        self._journal_lock = threading.Lock()
        self._is_durable = False
        """Whether the journal would survive a power cut, so that removing it must be made durable too."""
        self.reserves = False
        """Whether disk space is reserved ahead of the writes, because the whole blob is on its way."""
        self._windows: set[int] = set()
        self._write_lock = threading.Lock()
        """The kernel also runs one write to a file at a time, but threads that wait for it there spin."""

    @staticmethod
    def sweep(folder: Path, *, oldest: float) -> None:
        """Remove what no recording resumes: incomplete pairs, temporaries, and pairs last written before `oldest`."""
        for pattern in (".sha256-*", ".manifest-*", ".verified.*", f"*{WHOLE}"):
            for path in folder.glob(pattern):
                path.unlink()
        file_system.sweep(folder)
        for name in {path.stem for path in folder.glob("sha256-*")}:
            pair = [folder / f"{name}{JOURNAL}", folder / f"{name}{PARTIAL}"]
            # An adopted blob keeps the mtime of its recording: the journal's tells when it became a partial.
            times = [path.stat().st_mtime for path in pair if path.exists()]
            if len(times) < len(pair) or max(times) < oldest:
                for path in pair:
                    path.unlink(missing_ok=True)
            else:
                Ingest._trim(*pair)

    @staticmethod
    def _trim(journal: Path, partial: Path) -> None:
        """Give back the space that a killed daemon had reserved."""
        with contextlib.suppress(OSError, InvalidRequest):
            ingest = Ingest(partial.parent, Digest.parse(partial.stem))
            found = ingest._read_journal()
            if found is None or found[3] is not None or platform.allocated(partial.stat()) <= found[1].size + _SLACK:
                return
            descriptor = platform.open_descriptor(partial, os.O_RDWR)
            try:
                for gap in found[1].missing(0, found[0]):
                    fallocate.give_back(descriptor, *gap)
            finally:
                os.close(descriptor)

    def resume(self, permits: Callable[[int], bool] = lambda _size: True) -> tuple[int, Intervals] | None:
        """Return (size, what is present) of the partial that an earlier recording left; None if there is none to use.

        A partial whose size `permits` rejects is not used.
        """
        if self._stranger is not None:
            try:
                descriptor = platform.open_regular(self._stranger)
            except OSError:
                pass  # absent, or not readable
            else:
                self.in_place, self.partial_path = True, self._stranger
                size = os.fstat(descriptor).st_size
                self.file = self._share(descriptor, size).acquire()
                return size, Intervals([(0, size)])
        found = self._read_journal()
        if found is None:
            return None
        size, present, flushed, windows = found
        if not permits(size):
            _log.warning("recording %s: %d bytes cannot be its length; beginning anew", self.digest.short, size)
            return None
        try:
            descriptor = platform.open_descriptor(self.partial_path, os.O_RDWR)
        except OSError:
            return None
        length = os.fstat(descriptor).st_size
        if windows is not None:
            for gap in windows.beyond(length, size):
                present.remove(*gap)
                flushed.remove(*gap)
        elif length != size:
            os.close(descriptor)
            return None
        try:
            self._write_journal(size, present, flushed, windows)
        except OSError as error:
            os.close(descriptor)
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        self.file = self._share(descriptor, size, windows=windows).acquire()
        return size, present

    def takes(self, size: int) -> int:
        """Return how much disk space a recording of `size` bytes may need.

        Raises StoreUnwritable if the disk cannot hold so long a file.
        """
        if self._largest is not None and size > self._largest:
            raise StoreUnwritable(f"recording {self.digest}: {size} bytes are more than a file of its disk may have")
        return 2 * size if self._fills_gaps and size > IN_ORDER else size

    def begin(self, size: int) -> None:
        """Start from nothing: a sparse file of `size` bytes, or one that grows."""
        windows = WindowMap() if self._fills_gaps else None
        try:
            descriptor = platform.open_descriptor(self.partial_path, os.O_RDWR | os.O_CREAT)
            try:
                # An old journal is replaced durably before the bytes it describes change. Where there is none, a small
                # blob may be written and published before anything here has to be durable.
                self._write_journal(size, Intervals(), Intervals(), windows, may_be_new=True)
                os.ftruncate(descriptor, 0)
                if windows is None:
                    os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                self._close_journal()
                raise
        except OSError as error:
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        self.file = self._share(descriptor, size, windows=windows).acquire()

    def begin_again(self) -> None:
        """Begin the journal again: nothing written so far counts."""
        assert self.file is not None
        try:
            with self._journal_lock:
                self._write_journal(self.file.size, Intervals(), Intervals(), self.file.windows)
        except OSError as error:
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write recorded bytes."""
        assert self.file is not None
        view, start, stop = memoryview(data), offset, offset + len(data)
        with self._write_lock:
            if self.file.windows is not None:
                if placed := self.file.windows.make_places(start, stop):
                    self._append([{"p": placed}])
            elif self.reserves and self.file.size >= SMALL:
                self._reserve(start // WINDOW, (stop - 1) // WINDOW)
            try:
                while start < stop:
                    place, end = self.file.locate(start, stop)
                    platform.write_at(self.file.descriptor, place, view[start - offset : end - offset])
                    start = end
            except OSError as error:
                raise StoreUnwritable(f"recording {self.digest}: {error}") from error

    def arrange(self, position: int) -> int:
        """Copy the next stretch from `position` into the ordered file, durably; returns where the next one begins.

        Once that is the blob's size, `finished_path` is the whole file. All bytes must have been written before.
        """
        assert self.file is not None
        if self.file.windows is None or self.file.windows.in_order:
            return self.file.size
        stop = min(position + self.stretch, self.file.size)
        try:
            flags = os.O_WRONLY | os.O_CREAT | (0 if position else os.O_TRUNC)
            descriptor = platform.open_descriptor(self._whole_path, flags)
            try:
                self.file.copy(descriptor, position, stop)
                platform.sync_data(descriptor)  # syncing it all at the end would block the disk for long
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        return stop

    @property
    def finished_path(self) -> Path:
        """The file with the bytes in order, once all are written and arranged."""
        windows = self.file.windows if self.file is not None else None
        return self.partial_path if windows is None or windows.in_order else self._whole_path

    def _reserve(self, first: int, last: int) -> None:
        """Reserve space for these windows. A failure is ignored: the write then works without, or reports it."""
        assert self.file is not None
        for window in range(first, last + 1):
            if window not in self._windows:
                self._windows.add(window)
                start = window * WINDOW
                fallocate.reserve(self.file.descriptor, start, min(start + WINDOW, self.file.size))

    def give_back(self, present: Intervals) -> None:
        """Give back the space reserved for bytes that are not `present` and no longer expected."""
        assert self.file is not None
        for window in self._windows:
            start = window * WINDOW
            for gap in present.missing(start, min(start + WINDOW, self.file.size)):
                fallocate.give_back(self.file.descriptor, *gap)
        self._windows.clear()

    def mark(self, intervals: Iterable[tuple[int, int]]) -> None:
        """Journal that the intervals are written."""
        self._append([{"w": list(interval)} for interval in intervals])

    def flush(self, present: Intervals) -> None:
        """Make everything written so far durable, then journal that `present` (a copy) is."""
        self.sync()
        self._append([{"f": [list(interval) for interval in present]}])
        try:
            if self._journal is not None:
                platform.sync_data(self._journal)
                if not self._is_durable:
                    platform.sync_folder(self.journal_path.parent)
                    self._is_durable = True
        except OSError as error:
            raise StoreUnwritable(f"flushing {self.digest}: {error}") from error

    def sync(self) -> None:
        """Make everything written so far durable."""
        assert self.file is not None
        try:
            platform.sync_data(self.file.descriptor)
        except OSError as error:
            raise StoreUnwritable(f"flushing {self.digest}: {error}") from error

    def close(self) -> None:
        """Close the files; readers that share the descriptor keep it open."""
        with self._journal_lock:
            self._close_journal()
        if self.file is not None:
            self.file.release()
            self.file = None

    def forget(self) -> None:
        """Remove the journal, and the files of an arranged blob, whose bytes have been moved elsewhere."""
        with contextlib.suppress(OSError):
            self.journal_path.unlink()
            if self._is_durable:
                platform.sync_folder(self.journal_path.parent)
            if self.finished_path is self._whole_path:
                self._whole_path.unlink(missing_ok=True)
                self.partial_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove partial and journal; a file that lies among the blobs stays."""
        self.forget()
        if not self.in_place:
            with contextlib.suppress(OSError):
                self.partial_path.unlink()

    # --- the journal

    def _append(self, records: list[dict[str, Any]]) -> None:
        with self._journal_lock:
            if self._journal is None:
                return
            lines = b"".join(line_of(record) for record in records)
            try:
                platform.write_at(self._journal, self._journal_size, lines)
            except OSError as error:
                raise StoreUnwritable(f"journal of {self.digest}: {error}") from error
            self._journal_size += len(lines)

    def _close_journal(self) -> None:
        if self._journal is not None:
            journal, self._journal = self._journal, None
            os.close(journal)

    def _write_journal(
        self, size: int, present: Intervals, flushed: Intervals, windows: WindowMap | None, *, may_be_new: bool = False
    ) -> None:
        """Begin the journal, and keep it open for appending: in place of the old one atomically and durably.

        One that `may_be_new` is written as it is if there is no old one: it counts for nothing before its first line is
        whole.
        """
        self._close_journal()
        header = {"format": FORMAT, "digest": str(self.digest), "size": size, "boot": platform.boot_id()}
        lines = [line_of(header)]
        if windows is not None:
            lines.append(line_of({"p": windows.order}))
        lines += [line_of({"f": [list(interval) for interval in flushed]})]
        lines += [line_of({"w": list(interval)}) for interval in present]
        self._journal_size = sum(map(len, lines))
        self._is_durable = False
        if may_be_new:
            with contextlib.suppress(FileExistsError):
                self._journal = platform.open_descriptor(self.journal_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                platform.write_at(self._journal, 0, b"".join(lines))
                return
        replace_file(self.journal_path, lines)
        self._is_durable = True
        self._journal = platform.open_descriptor(self.journal_path, os.O_WRONLY)

    def _read_journal(self) -> tuple[int, Intervals, Intervals, WindowMap | None] | None:
        """Return (size, present, durable, places) up to the journal's first bad line; None if it is of no use."""
        try:
            lines = self.journal_path.read_bytes().split(b"\n")
        except OSError:
            return None
        try:
            header, *rest = records_of(lines)
            size = int(header["size"])
            if header["format"] != FORMAT or header["digest"] != str(self.digest) or size < 0:
                return None
            # An empty boot id means that the system cannot tell: assume another boot.
            same_boot = header["boot"] == platform.boot_id() != ""
            written, flushed = Intervals(), Intervals()
            order: list[int] | None = None
            for record in rest:
                if "f" in record:
                    flushed = Intervals((int(start), int(stop)) for start, stop in record["f"])
                elif "p" in record:
                    order = [*(order or ()), *map(int, record["p"])]
                else:
                    start, stop = record["w"]
                    written.add(int(start), int(stop))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        present = flushed.copy()
        if same_boot:
            for interval in written:
                present.add(*interval)
        if any(start < 0 or stop > size for start, stop in present):
            return None
        return size, present, flushed, WindowMap(order) if order is not None else None
