"""store: ingest → verify → publish, and what survives a restart."""

import asyncio
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diskcache
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError
from pullthrough.core.intervals import Intervals
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.snapshot import Snapshot
from pullthrough.store.manifest_table import TOLD_S
from pullthrough.store.store import KEPT_S, Store

NAME = Name("registry.ollama.ai", "library/tiny", "latest")


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def record(store: Store, data: bytes) -> Digest:
    digest = digest_of(data)
    ingest = store.ingest(digest)
    ingest.begin(len(data))
    ingest.write_at(0, data)
    ingest.sync()
    store.publish(ingest.digest, store.place(ingest.digest, ingest.partial_path), now=1.0)
    ingest.forget()
    ingest.close()
    return digest


def read(store: Store, digest: Digest) -> bytes | None:
    file = store.open_blob(digest)
    if file is None:
        return None
    try:
        return os.pread(file.descriptor, file.size + 1, 0)
    finally:
        file.release()


def manifest(*blobs: bytes, confirmed: float = 5.0) -> ManifestRecord:
    layers = [{"digest": digest_of(blob), "size": len(blob)} for blob in blobs]
    record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "text/plain", now=confirmed)
    assert record is not None
    return record


def test_reopened_store_is_complete(tmp_path: Path) -> None:
    """Blobs, manifests, pairs and visibility are there again after a restart."""
    store = Store.open(tmp_path / "store")
    digest = record(store, b"blob")
    store.put_manifest(NAME, manifest(b"blob", b"other"))
    store.confirm_public("hub", "x/y", digest_of(b"third"))
    secret = store.secret
    store.close()

    store = Store.open(tmp_path / "store")
    assert read(store, digest) == b"blob"
    assert store.manifest(NAME) == manifest(b"blob", b"other")
    assert store.is_member("registry.ollama.ai", "library/tiny", digest_of(b"other"))
    assert store.is_member("hub", "x/y", digest_of(b"third"))
    third = store.blob(digest_of(b"third"))
    assert third is not None
    assert (third.size, third.public, third.held) == (None, True, False)
    assert store.secret == secret
    store.close()


def test_nothing_is_known_of_a_denied_repository(tmp_path: Path) -> None:
    """Neither its manifests, whatever they were asked for by, nor their blobs; also after a restart."""
    store = Store.open(tmp_path / "store")
    here = (NAME.host, NAME.repository)
    names = [NAME, Name(*here, "other"), Name(*here, f"sha256:{manifest(b'mine').digest}")]
    records = [manifest(b"mine"), manifest(b"more"), manifest(b"mine")]
    store.put_manifest(NAME, earlier := manifest(b"moved away"))
    for name, stored in zip(names, records, strict=True):
        store.put_manifest(name, stored)
    for blob in (b"mine", b"shared", b"unlisted"):
        store.confirm_public(*here, digest_of(blob))
    store.confirm_public(NAME.host, "library/elsewhere", digest_of(b"shared"))
    assert store.deny(*here)
    for _ in range(2):
        gone = (b"mine", b"more", b"moved away", b"unlisted")
        assert not any(store.is_member(*here, digest_of(blob)) for blob in gone)
        assert not any(store.manifest_by_digest(*here, Digest(record.digest)) for record in (*records, earlier))
        assert store.manifests_of(*here) == {}
        assert all(store.manifest(name).denied for name in names)  # type: ignore[union-attr]
        assert [store.blob(digest_of(blob)).public for blob in (b"mine", b"unlisted", b"shared")] == [  # type: ignore[union-attr]
            False,
            False,
            True,
        ]
        assert store.is_member(NAME.host, "library/elsewhere", digest_of(b"shared"))
        assert not store.deny(*here)
        store.close()
        store = Store.open(tmp_path / "store")
    store.put_manifest(NAME, records[0])
    assert store.is_member(*here, digest_of(b"mine"))
    assert not store.is_member(*here, digest_of(b"more"))
    store.close()


def test_a_dropped_manifest_is_forgotten(tmp_path: Path) -> None:
    """With what only it lists; the bytes of another tag's same manifest stay."""
    store = Store.open(tmp_path / "store")
    twin, other = (Name(NAME.host, NAME.repository, reference) for reference in ("twin", "other"))
    store.put_manifest(NAME, manifest(b"a"))
    store.put_manifest(twin, manifest(b"a"))
    store.put_manifest(other, manifest(b"b"))
    store.drop_manifest(NAME)
    store.drop_manifest(other)
    for _ in range(2):
        assert list(store.manifests()) == [twin]
        assert store.manifest(twin) == manifest(b"a")
        assert store.is_member(NAME.host, NAME.repository, digest_of(b"a"))
        assert not store.is_member(NAME.host, NAME.repository, digest_of(b"b"))
        assert store.manifest_by_digest(NAME.host, NAME.repository, Digest(manifest(b"b").digest)) is None
        store.close()
        store = Store.open(tmp_path / "store")
    store.close()


def test_a_moved_tag(tmp_path: Path) -> None:
    """What only the earlier manifest listed is a member no more, unless it was granted: a list proves nothing."""
    store = Store.open(tmp_path / "store")
    twin = Name(NAME.host, NAME.repository, "twin")
    store.confirm_public(NAME.host, "library/owner", digest_of(b"second"))
    for name, blob in ((NAME, b"first"), (twin, b"first"), (NAME, b"granted"), (NAME, b"second"), (NAME, b"third")):
        store.put_manifest(name, manifest(blob))
        if blob == b"granted":
            store.confirm_public(*NAME.place, digest_of(blob))
    for _ in range(2):
        assert all(store.is_member(*NAME.place, digest_of(blob)) for blob in (b"first", b"granted", b"third"))
        assert not store.is_member(*NAME.place, digest_of(b"second"))
        assert {record.digest for record in store.manifests_of(*NAME.place).values()} == {
            manifest(blob).digest for blob in (b"first", b"third")
        }
        store.close()
        store = Store.open(tmp_path / "store")
    store.close()
    store = Store.open(tmp_path / "store")
    assert store.deny(NAME.host, "library/owner")
    assert not store.blob(digest_of(b"second")).public  # type: ignore[union-attr]
    store.close()
    with sqlite3.connect(tmp_path / "store" / "index" / "cache.db") as connection:
        bodies = {key for (key,) in connection.execute("SELECT key FROM Cache WHERE key GLOB 'body *'")}
    assert bodies == {f"body {manifest(blob).digest}" for blob in (b"first", b"third")}


def test_pulls_are_remembered(tmp_path: Path) -> None:
    """The time of the last pull is there after a restart; also after a crash, if it is older than ten minutes."""
    store = Store.open(tmp_path / "store")
    store.put_manifest(NAME, manifest(b"a"))
    index = store._index
    writes: list[str] = []
    put = index._put
    index._put = lambda key, value: (writes.append(key), put(key, value))[1]  # type: ignore[method-assign]
    for now in (1000.0, 1001.0, 1000.0 + TOLD_S - 1):
        store.touch(NAME, now)
    assert writes == []
    store.touch(NAME, 1000.0 + TOLD_S)
    assert len(writes) == 2
    store.touch(NAME, 9000.0)
    store.touch(Name(NAME.host, NAME.repository, "unknown"), 9000.0)
    store.close()
    store = Store.open(tmp_path / "store")
    stored = store.manifest(NAME)
    assert stored is not None
    assert stored.pulled == 9000.0
    store.close()


def test_a_write_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With what comes next, which counts more, and at the end."""
    store = Store.open(tmp_path / "store")
    index = store._index
    refusals = iter([sqlite3.OperationalError("disk I/O error"), OSError("no space left"), None])

    def transact(**options: bool) -> Any:
        if (refusal := next(refusals)) is not None:
            raise refusal
        return type(index.cache).transact(index.cache, **options)

    index.cache.transact = transact
    first, second = manifest(b"first"), manifest(b"second")
    store.put_manifest(NAME, first)
    index.flush()
    store.put_manifest(NAME, second)
    index.flush()
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "index write of 2 rows failed",
        "index write of 3 rows failed",
    ]
    store.close()
    store = Store.open(tmp_path / "store")
    assert store.manifest(NAME) == second
    store.close()


def test_a_row_that_cannot_be_made_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stands in nobody's way."""
    store = Store.open(tmp_path / "store")
    store._index._put("blob x", lambda: None)  # type: ignore[arg-type,return-value]
    store._index.flush()
    assert caplog.messages == ["index rows given up: blob x"]
    store.put_manifest(NAME, manifest(b"a"))
    store.close()
    store = Store.open(tmp_path / "store")
    assert store.manifest(NAME) == manifest(b"a")
    store.close()


def test_large_rows_are_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come while the writer rests go into one write, and nobody who flushes waits for the rest."""
    store = Store.open(tmp_path / "store")
    index = store._index
    resting, writes = threading.Event(), list[str]()

    def rest(seconds: float) -> bool:
        if seconds:
            resting.set()
        return hurry.wait(60 if seconds else 0)

    hurry = threading.Event()
    monkeypatch.setattr(index, "_hurry", SimpleNamespace(wait=rest, set=hurry.set, clear=hurry.clear))
    monkeypatch.setattr("pullthrough.store.index.time", SimpleNamespace(monotonic=lambda: 1000.0))

    def put(name: str) -> None:
        index._put("day 1", lambda: (writes.append(name), name * 100_000)[1])

    put("first")
    index.flush()
    put("second")
    assert resting.wait(10)
    put("third")
    assert writes == ["first"]
    index.flush()
    assert writes == ["first", "third"]
    store.close()


def test_private_stays_private(tmp_path: Path) -> None:
    """Publishing bytes says nothing about who may read them; upstream's word does."""
    store = Store.open(tmp_path / "store")
    digest = record(store, b"blob")
    assert not store.held(digest).public  # type: ignore[union-attr]
    store.confirm_public("hub", "x/y", digest)
    assert store.held(digest).public  # type: ignore[union-attr]
    store.close()


@pytest.mark.parametrize("damage", ["touched", "cut", "replaced", "gone"])
def test_a_changed_file_is_no_hit(tmp_path: Path, damage: str) -> None:
    """A blob file that is not the one that was verified is not served."""
    store = Store.open(tmp_path / "store")
    digest = record(store, b"blob")
    path = store.blob_path(digest)
    match damage:
        case "touched":
            os.utime(path, ns=(1, 1))
        case "cut":
            path.write_bytes(b"blo")
        case "replaced":
            copy = path.with_name("copy")
            copy.write_bytes(b"blob")
            stat = path.stat()
            os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            copy.replace(path)
        case "gone":
            path.unlink()
    assert store.held(digest) is None
    assert read(store, digest) is None
    store.close()


def test_a_file_without_proof_is_verified_where_it_is(tmp_path: Path) -> None:
    """A blob file that nothing says was verified is no hit; it counts as held, and is found whole."""
    store = Store.open(tmp_path / "store")
    store.close()
    digest = digest_of(b"stranger")
    folder = tmp_path / "store" / "private" / "blobs"
    (folder / digest.file_name).write_bytes(b"stranger")
    (folder / "README").write_text("not ours")
    store = Store.open(tmp_path / "store")
    assert store.held(digest) is None
    known = store.blob(digest)
    assert known is not None
    assert (known.size, known.held, known.public, store.held_bytes) == (8, True, False, 8)
    ingest = store.ingest(digest)
    assert ingest.resume() == (8, Intervals([(0, 8)]))
    assert (ingest.in_place, ingest.partial_path) == (True, folder / digest.file_name)
    ingest.discard()
    store.publish(digest, store.place(digest, ingest.partial_path), now=1.0)
    ingest.close()
    assert read(store, digest) == b"stranger"
    assert store.held_bytes == 8
    assert (folder / "README").exists()
    store.close()


def test_quarantine_keeps_the_evidence(tmp_path: Path) -> None:
    """Bytes that do not hash to their name are put away, and the name is free again."""
    store = Store.open(tmp_path / "store")
    digest = digest_of(b"right")
    ingest = store.ingest(digest)
    ingest.begin(5)
    ingest.write_at(0, b"wrong")
    path = store.quarantine(ingest)
    ingest.close()
    assert path.read_bytes() == b"wrong"
    assert path.parent.name == "quarantine"
    assert store.ingest(digest).resume() is None
    store.close()


def test_sweep(tmp_path: Path) -> None:
    """What no recording goes on with is gone after a start: halves, temporaries, and what is older than two weeks."""
    store = Store.open(tmp_path / "store")
    for data in (b"young", b"old", b"adopted", b"no journal", b"no partial"):
        ingest = store.ingest(digest_of(data))
        ingest.begin(len(data))
        ingest.close()
    ingest = store.ingest(digest_of(b"wrong"))
    ingest.begin(5)
    evidence = [store.quarantine(ingest)]
    ingest.close()
    ingest = store.ingest(digest_of(b"wrong too"))
    ingest.begin(5)
    evidence.append(store.quarantine(ingest))
    ingest.close()
    store.close()
    folder = tmp_path / "store" / "ingest"

    def path_of(data: bytes, suffix: str) -> Path:
        return folder / f"{digest_of(data).file_name}.{suffix}"

    path_of(b"no journal", "journal").unlink()
    path_of(b"no partial", "partial").unlink()
    (folder / f".{path_of(b'young', 'journal').name}.0badcafe").write_bytes(b"cut")
    (folder / "README").write_text("not ours")
    then = time.time() - KEPT_S - 60
    for path in (path_of(b"old", "journal"), path_of(b"old", "partial"), path_of(b"adopted", "partial"), evidence[0]):
        os.utime(path, (then, then))
    Store.open(tmp_path / "store").close()
    kept = {path_of(data, suffix) for data in (b"young", b"adopted") for suffix in ("journal", "partial")}
    assert set(folder.iterdir()) == kept | {folder / "README"}
    assert [path.exists() for path in evidence] == [False, True]


def _second_daemon(folder: Path, queue: Any) -> None:
    try:
        Store.open(folder).close()
        queue.put("opened")
    except StoreError as error:
        queue.put(str(error))


def test_one_daemon_per_store(tmp_path: Path) -> None:
    """A second process is told which process has the store."""
    store = Store.open(tmp_path / "store")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_second_daemon, args=(tmp_path / "store", queue))
    process.start()
    assert f"expected a free store, got one in use by process {os.getpid()}" in queue.get(timeout=30)
    process.join()
    store.close()


def test_foreign_folder(tmp_path: Path) -> None:
    """A folder with something else in it is not touched."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"expected an ollama-cache store or an empty folder, got .*'thesis\.tex'"):
        Store.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_fresh_file_system(tmp_path: Path) -> None:
    """A new disk's lost+found is not foreign."""
    (tmp_path / "lost+found").mkdir()
    Store.open(tmp_path).close()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """Expected a folder, got a file."""
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="expected a folder, got a file"):
        Store.open(tmp_path / "store")


def test_newer_format(tmp_path: Path) -> None:
    """A store of a later version is left alone."""
    Store.open(tmp_path / "store").close()
    (tmp_path / "store" / "ollama-cache.json").write_text('{"format": 3}')
    with pytest.raises(StoreError, match=r"expected format 1 to 2 in ollama-cache\.json, got 3: a newer version"):
        Store.open(tmp_path / "store")


def test_unwritable_folder(tmp_path: Path) -> None:
    """The system's own words for what is wrong (a file stands where a folder must be made: root obeys that too)."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="expected a writable folder, got Not a directory"):
        Store.open(tmp_path / "file" / "store")


@pytest.mark.parametrize("damage", ["noise", "cut", "foreign row", "pickle"])
def test_corrupt_index(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broken index is made anew from the files; a pickle in it is never run (CVE-2025-69872)."""
    folder = tmp_path / "store"
    store = Store.open(folder)
    for number in range(200):
        record(store, b"%d" % number)
    store.put_manifest(NAME, manifest(b"7"))
    store.close()
    database = folder / "index" / "cache.db"
    match damage:
        case "noise":
            database.write_bytes(os.urandom(100_000))
        case "cut":
            os.truncate(database, 20_000)
        case "foreign row":
            with sqlite3.connect(database) as connection:
                connection.execute("UPDATE Cache SET key = 'hello' WHERE rowid = 7")
        case "pickle":
            with sqlite3.connect(database) as connection:
                bomb = pickle.dumps(Bomb())
                connection.execute("UPDATE Cache SET mode = 4, value = ?", (sqlite3.Binary(bomb),))
    store = Store.open(folder)
    assert [message.partition(" from ")[0] for message in caplog.messages] == [
        f"the index in {folder / 'index'} is made anew"
    ]
    assert store.manifest(NAME) == manifest(b"7", confirmed=0.0)._replace(
        content_type=DOCKER_TYPE,
        brought=store.manifest(NAME).brought,  # type: ignore[union-attr]
    )
    assert read(store, digest_of(b"7")) == b"7"
    assert store.is_member(*NAME.place, digest_of(b"7"))
    asyncio.run(store.settle())
    assert len(store.blobs()) == 200
    store.close()
    assert len(Snapshot.read(folder).held_sizes()) == 200


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (_explode, ("unpickled",))


def _explode(message: str) -> None:
    raise AssertionError(message)


def test_secret_is_for_the_owner(tmp_path: Path) -> None:
    """The key that signs capabilities is readable by nobody else."""
    Store.open(tmp_path / "store").close()
    assert (tmp_path / "store" / "secret").stat().st_mode & 0o777 == 0o600


def test_the_index_is_plain(tmp_path: Path) -> None:
    """What diskcache holds is text and bytes; another reader of the index sees no pickles."""
    store = Store.open(tmp_path / "store")
    record(store, b"blob")
    store.put_manifest(NAME, manifest(b"blob"))
    with pytest.raises(TypeError, match="expected a str or bytes value, got dict"):
        store._index.cache.set("key", {})
    with pytest.raises(TypeError, match="expected a str key, got tuple"):
        store._index.cache.set(("key",), "")
    store.close()
    with sqlite3.connect(tmp_path / "store" / "index" / "cache.db") as connection:
        modes = {mode for (mode,) in connection.execute("SELECT mode FROM Cache")}
    assert modes == {diskcache.core.MODE_RAW}


class AgainstADict(RuleBasedStateMachine):
    """Record, write partly, abort, corrupt, reopen and crash: what can be read always hashes to its name."""

    @initialize()
    def start(self) -> None:
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "store"
        self.store = Store.open(self.folder)
        self.model: dict[Digest, bytes] = {}

    @rule(data=st.binary(min_size=1, max_size=8))
    def record(self, data: bytes) -> None:
        self.model[record(self.store, data)] = data

    @rule(data=st.binary(min_size=2, max_size=8))
    def record_half(self, data: bytes) -> None:
        digest = digest_of(data)
        if digest in self.model:
            return
        ingest = self.store.ingest(digest)
        ingest.begin(len(data))
        ingest.write_at(0, data[:1])
        ingest.mark([(0, 1)])
        ingest.close()

    @rule(data=st.binary(min_size=1, max_size=8))
    def record_wrong(self, data: bytes) -> None:
        digest = digest_of(data + b"!")
        if digest in self.model:
            return
        ingest = self.store.ingest(digest)
        ingest.begin(len(data))
        ingest.write_at(0, data)
        self.store.quarantine(ingest)
        ingest.close()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder)

    @rule(data=st.binary(min_size=1, max_size=8))
    def crash_before_the_index(self, data: bytes) -> None:
        """The rename happened, nothing else did: a file without proof."""
        digest = digest_of(data)
        if digest in self.model:
            return
        path = self.store.blob_path(digest)
        path.write_bytes(data)
        self.store.close()
        self.store = Store.open(self.folder)
        assert self.store.ingest(digest).resume() is not None
        assert self.store.held(digest) is None
        self.store.disown(digest)

    @rule(how=st.sampled_from(["gone", "noise"]))
    def lose_the_index(self, how: str) -> None:
        self.store.close()
        if how == "gone":
            shutil.rmtree(self.folder / "index")
        else:
            (self.folder / "index" / "cache.db").write_bytes(b"noise" * 1000)
        self.store = Store.open(self.folder)
        asyncio.run(self.store.settle())

    @invariant()
    def holds(self) -> None:
        assert set(self.store.blobs()) == set(self.model)
        for digest, data in self.model.items():
            assert read(self.store, digest) == data
            assert digest_of(data) == digest
        self.store._index.flush()
        assert self.store._index.cache.check() == []

    def teardown(self) -> None:
        self.store.close()
        self.place.cleanup()


TestAgainstADict = AgainstADict.TestCase
# Each step opens or syncs real files.
TestAgainstADict.settings = settings(settings.default, max_examples=25, stateful_step_count=15)
