"""ingest: what a journal is worth after a crash."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable
from pullthrough.core.intervals import Intervals
from pullthrough.runtime import fallocate, platform
from pullthrough.runtime.window_map import WindowMap
from pullthrough.store import ingest as module
from pullthrough.store.ingest import SLOW_STRETCH, Ingest

DIGEST = Digest("ab" * 32)


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say which boot of the machine this is."""

    def set_boot(name: str) -> None:
        monkeypatch.setattr(platform, "boot_id", lambda: name)

    set_boot("first")
    return set_boot


def begin(folder: Path, size: int = 16) -> Ingest:
    ingest = Ingest(folder, DIGEST)
    ingest.begin(size)
    return ingest


def reopen(folder: Path) -> list[tuple[int, int]] | None:
    ingest = Ingest(folder, DIGEST)
    found = ingest.resume()
    ingest.close()
    return None if found is None else list(found[1])


def test_an_old_journal_does_not_count(tmp_path: Path) -> None:
    """Beginning anew replaces the journal of the same blob, all of it."""
    ingest = begin(tmp_path)
    ingest.write_at(0, b"0123")
    ingest.mark([(0, 4)])
    ingest.close()
    begin(tmp_path).close()
    assert reopen(tmp_path) == []


def test_a_journal_that_is_a_link(tmp_path: Path) -> None:
    """It is replaced, not followed."""
    (tmp_path / f"{DIGEST.file_name}.journal").symlink_to(tmp_path / "elsewhere")
    begin(tmp_path).close()
    assert not (tmp_path / "elsewhere").exists()
    assert reopen(tmp_path) == []


def test_nothing_to_resume(tmp_path: Path) -> None:
    """No partial, no resume."""
    assert Ingest(tmp_path, DIGEST).resume() is None


def test_what_has_to_be_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that comes and is published between two flushes waits for no journal; one that was flushed leaves none."""
    synced: list[str] = []
    monkeypatch.setattr(platform, "sync_data", lambda _: synced.append("file"))
    monkeypatch.setattr(platform, "sync_folder", lambda _: synced.append("folder"))

    def steps() -> list[str]:
        done = synced.copy()
        synced.clear()
        return done

    quick = begin(tmp_path)
    quick.write_at(0, bytes(16))
    quick.forget()
    quick.close()
    assert steps() == []
    begin(tmp_path).close()
    again = begin(tmp_path)  # over a journal that may speak of bytes
    assert steps() == ["file", "folder"]
    again.discard()
    again.close()
    assert steps() == ["folder"]
    slow = begin(tmp_path)
    assert steps() == []
    slow.flush(Intervals())
    assert steps() == ["file", "file", "folder"]
    slow.flush(Intervals())
    assert steps() == ["file", "file"]
    slow.forget()
    slow.close()
    assert steps() == ["folder"]


def test_same_boot_believes_what_was_written(tmp_path: Path, boot: Callable[[str], None]) -> None:
    """After `kill -9` the kernel still has every byte that was written."""
    ingest = begin(tmp_path)
    ingest.write_at(4, b"4567")
    ingest.mark([(4, 8)])
    assert reopen(tmp_path) == [(4, 8)]
    assert (tmp_path / f"{DIGEST.file_name}.partial").read_bytes()[4:8] == b"4567"


def test_other_boot_believes_what_was_flushed(tmp_path: Path, boot: Callable[[str], None]) -> None:
    """After a power loss only flushed bytes count."""
    ingest = begin(tmp_path)
    ingest.write_at(0, b"0123")
    ingest.mark([(0, 4)])
    ingest.flush(Intervals([(0, 4)]))
    ingest.write_at(4, b"4567")
    ingest.mark([(4, 8)])
    boot("second")
    assert reopen(tmp_path) == [(0, 4)]


def test_written_stays_unflushed_through_a_restart(tmp_path: Path, boot: Callable[[str], None]) -> None:
    """A daemon's restart does not turn written bytes into durable ones."""
    begin(tmp_path).mark([(4, 8)])
    assert reopen(tmp_path) == [(4, 8)]
    boot("second")
    assert reopen(tmp_path) == []


def test_unknown_boot_is_another_boot(tmp_path: Path, boot: Callable[[str], None]) -> None:
    """Where the system cannot tell, nothing unflushed is believed."""
    boot("")
    begin(tmp_path).mark([(4, 8)])
    assert reopen(tmp_path) == []


@given(cut=st.integers(0, 400), junk=st.binary(max_size=20))
def test_a_torn_tail_costs_only_itself(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    """Cut or overwritten anywhere, a journal tells a prefix of the truth, never more."""
    folder = tmp_path_factory.mktemp("ingest")
    ingest = begin(folder)
    stages: list[list[tuple[int, int]]] = [[]]
    for start in (0, 8, 4, 12):
        ingest.mark([(start, start + 4)])
        stages.append(list(Intervals((s, s + 4) for s in (0, 8, 4, 12)[: len(stages)])))
    ingest.close()
    journal = folder / f"{DIGEST.file_name}.journal"
    journal.write_bytes(journal.read_bytes()[:cut] + junk)
    assert reopen(folder) in [None, *stages]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder, name: (folder / f"{name}.partial").unlink(), id="partial gone"),
        pytest.param(lambda folder, name: os.truncate(folder / f"{name}.partial", 3), id="partial cut"),
        pytest.param(lambda folder, name: (folder / f"{name}.journal").write_bytes(b""), id="journal empty"),
        pytest.param(lambda folder, name: (folder / f"{name}.journal").write_bytes(os.urandom(99)), id="noise"),
        pytest.param(
            lambda folder, name: (folder / f"{name}.journal").write_bytes(
                (folder / f"{name}.journal").read_bytes().replace(b"abab", b"cdcd")
            ),
            id="another blob's",
        ),
    ],
)
def test_a_partial_that_does_not_fit_is_not_used(tmp_path: Path, damage: Callable[[Path, str], object]) -> None:
    """A foreign or broken partial is worth nothing, and no error."""
    ingest = begin(tmp_path)
    ingest.mark([(4, 8)])
    ingest.close()
    damage(tmp_path, DIGEST.file_name)
    assert reopen(tmp_path) is None


def test_a_foreign_journal_line_beyond_the_end(tmp_path: Path) -> None:
    """Intervals outside the blob make the journal foreign."""
    ingest = begin(tmp_path)
    ingest.mark([(12, 99)])
    ingest.close()
    assert reopen(tmp_path) is None


def test_a_file_among_the_blobs_is_read_where_it_is(tmp_path: Path) -> None:
    """A blob without proof is whole, to be hashed, and not removed with what a recording leaves."""
    stranger = tmp_path / "blobs" / DIGEST.file_name
    stranger.parent.mkdir()
    stranger.write_bytes(b"0123456789")
    ingest = Ingest(tmp_path, DIGEST, stranger)
    assert ingest.resume() == (10, Intervals([(0, 10)]))
    assert (ingest.in_place, ingest.partial_path) == (True, stranger)
    ingest.flush(Intervals([(0, 10)]))
    ingest.discard()
    assert stranger.exists()
    ingest.close()
    stranger.unlink()
    stranger.symlink_to(tmp_path)
    assert Ingest(tmp_path, DIGEST, stranger).resume() is None


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused write says which blob and why."""

    def refuse(descriptor: int, offset: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    ingest = begin(tmp_path)
    monkeypatch.setattr(platform, "write_at", refuse)
    with pytest.raises(StoreUnwritable, match=rf"recording {DIGEST}: .*No space left"):
        ingest.write_at(0, b"x")


def test_a_blob_that_cannot_begin_keeps_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody closes what has not begun."""
    opened: set[int] = set()
    open_descriptor, close = platform.open_descriptor, os.close

    def opening(*arguments: object) -> int:
        descriptor = open_descriptor(*arguments)  # type: ignore[arg-type]
        opened.add(descriptor)
        return descriptor

    def closing(descriptor: int) -> None:
        opened.discard(descriptor)
        close(descriptor)

    def refuse(descriptor: int, size: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(platform, "open_descriptor", opening)
    monkeypatch.setattr(os, "close", closing)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(StoreUnwritable, match="File too large"):
        begin(tmp_path)
    assert opened == set()


def test_readers_keep_the_descriptor(tmp_path: Path) -> None:
    """A reader's descriptor outlives the ingest and the file's name."""
    ingest = begin(tmp_path)
    ingest.write_at(0, b"0123")
    assert ingest.file is not None
    shared = ingest.file.acquire()
    ingest.close()
    ingest.discard()
    assert platform.read_at(shared.descriptor, 0, 4) == b"0123"
    shared.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(shared.descriptor)


def test_a_journal_that_cannot_be_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginning again fails by its name, and flushing after it is no other error."""

    def refuse(descriptor: int, offset: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    ingest = begin(tmp_path)
    monkeypatch.setattr(platform, "write_at", refuse)
    with pytest.raises(StoreUnwritable, match="No space left"):
        ingest.begin_again()
    ingest.flush(Intervals())
    ingest.close()


def test_a_torn_record_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that the disk took in part costs nothing that is journalled after it."""
    write_at = platform.write_at

    def tear(descriptor: int, offset: int, data: bytes | memoryview) -> None:
        write_at(descriptor, offset, data[:9])
        raise OSError(28, "No space left on device")

    ingest = begin(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "write_at", tear)
        with pytest.raises(StoreUnwritable, match="No space left"):
            ingest.mark([(0, 4)])
    ingest.mark([(4, 8)])
    ingest.close()
    assert reopen(tmp_path) == [(4, 8)]


# --- room taken ahead


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of a window, small, on a disk where room can be taken ahead."""
    size = 1 << 20
    descriptor = platform.open_descriptor(tmp_path / "probe", os.O_RDWR | os.O_CREAT)
    try:
        if not (fallocate.reserve(descriptor, 0, size) and fallocate.give_back(descriptor, 0, size)):
            pytest.skip("no fallocate(2) here")
    finally:
        os.close(descriptor)
    for name in ("WINDOW", "SMALL"):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module, "_SLACK", size // 2)
    return size


def taken(folder: Path) -> int:
    return platform.allocated((folder / f"{DIGEST.file_name}.partial").stat())


def test_room_is_taken_by_windows_and_given_back(tmp_path: Path, windows: int) -> None:
    """What has come stays, whatever was taken around it."""
    ingest = begin(tmp_path, 8 * windows + 1)
    data = b"x" * 65536
    ingest.write_at(0, data)
    before = taken(tmp_path)
    assert before < windows
    ingest.reserves = True
    ingest.write_at(3 * windows - 10, data)
    ingest.write_at(8 * windows, b"y")
    assert 2 * windows <= taken(tmp_path) - before <= 2 * windows + 65536
    assert ingest.file is not None
    assert os.fstat(ingest.file.descriptor).st_size == 8 * windows + 1
    present = Intervals([(0, 65536), (3 * windows - 10, 3 * windows - 10 + 65536), (8 * windows, 8 * windows + 1)])
    ingest.give_back(present)
    assert taken(tmp_path) < before + 3 * 65536
    assert platform.read_at(ingest.file.descriptor, 3 * windows - 10, 65536) == data
    assert platform.read_at(ingest.file.descriptor, 0, 65536) == data
    assert platform.read_at(ingest.file.descriptor, 8 * windows, 9) == b"y"
    ingest.close()


def test_small_blobs_take_no_room_ahead(tmp_path: Path, windows: int) -> None:
    """They come in few writes."""
    ingest = begin(tmp_path, windows - 1)
    ingest.reserves = True
    ingest.write_at(0, b"x")
    assert taken(tmp_path) < windows // 2
    ingest.close()


def test_room_of_a_killed_daemon_is_given_back_at_the_next_start(tmp_path: Path, windows: int) -> None:
    """Nobody may ever go on with its recording."""
    ingest = begin(tmp_path, 4 * windows)
    ingest.reserves = True
    ingest.write_at(windows, b"x" * 10)
    ingest.mark([(windows, windows + 10)])
    assert taken(tmp_path) >= windows
    Ingest.sweep(tmp_path, oldest=0.0)
    assert taken(tmp_path) < windows // 2
    assert reopen(tmp_path) == [(windows, windows + 10)]
    ingest.close()


def test_a_disk_that_takes_no_room_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are written all the same."""
    monkeypatch.setattr(fallocate, "_fallocate", lambda *_: False)
    monkeypatch.setattr(module, "SMALL", 0)
    ingest = begin(tmp_path)
    ingest.reserves = True
    ingest.write_at(4, b"4567")
    ingest.give_back(Intervals([(4, 8)]))
    assert (tmp_path / f"{DIGEST.file_name}.partial").read_bytes()[4:8] == b"4567"
    ingest.close()


# --- on a disk that fills gaps with zeros

GAPS = 40 << 20
LARGE = Digest("1" * 64)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mebibyte each."""
    monkeypatch.setattr(module, "WindowMap", partial(WindowMap, window=1 << 20))


def grow(folder: Path, offsets: Iterable[int], *, fresh: bool = True) -> Ingest:
    """What a recording of GAPS bytes has done that got a mebibyte at each of these offsets."""
    ingest = Ingest(folder, LARGE, fills_gaps=True)
    if fresh:
        ingest.begin(GAPS)
    else:
        assert ingest.resume() is not None
    for offset in offsets:
        ingest.write_at(offset, bytes([offset >> 20]) * (1 << 20))
        ingest.mark([(offset, offset + (1 << 20))])
    return ingest


@pytest.mark.usefixtures("small_windows")
def test_a_file_grows_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write skips more than some windows; what was written is there after a restart, and in order at the end.

    Little of it is made durable at a time: some disks do nothing else meanwhile.
    """
    offsets = [(number * 27 % 40) << 20 for number in range(40)]
    ingest = grow(tmp_path, offsets[:3])
    assert ingest.partial_path.stat().st_size == 3 << 20
    ingest.close()
    ingest = grow(tmp_path, offsets[3:20], fresh=False)
    ingest.close()
    ingest = Ingest(tmp_path, LARGE, fills_gaps=True)
    assert (found := ingest.resume()) is not None
    assert list(found[1]) == list(Intervals((offset, offset + (1 << 20)) for offset in offsets[:20]))
    ingest.close()
    ingest = grow(tmp_path, offsets[20:], fresh=False)
    assert ingest.file is not None
    assert ingest.file.read(39 << 20, GAPS) == bytes([39]) * (1 << 20)
    buffer, position = memoryview(bytearray(3 << 20)), 0
    whole = b"".join(bytes([number]) * (1 << 20) for number in range(40))
    while position < GAPS:
        count = ingest.file.read_into(buffer[: GAPS - position], position)
        assert count
        assert buffer[:count] == whole[position : position + count]
        position += count
    sizes: list[int] = []
    monkeypatch.setattr(platform, "sync_data", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    position = 0
    while position < GAPS:
        position = ingest.arrange(position)
    assert sizes == list(range(SLOW_STRETCH, GAPS + 1, SLOW_STRETCH))
    assert ingest.finished_path != ingest.partial_path
    assert ingest.finished_path.read_bytes() == b"".join(bytes([number]) * (1 << 20) for number in range(40))
    ingest.forget()
    ingest.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_grows_in_order_is_not_copied(tmp_path: Path) -> None:
    """Its places are where it belongs, though several connections bring it."""
    ingest = grow(tmp_path, [(number ^ 5) << 20 for number in range(40)])
    assert ingest.arrange(0) == GAPS
    assert ingest.finished_path == ingest.partial_path
    assert ingest.partial_path.read_bytes() == b"".join(bytes([number]) * (1 << 20) for number in range(40))
    ingest.close()


@pytest.mark.usefixtures("small_windows")
def test_what_a_crash_cut_off_is_missing(tmp_path: Path) -> None:
    """The file ends before what the journal says: only that is fetched again."""
    ingest = grow(tmp_path, [0, 30 << 20])
    ingest.close()
    os.truncate(ingest.partial_path, (1 << 20) + 5)
    ingest = Ingest(tmp_path, LARGE, fills_gaps=True)
    assert (found := ingest.resume()) is not None
    assert list(found[1]) == [(0, 1 << 20), (30 << 20, (30 << 20) + 5)]
    ingest.close()
    Ingest.sweep(tmp_path, oldest=0)
    assert ingest.partial_path.stat().st_size == (1 << 20) + 5


def test_small_files_and_good_disks_have_gaps(tmp_path: Path) -> None:
    """Only a large one of a disk that fills gaps may take twice its size; a good disk has all of it at once."""
    assert Ingest(tmp_path, LARGE, fills_gaps=True).takes(72 << 20) == 72 << 20
    assert Ingest(tmp_path, LARGE, fills_gaps=True).takes((72 << 20) + 1) == (144 << 20) + 2
    ingest = Ingest(tmp_path, LARGE)
    assert ingest.takes(1 << 40) == 1 << 40
    ingest.begin(GAPS)
    assert ingest.partial_path.stat().st_size == GAPS
    ingest.close()


def test_the_longest_file(tmp_path: Path) -> None:
    """A blob that is longer than files may be there is refused before anything is done for it."""
    ingest = Ingest(tmp_path, LARGE, largest=100)
    assert ingest.takes(100) == 100
    with pytest.raises(StoreUnwritable, match="101 bytes are more than a file of its disk may have"):
        ingest.takes(101)
