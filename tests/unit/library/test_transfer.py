"""import and export: what goes out comes in the same, and what is not right does not come in at all."""

import errno
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreUnwritable, TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import Name
from pullthrough.library import bundle
from pullthrough.library.bundle import END, SUMS, header, padding, sums
from pullthrough.library.exporter import export_bundle, export_bundle_file, export_tree, select
from pullthrough.library.import_commit import Fate, ImportOutcome
from pullthrough.library.importer import Bounds
from pullthrough.library.snapshot import Snapshot
from pullthrough.runtime import platform
from pullthrough.store.store import STAGING, Store
from tests.support.carrying import import_into
from tests.support.modelsfolder import manifest_of, read_models, sha256, write_model
from tests.support.storefiles import blob_file, blob_files

HOST = "registry.ollama.ai"
PATH = f"{HOST}/library/tiny/latest"
NAME = Name(HOST, "library/tiny", "latest")
BLOBS = (b"0123456789abcdef" * 40, b"{{ .Prompt }}", b'{"model_format":"gguf"}')
BLOB = f"blobs/sha256-{sha256(BLOBS[0])}"


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    with closing(Store.open(folder)) as store:
        yield store


def take_tree(store: Path, tree: Path, **options: Any) -> list[ImportOutcome]:
    with opened(store) as opened_store:
        return import_into(opened_store, tree, **options)


def take_bundle(store: Path, data: bytes) -> list[ImportOutcome]:
    path = store.with_name("bundle.tar")
    path.write_bytes(data)
    with opened(store) as opened_store:
        return import_into(opened_store, path)


def exported(store: Path, *models: str) -> bytes:
    """A bundle of these models."""
    inventory = Snapshot.read(store)
    file = io.BytesIO()
    export_bundle(inventory, select(inventory, models), file)
    return file.getvalue()


def contents(store: Path) -> tuple[set[str], set[str]]:
    """(models, blob files); nothing else may lie about."""
    with opened(store) as opened_store:
        models = {str(name) for name in opened_store.manifests()}
        assert set(opened_store.blobs()) == {Digest.parse(path.name) for path in blob_files(store)}
    assert list((store / "ingest").iterdir()) == []
    return models, {path.name for path in blob_files(store)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A models folder with one model."""
    write_model(tmp_path / "tree", PATH, BLOBS)
    return tmp_path / "tree"


@pytest.fixture
def good(tmp_path: Path, tree: Path) -> bytes:
    """A bundle with that model."""
    take_tree(tmp_path / "source", tree)
    return exported(tmp_path / "source", "tiny")


# --- there and back

PARTS = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,12}", fullmatch=True)
MODELS = st.dictionaries(
    st.tuples(st.sampled_from([HOST, "hf.co", "10.0.0.1:5000"]), PARTS, PARTS, PARTS).map("/".join),
    st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
    min_size=1,
    max_size=5,
)
# From one to several blocks of a tar, and more than one piece of a copy.
POOL = [random.Random(number).randbytes(size) for number, size in enumerate((0, 1, 511, 512, 1025, (1 << 20) + 7))]


@settings(max_examples=5)
@given(MODELS)
def test_there_and_back(models: dict[str, list[int]]) -> None:
    """Folder → store → bundle → store → folder: every byte is the same, and Ollama can read it."""
    # A models folder of Ollama cannot hold two names that differ by case only on every disk, nor can a bundle.
    models = {name: blobs for name, blobs in models.items() if [n.lower() for n in models].count(name.lower()) == 1}
    if not models:
        return
    with TemporaryDirectory() as text:
        folder = Path(text)
        for name, blobs in models.items():
            write_model(folder / "tree", name, [POOL[blob] for blob in blobs])
        outcomes = take_tree(folder / "one", folder / "tree")
        assert [outcome.fate for outcome in outcomes] == [Fate.IMPORTED] * len(models)
        packed = exported(folder / "one", "*")
        assert {outcome.fate for outcome in take_bundle(folder / "two", packed)} == {Fate.IMPORTED}
        assert exported(folder / "two", "*") == packed
        inventory = Snapshot.read(folder / "two")
        export_tree(inventory, select(inventory, ["*"]), folder / "out")
        assert read_models(folder / "out") == read_models(folder / "tree")
        assert contents(folder / "one") == contents(folder / "two")


def test_a_bundle_is_a_tar_of_a_models_folder(tmp_path: Path, good: bytes) -> None:
    """Any tar unpacks it to what Ollama reads and `sha256sum -c` checks."""
    with tarfile.open(fileobj=io.BytesIO(good)) as archive:
        assert archive.getnames()[0] == SUMS
        archive.extractall(tmp_path / "out", filter="data")
    assert read_models(tmp_path / "out") == {PATH: (manifest_of(*BLOBS), BLOBS)}
    for line in (tmp_path / "out" / SUMS).read_text().splitlines():
        digest, path = line.split("  ")
        assert sha256((tmp_path / "out" / path).read_bytes()) == digest


def test_a_size_beyond_ustar_has_a_header() -> None:
    """A blob of 100 GB: its header is one that Python's tarfile reads, as GNU tar does."""
    block = header(BLOB, 100_000_000_000)
    assert len(block) == 512
    info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    assert (info.name, info.size) == (BLOB, 100_000_000_000)


def test_export_into_a_folder_that_has_some_of_it(tmp_path: Path, tree: Path) -> None:
    """Right blobs stay as they are, wrong ones are replaced, and no temporary is left."""
    take_tree(tmp_path / "store", tree)
    out = tmp_path / "out"
    write_model(out, f"{HOST}/library/other/latest", BLOBS[:2])
    inode = (out / BLOB).stat().st_ino
    wrong = out / "blobs" / f"sha256-{sha256(BLOBS[1])}"
    wrong.write_bytes(b"{{ .Wrong!! }}"[: len(BLOBS[1])])
    inventory = Snapshot.read(tmp_path / "store")
    export_tree(inventory, select(inventory, ["tiny"]), out)
    assert set(read_models(out)) == {PATH, f"{HOST}/library/other/latest"}
    assert (out / BLOB).stat().st_ino == inode
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda store: store.disown(Digest(sha256(BLOBS[0]))), "all its blobs", id="incomplete"),
        pytest.param(lambda store: store.deny(HOST, "library/tiny"), "expected a public model", id="private"),
    ],
)
def test_not_exported(tmp_path: Path, tree: Path, spoil: Callable[[Store], object], message: str) -> None:
    """Only models that are here, whole and public."""
    take_tree(tmp_path / "store", tree)
    with pytest.raises(TransferRefused, match="model 'tinier' not found"):
        select(Snapshot.read(tmp_path / "store"), ["tiny", "tinier"])
    with opened(tmp_path / "store") as store:
        spoil(store)
    with pytest.raises(TransferRefused, match=message):
        select(Snapshot.read(tmp_path / "store"), ["tiny"])


def test_a_damaged_blob_is_not_exported(tmp_path: Path, tree: Path) -> None:
    """Neither into a bundle nor into a folder; what was begun is gone."""
    store = tmp_path / "store"
    take_tree(store, tree)
    blob_file(store, Path(BLOB).name).write_bytes(b"X" * len(BLOBS[0]))
    inventory = Snapshot.read(store)
    cargo = select(inventory, ["tiny"])
    for target, export in ((tmp_path / "x.tar", export_bundle_file), (tmp_path / "x", export_tree)):
        with pytest.raises(TransferRefused, match=f"expected bytes of this digest, got sha256:{sha256(b'X' * 640)}"):
            export(inventory, cargo, target)
    assert not (tmp_path / "x.tar").exists()
    assert not (tmp_path / "x" / BLOB).exists()
    assert not list((tmp_path / "x").glob("manifests/*/*/*/*"))
    assert not list(tmp_path.glob(".x*"))


# --- who may have it


def test_imported_models_are_public_and_stale(tmp_path: Path, tree: Path) -> None:
    """By the operator's word; upstream has confirmed nothing."""
    assert take_tree(tmp_path / "store", tree) == [ImportOutcome(str(NAME), Fate.IMPORTED)]
    with opened(tmp_path / "store") as store:
        record = store.manifest(NAME)
        assert record is not None
        assert (record.body, record.content_type) == (manifest_of(*BLOBS), DOCKER_TYPE)
        assert (record.confirmed, record.denied, record.pulled, record.brought) == (0.0, False, 0.0, 9.0)
        for digest in record.sizes:
            blob = store.blob(digest)
            assert blob is not None and blob.public and store.is_member(HOST, "library/tiny", digest)
    assert take_tree(tmp_path / "store", tree) == [ImportOutcome(str(NAME), Fate.PRESENT)]


def test_private_models_are_nobodys(tmp_path: Path, tree: Path) -> None:
    """The bytes are here, and nothing is known of the repository; the operator's word may follow."""
    take_tree(tmp_path / "store", tree, public=False)
    with opened(tmp_path / "store") as store:
        record = store.manifest(NAME)
        assert record is not None and record.denied
        assert all(store.held(digest) is not None for digest in record.sizes)
        assert not any(store.is_member(HOST, "library/tiny", digest) for digest in record.sizes)
        assert not any(blob.public for blob in store.blobs().values())
    assert take_tree(tmp_path / "store", tree, public=False) == [ImportOutcome(str(NAME), Fate.PRESENT)]
    assert take_tree(tmp_path / "store", tree) == [ImportOutcome(str(NAME), Fate.IMPORTED)]
    with opened(tmp_path / "store") as store:
        assert store.manifest(NAME).denied is False  # type: ignore[union-attr]
    take_tree(tmp_path / "store", tree, public=False)
    with opened(tmp_path / "store") as store:
        assert store.manifest(NAME).denied is False  # type: ignore[union-attr]


def test_a_repository_that_was_refused_meanwhile(tmp_path: Path, tree: Path) -> None:
    """Nothing of it is stored; a grant since then counts."""
    with opened(tmp_path / "store") as store:
        store.deny(HOST, "library/tiny")
        (outcome,) = import_into(store, tree)
        assert (outcome.fate, outcome.why) == (
            Fate.REFUSED,
            "expected a public model, got one that its registry refuses to everybody",
        )
        store.confirm_public(HOST, "library/tiny", Digest("ab" * 32))
        assert import_into(store, tree) == [ImportOutcome(str(NAME), Fate.IMPORTED)]


def test_what_upstream_has_said_counts_more(tmp_path: Path, tree: Path) -> None:
    """A confirmed manifest is kept unless told otherwise; a refused repository stays refused."""
    take_tree(tmp_path / "store", tree)
    with opened(tmp_path / "store") as store:
        record = store.manifest(NAME)
        assert record is not None
        store.put_manifest(NAME, record._replace(confirmed=5.0))
    write_model(tree, PATH, BLOBS[:2])
    (outcome,) = take_tree(tmp_path / "store", tree)
    assert outcome.fate is Fate.KEPT
    (outcome,) = take_tree(tmp_path / "store", tree, replace_confirmed=True)
    assert outcome.fate is Fate.IMPORTED
    with opened(tmp_path / "store") as store:
        record = store.manifest(NAME)
        assert record is not None and record.body == manifest_of(*BLOBS[:2])
        store.put_manifest(NAME, record._replace(confirmed=5.0))
        store.deny(HOST, "library/tiny")
    write_model(tree, f"{HOST}/library/tiny/other", BLOBS)
    outcomes = take_tree(tmp_path / "store", tree, replace_confirmed=True)
    assert [(outcome.fate, "refuses to everybody" in outcome.why) for outcome in outcomes] == [(Fate.REFUSED, True)] * 2


# --- what is wrong in a folder


def _link(tree: Path) -> None:
    (tree / BLOB).rename(tree / "elsewhere")
    (tree / BLOB).symlink_to(tree / "elsewhere")


def _pipe(tree: Path) -> None:
    (tree / BLOB).unlink()
    os.mkfifo(tree / BLOB)


def _manifest_link(tree: Path) -> None:
    (tree / "manifests" / PATH).rename(tree / "elsewhere")
    (tree / "manifests" / PATH).symlink_to(tree / "elsewhere")


def _claim(tree: Path) -> None:
    path = tree / "manifests" / PATH
    path.write_bytes(path.read_bytes().replace(b":  640", b":  641"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(lambda tree: (tree / BLOB).write_bytes(b"x"), f"got sha256:{sha256(b'x')}", id="other bytes"),
        pytest.param(lambda tree: (tree / BLOB).unlink(), "expected its file, got none", id="missing"),
        pytest.param(_link, "expected a regular file, got a link", id="link"),
        pytest.param(_pipe, "expected a regular file, got another kind", id="pipe"),
        pytest.param(_claim, "expected 641 bytes, got 640", id="other size claimed"),
        pytest.param(_manifest_link, "expected a link to blobs/sha256-", id="manifest is a link"),
        pytest.param(
            lambda tree: (tree / "manifests" / PATH).write_bytes(b"<html>"), "expected a manifest", id="no manifest"
        ),
    ],
)
def test_a_bad_model_is_refused_and_the_others_are_not(
    tmp_path: Path, tree: Path, spoil: Callable[[Path], object], why: str
) -> None:
    """A model is whole or not there at all."""
    other = f"{HOST}/library/other/latest"
    write_model(tree, other, [b"other", *BLOBS[1:]])
    spoil(tree)
    outcomes = {outcome.model: outcome for outcome in take_tree(tmp_path / "store", tree)}
    assert outcomes.pop(f"{HOST}/library/other:latest").fate is Fate.IMPORTED
    ((_, refused),) = outcomes.items()
    assert refused.fate is Fate.REFUSED
    assert why in refused.why
    models, blobs = contents(tmp_path / "store")
    assert models == {f"{HOST}/library/other:latest"}
    assert blobs == {f"sha256-{sha256(blob)}" for blob in (b"other", *BLOBS[1:])}


def test_a_false_claim_is_only_its_own_models(tmp_path: Path, tree: Path) -> None:
    """Two models list the same blob, and the first claims another size for it."""
    other = f"{HOST}/library/zebra/latest"
    write_model(tree, other, [*BLOBS])
    _claim(tree)
    fates = {outcome.model: outcome.fate for outcome in take_tree(tmp_path / "store", tree)}
    assert fates == {str(NAME): Fate.REFUSED, f"{HOST}/library/zebra:latest": Fate.IMPORTED}


def test_names_that_are_none(tmp_path: Path, tree: Path) -> None:
    """Reported; hidden files are passed over."""
    for name in (".DS_Store", f"{HOST}/.hidden", f"{HOST}/library/two words/latest", "stray"):
        path = tree / "manifests" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"{}")
    outcomes = {outcome.model: outcome.fate for outcome in take_tree(tmp_path / "store", tree)}
    assert outcomes == {
        str(NAME): Fate.IMPORTED,
        "manifests/stray": Fate.REFUSED,
        f"manifests/{HOST}/library/two words/latest": Fate.REFUSED,
    }


def test_no_models_folder(tmp_path: Path) -> None:
    """Said with its name."""
    with pytest.raises(TransferRefused, match=f"expected a models folder of Ollama, .* got {tmp_path}"):
        take_tree(tmp_path / "store", tmp_path)


def test_bounds_are_kept(tmp_path: Path, tree: Path) -> None:
    """A full disk or `max_size` stops the import, and nothing of the model is left."""
    with pytest.raises(StoreUnwritable, match=r"expected at most 600 bytes in the store \(max_size\), got 6"):
        take_tree(tmp_path / "store", tree, bounds=Bounds(max_size=600))
    with pytest.raises(StoreUnwritable, match=r"to stay free \(min_free\)"):
        take_tree(tmp_path / "store", tree, bounds=Bounds(min_free=1 << 62))
    assert contents(tmp_path / "store") == (set(), set())


def test_links_only_to_what_nobody_else_can_change(tmp_path: Path, tree: Path) -> None:
    """`--link` copies a file that others may write to."""
    if os.name == "nt":
        pytest.skip("needs a system whose files have owners")
    (tree / BLOB).chmod(0o644)
    open_to_all = tree / "blobs" / f"sha256-{sha256(BLOBS[1])}"
    open_to_all.chmod(0o666)
    take_tree(tmp_path / "store", tree, link=True)
    assert blob_file(tmp_path / "store", (tree / BLOB).name).samefile(tree / BLOB)
    assert not blob_file(tmp_path / "store", open_to_all.name).samefile(open_to_all)
    with opened(tmp_path / "store") as store:
        assert store.held(Digest(sha256(BLOBS[0]))) is not None


def test_a_reflink_is_hashed_as_well(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares its blocks with a damaged file is not imported."""

    def clone(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 1 << 20, 0), 0)
        return True

    monkeypatch.setattr(platform, "reflink", clone)
    assert take_tree(tmp_path / "one", tree, bounds=Bounds(min_free=1 << 62))[0].fate is Fate.IMPORTED
    (tree / BLOB).write_bytes(b"x" * 640)
    assert take_tree(tmp_path / "two", tree, bounds=Bounds(min_free=1 << 62))[0].fate is Fate.REFUSED


def test_what_a_crash_has_left_is_swept(tmp_path: Path, tree: Path) -> None:
    """The staging folder of an import that was killed goes at the next start."""
    take_tree(tmp_path / "store", tree)
    left = tmp_path / "store" / "ingest" / f"{STAGING}x"
    left.mkdir()
    (left / "sha256-x").write_bytes(b"half")
    contents(tmp_path / "store")


# --- what is wrong in a bundle


@pytest.fixture(scope="module")
def receiving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, bytes]]:
    """An empty store, and a bundle for it."""
    folder = tmp_path_factory.mktemp("receiving")
    write_model(folder / "tree", PATH, BLOBS)
    take_tree(folder / "source", folder / "tree")
    with opened(folder / "store") as store:
        yield store, exported(folder / "source", "tiny")


@given(st.data())
def test_any_damage_is_refused_whole(receiving: tuple[Store, bytes], data: st.DataObject) -> None:
    """One byte changed, taken away, put in, or the end cut off: nothing is imported."""
    store, packed = receiving
    place = data.draw(st.integers(0, len(packed) - 1), label="place")
    byte = bytes([data.draw(st.integers(1, 255), label="byte")])
    match data.draw(st.sampled_from(["change", "remove", "insert", "cut"]), label="kind"):
        case "change":
            bad = packed[:place] + bytes([packed[place] ^ byte[0]]) + packed[place + 1 :]
        case "remove":
            bad = packed[:place] + packed[place + 1 :]
        case "insert":
            bad = packed[:place] + byte + packed[place:]
        case _:
            bad = packed[:place]
    path = store.folder.with_name("bundle.tar")
    path.write_bytes(bad)
    with pytest.raises(TransferRefused, match="expected"):
        import_into(store, path)
    assert (dict(store.manifests()), store.blobs()) == ({}, {})
    assert not any(list((store.folder / name).iterdir()) for name in ("ingest", "quarantine"))
    assert blob_files(store.folder) == []


def member(path: str, data: bytes) -> bytes:
    return header(path, len(data)) + data + padding(len(data))


def special(kind: bytes, name: str = BLOB, target: str = "/etc/passwd", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def packed(members: dict[str, bytes], *, listed: dict[str, str] | None = None) -> bytes:
    """A bundle of these members, right but for what they say."""
    listed = {path: sha256(data) for path, data in members.items()} if listed is None else listed
    return member(SUMS, sums(listed)) + b"".join(member(path, data) for path, data in members.items()) + END


MANIFEST = f"manifests/{PATH}"
GOOD = {MANIFEST: manifest_of(*BLOBS)} | {f"blobs/sha256-{sha256(blob)}": blob for blob in BLOBS}
SUMS_MEMBER = member(SUMS, sums({path: sha256(data) for path, data in GOOD.items()}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "it is truncated", id="empty"),
        pytest.param(b"PK\3\4" * 200, "got a compressed file: unpack it first", id="compressed"),
        pytest.param(b"GGUF" * 200, "expected a bundle as `export` makes them, got a file that is no tar", id="no tar"),
        pytest.param(member(MANIFEST, GOOD[MANIFEST]) + END, "whose first member is SHA256SUMS", id="no sums"),
        pytest.param(packed({"manifests/../../../etc/x": b"x"}), "path of a manifest or blob", id="traversal"),
        pytest.param(packed({"/etc/passwd": b"x"}), "path of a manifest or blob", id="absolute"),
        pytest.param(packed({f"manifests/{HOST}/../x/latest": b"x"}), "path of a manifest or blob", id="dots"),
        pytest.param(packed({"blobs/sha256-XY": b"x"}), "path of a manifest or blob", id="no digest"),
        pytest.param(SUMS_MEMBER + special(tarfile.SYMTYPE), "a symbolic link", id="symbolic link"),
        pytest.param(SUMS_MEMBER + special(tarfile.LNKTYPE), "a hard link", id="hard link"),
        pytest.param(SUMS_MEMBER + special(tarfile.CHRTYPE), "a device", id="device"),
        pytest.param(SUMS_MEMBER + special(tarfile.FIFOTYPE), "a pipe", id="pipe"),
        pytest.param(SUMS_MEMBER + special(tarfile.DIRTYPE), "a folder", id="folder"),
        pytest.param(special(tarfile.XHDTYPE, size=7 << 30), "an extended header", id="oversized extended header"),
        pytest.param(special(tarfile.GNUTYPE_LONGNAME, size=7 << 30), "a long name", id="oversized long name"),
        pytest.param(special(tarfile.GNUTYPE_SPARSE), "a sparse file", id="sparse"),
        pytest.param(header(SUMS, 1 << 40) + bytes(2048), "it is truncated", id="more than there is"),
        pytest.param(packed(GOOD | {f"{MANIFEST}2": b"{}"}), "expected a manifest that lists blobs", id="no manifest"),
        pytest.param(packed(GOOD | {f"blobs/sha256-{sha256(b'x')}": b"x"}), "got it too", id="blob too many"),
        pytest.param(
            packed({path: data for path, data in GOOD.items() if path != BLOB}), "got no such member", id="blob missing"
        ),
        pytest.param(SUMS_MEMBER + member(MANIFEST, GOOD[MANIFEST]) * 2 + END, "next, as in", id="duplicate member"),
        pytest.param(packed(GOOD)[:-1024] + member(BLOB, BLOBS[0]) + END, "expected the end", id="member too many"),
        pytest.param(
            member(SUMS, sums({MANIFEST: sha256(b"")}) * 2) + END, "expected each path once", id="duplicate line"
        ),
        pytest.param(
            packed({MANIFEST: b"x", MANIFEST.replace("tiny", "TINY"): b"x"}),
            "expected each path once",
            id="twice on a disk that ignores case",
        ),
        pytest.param(
            packed({BLOB: b"x"}, listed={BLOB: sha256(b"x")}), "to have the sum of its name", id="sum of another"
        ),
        pytest.param(
            packed(GOOD | {BLOB: b"x" * 640}, listed={path: sha256(data) for path, data in GOOD.items()}),
            f"{BLOB}: expected sha256:{sha256(BLOBS[0])}, got sha256:{sha256(b'x' * 640)}",
            id="wrong bytes",
        ),
        pytest.param(packed(GOOD) + b"x", "expected nothing behind the end", id="bytes behind the end"),
        pytest.param(packed(GOOD)[:-512], "got one at byte", id="one zero block"),
    ],
)
def test_hostile_bundle(tmp_path: Path, data: bytes, message: str) -> None:
    """Refused whole, with what was expected and what was got."""
    with pytest.raises(TransferRefused, match=r"expected .*, got") as caught:
        take_bundle(tmp_path / "store", data)
    assert message in str(caught.value)
    assert contents(tmp_path / "store") == (set(), set())
    assert {path.name for path in tmp_path.iterdir()} == {"store", "bundle.tar"}


def test_that_bundle_without_the_fault(tmp_path: Path) -> None:
    """The archive that the hostile ones are made from is a good one; a manifest comes in with it."""
    assert take_bundle(tmp_path / "store", packed(GOOD)) == [ImportOutcome(str(NAME), Fate.IMPORTED)]
    assert contents(tmp_path / "store")[0] == {str(NAME)}


def test_what_is_here_already_is_still_checked(tmp_path: Path, good: bytes) -> None:
    """A bundle with a wrong blob is refused also where that blob is held; nothing held is lost."""
    take_bundle(tmp_path / "store", good)
    before = contents(tmp_path / "store")
    with pytest.raises(TransferRefused, match="got sha256:"):
        take_bundle(tmp_path / "store", good.replace(BLOBS[0][:64], BLOBS[0][1:65]))
    assert contents(tmp_path / "store") == before
    assert take_bundle(tmp_path / "store", good) == [ImportOutcome(str(NAME), Fate.PRESENT)]


def test_paths_too_long_for_a_tar() -> None:
    """Said when it is written, not when it is read."""
    with pytest.raises(TransferRefused, match="expected a path that fits"):
        bundle.header(f"manifests/{HOST}/{'n' * 80}/{'m' * 80}/{'t' * 80}", 1)


# --- export --link


def test_a_folder_that_shares_the_store_s_files(tmp_path: Path, tree: Path) -> None:
    """Nothing is copied, and what is removed there stays in the store; a second time it is brought up to date."""
    take_tree(tmp_path / "store", tree)
    inventory, out = Snapshot.read(tmp_path / "store"), tmp_path / "out"
    cargo = select(inventory, ["*"])
    for _ in range(2):
        export_tree(inventory, cargo, out, link=True)
        assert read_models(out) == {PATH: (manifest_of(*BLOBS), BLOBS)}
        for digest in cargo.blobs:
            stored, shared = inventory.blob_path(digest), out / "blobs" / digest.file_name
            assert stored.samefile(shared) or shared.stat().st_nlink == 1
        (out / BLOB).unlink()
    with opened(tmp_path / "store") as store:
        assert all(store.held(digest) for digest in cargo.blobs)
    assert not list(out.rglob(".*"))


def test_reflinks_come_first(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk has them nobody can change the store's bytes by the folder."""

    def clone(source: int, target: int) -> bool:
        os.write(target, os.pread(source, 1 << 20, 0))
        return True

    take_tree(tmp_path / "store", tree)
    inventory = Snapshot.read(tmp_path / "store")
    monkeypatch.setattr(platform, "reflink", clone)
    export_tree(inventory, select(inventory, ["*"]), tmp_path / "out", link=True)
    assert read_models(tmp_path / "out") == {PATH: (manifest_of(*BLOBS), BLOBS)}
    assert (tmp_path / "out" / BLOB).stat().st_nlink == 1


def test_another_disk_cannot_share(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do, and no manifest names what is not there."""

    def link(path: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    take_tree(tmp_path / "store", tree)
    inventory = Snapshot.read(tmp_path / "store")
    monkeypatch.setattr(Path, "hardlink_to", link)
    with pytest.raises(
        TransferRefused, match=r"cannot share .* \(Invalid cross-device link\): name a folder on the store"
    ):
        export_tree(inventory, select(inventory, ["*"]), tmp_path / "out", link=True)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_what_was_changed_is_not_shared(tmp_path: Path, tree: Path) -> None:
    """Its bytes are not those that were verified."""
    take_tree(tmp_path / "store", tree)
    inventory = Snapshot.read(tmp_path / "store")
    os.utime(inventory.blob_path(next(iter(select(inventory, ["*"]).blobs))), (1, 1))
    with pytest.raises(TransferRefused, match="is not the one that was verified; run verify"):
        export_tree(inventory, select(inventory, ["*"]), tmp_path / "out", link=True)


def test_what_cannot_be_shared_is_left_out(tmp_path: Path, tree: Path) -> None:
    """And told; without that it stops the export."""
    take_tree(tmp_path / "store", tree)
    with opened(tmp_path / "store") as store:
        store.deny(HOST, "library/tiny")
    inventory, told = Snapshot.read(tmp_path / "store"), list[str]()
    assert select(inventory, ["*"], on_left_out=told.append).models == 0
    assert ["public model" in line for line in told] == [True]
    with pytest.raises(TransferRefused, match="public model"):
        select(inventory, ["*"])
