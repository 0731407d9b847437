"""places: what follows from a disk, and that a store is kept there accordingly."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from pullthrough.config import paths
from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError, StoreUnwritable
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.snapshot import Snapshot
from pullthrough.runtime import executors, file_system, owner_file, platform
from pullthrough.runtime.file_system import Facts
from pullthrough.runtime.owner_file import OwnerFile
from pullthrough.store import places
from pullthrough.store.places import Place, conclude
from pullthrough.store.store import Store
from tests.support.modelsfolder import manifest_of

DIGEST = Digest("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # of b"abc"


@pytest.mark.parametrize(
    ("facts", "given", "expected", "notes"),
    [
        (Facts(kind="ext4"), False, Place(), []),
        (Facts(kind="ext4"), True, Place(index_elsewhere=True), []),
        (Facts(kind="nfs4", shared=True), False, Place(index_elsewhere=True, shared=True), ["nfs4"]),
        (Facts(kind="x", databases=False), False, Place(index_elsewhere=True), ["can hold no database"]),
        (Facts(kind="fuseblk", holes=False), False, Place(in_order=True), ["fills gaps with zeros"]),
        (
            Facts(kind="vfat", holes=False, largest=99),
            False,
            Place(in_order=True, largest=99),
            ["fills gaps", "no files over 99 bytes: larger blobs are passed through"],
        ),
        (
            Facts(kind="ext4", problem="Read-only file system"),
            False,
            Place(unwritable=True),
            ["nothing can be written now (Read-only file system)"],
        ),
    ],
)
def test_conclusions(facts: Facts, given: bool, expected: Place, notes: list[str]) -> None:
    """From facts alone."""
    place = conclude(facts, index_given=given)
    assert [note in told for note, told in zip(notes, place.notes, strict=True)] == [True] * len(notes)
    assert expected == Place(
        index_elsewhere=place.index_elsewhere,
        shared=place.shared,
        unwritable=place.unwritable,
        in_order=place.in_order,
        largest=place.largest,
    )


def test_what_cannot_work() -> None:
    """It is refused with the reason and what to do."""
    with pytest.raises(StoreError, match=r"strange.*use another disk"):
        conclude(Facts(kind="strange", renames=False))


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a share whose locks everybody gets; the state folder is on a disk of this machine."""
    folder = tmp_path / "share"
    folder.mkdir()
    monkeypatch.setattr(file_system, "kind_of", lambda path: "nfs4" if path.is_relative_to(folder) else "ext4")
    monkeypatch.setattr(platform, "lock_exclusively", lambda file: True)
    monkeypatch.setattr(platform, "lock_folder", lambda descriptor: True)
    monkeypatch.setattr(paths, "default_index", lambda: tmp_path / "state")
    monkeypatch.setattr(places, "OwnerFile", partial(OwnerFile, renew_s=0.05, stale_s=0.5, settle_s=0.05))
    return folder


def fill(store: Store) -> None:
    """Record a blob."""
    ingest = store.ingest(DIGEST)
    ingest.begin(3)
    ingest.write_at(0, b"abc")
    ingest.close()
    store.publish(DIGEST, store.place(DIGEST, ingest.partial_path), now=1.0)


def test_a_share(share: Path, tmp_path: Path) -> None:
    """The blobs are there, the index and its lock are here; whoever looks finds both."""
    with closing(Store.open(share / "store")) as store:
        fill(store)
    (local,) = (tmp_path / "state").iterdir()
    assert (local / "index" / "cache.db").exists()
    assert (local / "lock").exists()
    assert not (share / "store" / "index" / "cache.db").exists()
    assert not (share / "store" / "owner").exists()
    assert Snapshot.read(share / "store").blobs[DIGEST].recorded == 1.0
    with closing(Store.open(share / "store")) as store:
        assert store.held(DIGEST)


def test_an_index_moves_along(tmp_path: Path, share: Path) -> None:
    """What an earlier version, or a local disk, had in the store is not lost."""
    with closing(Store.open(tmp_path / "local")) as store:
        fill(store)
    shutil.copytree(tmp_path / "local", share / "store")
    with closing(Store.open(share / "store")) as store:
        assert store.blob(DIGEST)
        assert store.known_blobs()[DIGEST].recorded == 1.0
    assert not (share / "store" / "index" / "cache.db").exists()


def test_two_daemons_on_a_share(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and told who has the store, though every lock is granted to it."""
    with closing(Store.open(share / "store")):
        monkeypatch.setattr(owner_file, "_machine", lambda: "another")
        with pytest.raises(StoreError, match=rf"in use by process \d+ on {owner_file.socket.gethostname()}; stop that"):
            Store.open(share / "store")
    Store.open(share / "store").close()


def test_taken_over(share: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever finds that another one has the store ends."""
    ended: list[tuple[Path, object]] = []
    monkeypatch.setattr(places, "_end", lambda folder, other: ended.append((folder, other)))
    with closing(Store.open(share / "store")):
        (share / "store" / "owner").unlink()
        monkeypatch.setattr(owner_file, "_machine", lambda: "another")
        other = OwnerFile(share / "store" / "owner", renew_s=0.05, stale_s=0.5, settle_s=0.3)
        for _ in range(100):
            if (other.take()) is None:
                break
            (share / "store" / "owner").unlink(missing_ok=True)
        other._renewing.join(0.4)  # type: ignore[union-attr]  # long enough for the first to look
        other.release()
    assert [folder for folder, _ in ended] == [share / "store"]


def test_no_disk_of_this_machine(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index on a share is refused with the option that mends it."""
    monkeypatch.setattr(paths, "default_index", lambda: share / "state")
    with pytest.raises(StoreError, match=r"whose disk is shared too \(nfs4\): name a folder .* ollama_cache_index_dir"):
        Store.open(share / "store")
    Store.open(share / "store", share.parent / "elsewhere").close()


def test_a_given_index(tmp_path: Path) -> None:
    """It is used on any disk; the lock is the store's, so that two indexes make no second daemon."""
    with closing(Store.open(tmp_path / "store", tmp_path / "one")) as store:
        fill(store)
        with pytest.raises(StoreError, match="in use by process"):
            Store.open(tmp_path / "store", tmp_path / "two")
    assert Snapshot.read(tmp_path / "store", tmp_path / "one").blobs[DIGEST].recorded == 1.0
    assert list((tmp_path / "store").glob("index/*.db")) == []


# --- disks that take nothing


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the disk under a store is full, as far as looking at it tells."""

    def change() -> None:
        facts = Facts(kind="ext4", problem="No space left on device", full=True)
        monkeypatch.setattr(file_system, "examine", lambda folder: facts)

    return change


def test_a_full_disk_at_start(tmp_path: Path, unwritable: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    """What is stored is a hit, the log tells, and nobody else gets the store meanwhile; the index stays as it was."""
    with closing(Store.open(tmp_path / "store")) as store:
        fill(store)
    before = (tmp_path / "store" / "index" / "cache.db").read_bytes()
    unwritable()
    with closing(Store.open(tmp_path / "store")) as store:
        assert store.held(DIGEST)
        assert "nothing can be written now (No space left on device)" in caplog.text
        with pytest.raises(StoreError, match="in use by process"):
            Store.open(tmp_path / "store")
    assert (tmp_path / "store" / "index" / "cache.db").read_bytes() == before


# --- one that may hang


def test_the_loop_asks_no_share(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a request wants of the store: another thread waits for the disk."""
    name = Name("registry.example", "library/tiny", "latest")
    store, mine, loop = share / "store", [], threading.current_thread()

    def watch(owner: object, word: str) -> None:
        work = getattr(owner, word)

        def do(*arguments: object, **options: object) -> object:
            if threading.current_thread() is loop and str(store) in str(arguments[0]):
                mine.append((word, *arguments))
            return work(*arguments, **options)

        monkeypatch.setattr(owner, word, do)

    def work(store: Store) -> None:
        found = ManifestRecord.parse(manifest_of(b"abc"), DOCKER_TYPE, now=1.0)
        assert found is not None
        store.put_manifest(name, found)
        for model in (name, name.twin):
            store.manifest(model)
        store.manifests_of(*name.place)
        store.confirm_public(*name.place, DIGEST)
        assert store.is_member(*name.place, DIGEST)
        assert store.held(DIGEST)
        file = store.open_blob(DIGEST)
        assert file is not None
        file.release()
        store.read_manifest(DIGEST)
        store.blob_path(DIGEST)
        store.ingest(DIGEST)
        store.is_denied(*name.place)
        store.is_refused(*name.place)
        store.deny(*name.place)
        store.disown(DIGEST)

    with closing(Store.open(store)) as opened:
        fill(opened)
    with closing(Store.open(store)) as opened, monkeypatch.context():
        for word in ("stat", "lstat", "open", "replace", "rename", "scandir", "unlink", "mkdir", "rmdir", "readlink"):
            watch(os, word)
        watch(platform, "open_descriptor")
        watch(platform, "open_regular")
        work(opened)
        found, mine = mine, []
    assert found == []


def test_a_share_that_hangs(share: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once; what is known of it stays known, and is a hit again when it answers."""
    monkeypatch.setattr(executors, "PATIENCE_S", 0.05)
    answer, lstat = threading.Event(), os.lstat

    def hang(path: str) -> os.stat_result:
        assert answer.wait(20)
        return lstat(path)

    with closing(Store.open(share / "store")) as store:
        fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "lstat", hang)
            assert store.held(DIGEST) is None
            assert store.is_silent
            assert store.open_blob(DIGEST) is None
            assert store.blob(DIGEST).held  # type: ignore[union-attr]
            with pytest.raises(StoreUnwritable, match="comparing"):
                asyncio.run(store.settle())
            answer.set()
            while store.is_silent:
                pass
        assert store.held(DIGEST) is not None
        asyncio.run(store.settle())


# --- real ones


@pytest.mark.skipif(sys.platform != "linux", reason="bindfs is Linux's")
def test_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store behind a FUSE driver: the index is not there, and what is recorded is a hit after a remount."""
    for name in ("source", "mounted"):
        (tmp_path / name).mkdir()
    if shutil.which("bindfs") is None:
        pytest.skip("NOT TESTED: a store behind FUSE, for want of bindfs")
    monkeypatch.setattr(paths, "default_index", lambda: tmp_path / "state")
    for _ in range(2):
        mount = subprocess.run(
            ["bindfs", tmp_path / "source", tmp_path / "mounted"], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"NOT TESTED: a store behind FUSE, as nothing can be mounted: {mount.stderr.strip()}")
        try:
            assert file_system.examine(tmp_path / "mounted").shared
            with closing(Store.open(tmp_path / "mounted" / "store")) as store:
                if not store.known_blobs():
                    fill(store)
                assert store.held(DIGEST)
                assert store.blob(DIGEST).inode == 0  # type: ignore[union-attr]  # it is held
        finally:
            subprocess.run(["fusermount3", "-u", tmp_path / "mounted"], check=True)
    assert not list((tmp_path / "source" / "store").rglob("cache.db"))
