"""One blob being recorded: a sparse file and the journal of what of it is written and what is durable.

Invariant: what `resume` reports present was written before it was journalled. In the boot that wrote it, "written" is
enough (the kernel has it even after `kill -9`); after another boot only what was flushed counts. Nothing here is
trusted to be right: a resumed prefix is hashed again like any other byte.

The journal is lines of `<crc32, 8 hex> <JSON>`: a header, then `{"w": [start, stop]}` for a written interval,
`{"f": [[start, stop], …]}` for all that was durable at that moment and, on disks that fill gaps, `{"p": [window, …]}`
for the windows that got the next places. Reading stops at the first line that does not check, so a torn tail costs what
it described and nothing else.
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
"""Bytes for which room on the disk is taken at once, where a blob is pulled."""
SMALL: Final = 8 << 20
"""Smaller blobs come in few writes: the file system finds them one place by itself."""
_SLACK: Final = 1 << 20
STRETCH: Final = 64 << 20
"""Bytes that any disk makes durable in a moment."""
SLOW_STRETCH: Final = 8 << 20  # sticks and cards, by drivers that do one thing at a time

PARTIAL: Final = ".partial"
JOURNAL: Final = ".journal"
WHOLE: Final = ".whole"
"""The bytes of a partial that is not in order, in order."""


class Ingest:
    """The partial file and journal of `digest`. All methods may block on the disk and raise StoreUnwritable.

    `resume` or `begin` comes first, then `file` is there. Writes from several threads may run at once as long as
    their intervals do not overlap.
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
        """`stranger` is where a file of this name may lie that is no hit: `resume` takes it where it is.

        On a disk that `fills_gaps` a large file grows at its end, and is put in order by `arrange`. `largest` is how
        long a file may be there; `change` closes one.
        """
        self.digest = digest
        self._share = partial(SharedFile, change=change)
        self._fills_gaps = fills_gaps
        self.stretch = SLOW_STRETCH if fills_gaps else STRETCH
        """How many bytes the disk makes durable in a moment."""
        self._largest = largest
        self.in_place = False
        """The bytes lie among the blobs already, and are only to be verified."""
        self._stranger = stranger
        self.partial_path = folder / f"{digest.file_name}{PARTIAL}"
        self.journal_path = folder / f"{digest.file_name}{JOURNAL}"
        self._whole_path = folder / f"{digest.file_name}{WHOLE}"
        self.file: SharedFile | None = None
        self._journal: int | None = None
        self._journal_size = 0
        self._journal_lock = threading.Lock()
        self._is_durable = False
        """The journal may outlive the power: what it says, and that it is gone, has to be made durable."""
        self.reserves = False
        """Room is taken ahead of what is written: all of the blob is on its way."""
        self._windows: set[int] = set()
        self._write_lock = threading.Lock()
        """The kernel has one write to a file at a time, too, and those that wait for it there spin."""

    @staticmethod
    def sweep(folder: Path, *, oldest: float) -> None:
        """Remove what no recording goes on with: halves, temporaries, and what was last written before `oldest`."""
        for pattern in (".sha256-*", ".manifest-*", ".verified.*", f"*{WHOLE}"):
            for path in folder.glob(pattern):
                path.unlink()
        file_system.sweep(folder)
        for name in {path.stem for path in folder.glob("sha256-*")}:
            pair = [folder / f"{name}{JOURNAL}", folder / f"{name}{PARTIAL}"]
            # An adopted blob keeps the time of its recording: its journal tells when it became a partial.
            times = [path.stat().st_mtime for path in pair if path.exists()]
            if len(times) < len(pair) or max(times) < oldest:
                for path in pair:
                    path.unlink(missing_ok=True)
            else:
                Ingest._trim(*pair)

    @staticmethod
    def _trim(journal: Path, partial: Path) -> None:
        """Give back the room that a daemon which was killed has taken ahead."""
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
        """(size, what is present) of the partial an earlier recording left; None if there is none to be used.

        One that has a size which the blob cannot have, by `permits`, is of no use.
        """
        if self._stranger is not None:
            try:
                descriptor = platform.open_regular(self._stranger)
            except OSError:
                pass  # it is not there, or nothing that can be read
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
            self._rewrite_journal(size, present, flushed, windows)
        except OSError as error:
            os.close(descriptor)
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        self.file = self._share(descriptor, size, windows=windows).acquire()
        return size, present

    def takes(self, size: int) -> int:
        """Return how much of the disk a recording of so many bytes may take. Raises StoreUnwritable if no file is
        so long.
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
                # An old journal is gone for good before what it speaks of changes. Where there is none a small blob may
                # come and be published before anything here has to be durable.
                self._rewrite_journal(size, Intervals(), Intervals(), windows, sync=self.journal_path.exists())
                os.ftruncate(descriptor, 0)
                if windows is None:
                    os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        self.file = self._share(descriptor, size, windows=windows).acquire()

    def begin_again(self) -> None:
        """Nothing that was written counts any more."""
        assert self.file is not None
        try:
            with self._journal_lock:
                self._rewrite_journal(self.file.size, Intervals(), Intervals(), self.file.windows)
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
        """Put a stretch more in order, durably, from `position`; returns up to where all is in order.

        Then `finished_path` is the whole file. All its bytes must be here.
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
                platform.sync_data(descriptor)  # all at the end would keep the disk from everybody for long
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreUnwritable(f"recording {self.digest}: {error}") from error
        return stop

    @property
    def finished_path(self) -> Path:
        """Where the bytes lie in order, once they are whole and arranged."""
        windows = self.file.windows if self.file is not None else None
        return self.partial_path if windows is None or windows.in_order else self._whole_path

    def _reserve(self, first: int, last: int) -> None:
        """Take room for these windows. Where it cannot be had the writing itself says so, or does without."""
        assert self.file is not None
        for window in range(first, last + 1):
            if window not in self._windows:
                self._windows.add(window)
                start = window * WINDOW
                fallocate.reserve(self.file.descriptor, start, min(start + WINDOW, self.file.size))

    def give_back(self, present: Intervals) -> None:
        """Give back the room that was taken for bytes that are not `present`: they are not expected any more."""
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
        """Let go of the files; readers that share the descriptor keep it."""
        with self._journal_lock:
            self._close_journal()
        if self.file is not None:
            self.file.release()
            self.file = None

    def forget(self) -> None:
        """Remove the journal, and bytes that are not in order: they have moved on."""
        with contextlib.suppress(OSError):
            self.journal_path.unlink()
            if self._is_durable:
                platform.sync_folder(self.journal_path.parent)
            if self.finished_path is self._whole_path:
                self._whole_path.unlink(missing_ok=True)
                self.partial_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove partial and journal; what lies among the blobs stays."""
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
            os.close(self._journal)
            self._journal = None

    def _rewrite_journal(
        self, size: int, present: Intervals, flushed: Intervals, windows: WindowMap | None, *, sync: bool = True
    ) -> None:
        """Put a fresh journal in place of the old, whole or not at all, open for more; durable if `sync`."""
        self._close_journal()
        header = {"format": FORMAT, "digest": str(self.digest), "size": size, "boot": platform.boot_id()}
        lines = [line_of(header)]
        if windows is not None:
            lines.append(line_of({"p": windows.order}))
        lines += [line_of({"f": [list(interval) for interval in flushed]})]
        lines += [line_of({"w": list(interval)}) for interval in present]
        replace_file(self.journal_path, lines, sync=sync)
        self._is_durable = sync
        self._journal_size = sum(map(len, lines))
        self._journal = platform.open_descriptor(self.journal_path, os.O_WRONLY)

    def _read_journal(self) -> tuple[int, Intervals, Intervals, WindowMap | None] | None:
        """(size, present, what of it is durable, what lies where) as far as the journal checks, else None."""
        try:
            lines = self.journal_path.read_bytes().split(b"\n")
        except OSError:
            return None
        try:
            header, *rest = records_of(lines)
            size = int(header["size"])
            if header["format"] != FORMAT or header["digest"] != str(self.digest) or size < 0:
                return None
            # An empty boot id means that the system cannot tell: then it is another boot.
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
