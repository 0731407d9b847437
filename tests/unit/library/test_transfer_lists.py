"""import and export of manifest lists, and of models folders that Ollama 0.40 has written."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.library.bundle import END, SUMS, header, padding, sums
from pullthrough.library.exporter import export_bundle, export_tree, select
from pullthrough.library.import_commit import Fate, ImportOutcome
from pullthrough.library.snapshot import Snapshot
from pullthrough.store.store import Store
from tests.support.carrying import import_into
from tests.support.modelsfolder import (
    Kind,
    Listed,
    document_path,
    list_of,
    manifest_of,
    pull_list,
    pull_plain,
    read_current,
    read_models,
    sha256,
    write_anchor,
    write_blob,
    write_document,
    write_model,
    write_shadow,
)
from tests.support.storefiles import blob_file, blob_files

HOST = "registry.ollama.ai"
PATH = f"{HOST}/library/tiny/latest"
NAME = Name(HOST, "library/tiny", "latest")
LIST = NAME._replace(takes_lists=True)
SHARED = (b"{{ .Prompt }}", b'{"model_format":"gguf"}')
LLAMACPP = (b"0123456789abcdef" * 40, *SHARED)
GGML = (b"fedcba9876543210" * 40, *SHARED)
CHILDREN = {"llamacpp": LLAMACPP, "ggml": GGML}
DOCUMENT = list_of({runner: manifest_of(*blobs) for runner, blobs in CHILDREN.items()})


def take(store: Path, source: Path, **options: Any) -> dict[str, tuple[Fate, str]]:
    """What became of each model."""
    with closing(Store.open(store)) as opened:
        outcomes = import_into(opened, source, **options)
    assert len({outcome.model for outcome in outcomes}) == len(outcomes)
    return {outcome.model: (outcome.fate, outcome.why) for outcome in outcomes}


IMPORTED = {str(NAME): (Fate.IMPORTED, "")}


def stored(store: Path) -> dict[Name, bytes]:
    """The manifests and lists of a store, none of which upstream has confirmed, and nothing half done."""
    inventory = Snapshot.read(store)
    assert not any(record.confirmed for record in inventory.manifests.values())
    assert list((store / "ingest").iterdir()) == []
    return {name: record.body for name, record in inventory.manifests.items()}


def held(store: Path) -> set[str]:
    """The blobs of a store by the hashes of their bytes."""
    return {sha256(path.read_bytes()) for path in blob_files(store)}


def hashes(*blobs: bytes) -> set[str]:
    return set(map(sha256, blobs))


def export(store: Path, folder: Path, *models: str) -> None:
    inventory = Snapshot.read(store)
    export_tree(inventory, select(inventory, models or ["*"]), folder)


def packed(store: Path, *models: str) -> bytes:
    inventory = Snapshot.read(store)
    file = io.BytesIO()
    export_bundle(inventory, select(inventory, models or ["*"]), file)
    return file.getvalue()


def take_bundle(store: Path, data: bytes) -> dict[str, tuple[Fate, str]]:
    path = store.with_name("bundle.tar")
    path.write_bytes(data)
    return take(store, path)


# --- a folder of 0.40


@pytest.mark.parametrize("kind", ["link", "hard link", "copy"])
def test_a_plain_model(tmp_path: Path, kind: Kind) -> None:
    """The genuine manifest comes in, not its anchor; its own blob is no blob of the model."""
    manifest = pull_plain(tmp_path / "tree", PATH, GGML, kind=kind)
    assert take(tmp_path / "store", tmp_path / "tree") == IMPORTED
    assert stored(tmp_path / "store") == {NAME: manifest}
    assert held(tmp_path / "store") == hashes(*GGML)
    assert take(tmp_path / "store", tmp_path / "tree") == {str(NAME): (Fate.PRESENT, "")}


@pytest.mark.parametrize("kind", ["link", "hard link", "copy"])
def test_a_list_with_one_child(tmp_path: Path, kind: Kind) -> None:
    """A child that nobody has pulled is no error; that of which everything is there comes in, and all may have it."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"], kind=kind)
    assert take(tmp_path / "store", tmp_path / "tree") == IMPORTED
    assert stored(tmp_path / "store") == {LIST: DOCUMENT}
    child = manifest_of(*GGML)
    assert held(tmp_path / "store") == hashes(child, *GGML)
    with closing(Store.open(tmp_path / "store")) as store:
        record = store.manifest(LIST)
        assert record is not None
        assert (record.content_type, record.is_list, record.denied) == (LIST_TYPE, True, False)
        assert list(store.children()) == [Digest(sha256(child))]
        for hexadecimal in held(tmp_path / "store"):
            blob = store.blob(Digest(hexadecimal))
            assert blob is not None and blob.public
            assert store.is_member(HOST, "library/tiny", Digest(hexadecimal))
    assert take(tmp_path / "store", tmp_path / "tree") == {str(NAME): (Fate.PRESENT, "")}
    # The other child is pulled later.
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["llamacpp", "ggml"], kind=kind)
    assert take(tmp_path / "store", tmp_path / "tree") == IMPORTED
    assert held(tmp_path / "store") == hashes(child, manifest_of(*LLAMACPP), *GGML, *LLAMACPP)


def test_each_kind_of_name_at_once(tmp_path: Path) -> None:
    """What Ollama lists is what comes in: by links, copies, ports, dangling links, and what is left of before."""
    tree = tmp_path / "tree"
    listed = {
        LIST: pull_list(tree, PATH, CHILDREN, pulled=["ggml"]),
        Name("10.0.0.1:5000", "me/copied", "q4"): pull_plain(tree, "10.0.0.1:5000/me/copied/q4", LLAMACPP, kind="copy"),
        Name("hf.co", "me/before", "q8"): write_model(tree, "hf.co/me/before/q8", GGML),
        Name(HOST, "library/other", "latest"): write_model(tree, "ollama.com/library/other/latest", GGML),
        Name(HOST, "library/pruned", "latest"): write_model(tree, f"{HOST}/library/pruned/latest", LLAMACPP),
    }
    write_document(tree, f"{HOST}/library/pruned/latest", b"of a newer Ollama").resolve().unlink()
    write_shadow(tree, GGML)
    document_path(tree, PATH).with_name(".manifest-42").write_bytes(b"half")
    outcomes = take(tmp_path / "store", tree)
    assert outcomes == {str(name): (Fate.IMPORTED, "") for name in listed}
    assert stored(tmp_path / "store") == listed


def test_what_clients_without_lists_get(tmp_path: Path) -> None:
    """A manifest in the old tree beside a list is the other representation; one that is not whole is nobody's loss."""
    tree = tmp_path / "tree"
    pull_list(tree, PATH, CHILDREN, pulled=["ggml"])
    manifest = write_model(tree, PATH, LLAMACPP)
    assert take(tmp_path / "store", tree) == IMPORTED
    assert stored(tmp_path / "store") == {LIST: DOCUMENT, NAME: manifest}
    (tree / "blobs" / f"sha256-{sha256(LLAMACPP[0])}").unlink()
    assert take(tmp_path / "other", tree) == IMPORTED
    assert stored(tmp_path / "other") == {LIST: DOCUMENT}


def test_a_manifest_in_place(tmp_path: Path) -> None:
    """A list may hold its manifests themselves: their blobs come in, and an older Ollama is given them."""
    tree = tmp_path / "tree"
    for blob in GGML:
        write_blob(tree, blob)
    children = [
        {"mediaType": DOCKER_TYPE, "runner": runner, "format": "gguf", **json.loads(manifest_of(*blobs))}
        for runner, blobs in CHILDREN.items()
    ]
    document = json.dumps({"schemaVersion": 2, "mediaType": LIST_TYPE, "manifests": children}).encode()
    write_document(tree, PATH, document)
    assert take(tmp_path / "store", tree) == IMPORTED
    assert held(tmp_path / "store") == hashes(*GGML)
    export(tmp_path / "store", tmp_path / "out")
    ((_, blobs),) = read_models(tmp_path / "out").values()
    assert blobs == (*GGML[:-1], document, GGML[-1])


def _without_children(tree: Path) -> None:
    for blobs in CHILDREN.values():
        (tree / "blobs" / f"sha256-{sha256(manifest_of(*blobs))}").unlink(missing_ok=True)


def _without_a_layer(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(GGML[0])}").unlink()


def _with_a_wrong_layer(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(GGML[0])}").write_bytes(b"x" * len(GGML[0]))


def _with_a_short_layer(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(GGML[0])}").write_bytes(b"x")


def _with_a_wrong_child(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(manifest_of(*GGML))}").write_bytes(manifest_of(*LLAMACPP))


def _with_a_linked_child(tree: Path) -> None:
    path = tree / "blobs" / f"sha256-{sha256(manifest_of(*GGML))}"
    path.rename(tree / "elsewhere")
    path.symlink_to(tree / "elsewhere")


def _with_a_linked_layer(tree: Path) -> None:
    path = tree / "blobs" / f"sha256-{sha256(GGML[0])}"
    path.rename(tree / "elsewhere")
    path.symlink_to(tree / "elsewhere")


def _with_a_list_inside(tree: Path) -> None:
    write_blob(tree, DOCUMENT)
    write_document(tree, PATH, list_of({"ggml": DOCUMENT}))


def _with_a_page_inside(tree: Path) -> None:
    write_blob(tree, b"<html>")
    write_document(tree, PATH, list_of({"ggml": b"<html>"}))


def _of_nothing(tree: Path) -> None:
    write_document(tree, PATH, list_of({}))


def _linked_elsewhere(tree: Path) -> None:
    path = document_path(tree, PATH)
    path.unlink()
    path.symlink_to("/etc/hostname")


def _dangling_with_an_anchor(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(DOCUMENT)}").unlink()


def _dangling_alone(tree: Path) -> None:
    (tree / "blobs" / f"sha256-{sha256(DOCUMENT)}").unlink()
    (tree / "manifests" / PATH).unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(_without_children, "expected all blobs of one manifest of the list", id="no child"),
        pytest.param(_without_a_layer, "expected all blobs of one manifest of the list", id="no layer"),
        pytest.param(_with_a_wrong_layer, f"got sha256:{sha256(b'x' * len(GGML[0]))}", id="wrong layer"),
        pytest.param(_with_a_short_layer, f"got sha256:{sha256(b'x')}", id="short layer"),
        pytest.param(_with_a_wrong_child, f"got sha256:{sha256(manifest_of(*LLAMACPP))}", id="wrong child"),
        pytest.param(_with_a_linked_child, "expected a regular file, got a link", id="child is a link"),
        pytest.param(_with_a_linked_layer, "expected a regular file, got a link", id="layer is a link"),
        pytest.param(_with_a_list_inside, "expected a manifest, as the list says", id="list in a list"),
        pytest.param(_with_a_page_inside, "expected a manifest, as the list says", id="child is no manifest"),
        pytest.param(_of_nothing, "expected a manifest that lists blobs", id="empty list"),
        pytest.param(_linked_elsewhere, "expected a link to blobs/sha256-", id="link elsewhere"),
        pytest.param(_dangling_with_an_anchor, "for which this file stands with older versions", id="no document"),
        pytest.param(_dangling_alone, "expected a manifest where the link", id="dangling link"),
    ],
)
def test_a_bad_list_is_refused_and_other_models_are_not(
    tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    """With a reason; nothing of it stays, whatever the old tree has of that name."""
    tree = tmp_path / "tree"
    pull_list(tree, PATH, CHILDREN, pulled=["ggml"])
    pull_plain(tree, f"{HOST}/library/other/latest", [b"other", *SHARED])
    spoil(tree)
    outcomes = take(tmp_path / "store", tree)
    assert outcomes.pop(f"{HOST}/library/other:latest") == (Fate.IMPORTED, "")
    ((fate, reason),) = outcomes.values()
    assert (fate, why in reason) == (Fate.REFUSED, True), reason
    assert set(stored(tmp_path / "store")) == {NAME._replace(repository="library/other")}
    assert held(tmp_path / "store") == hashes(b"other", *SHARED)


def test_private_lists_are_nobodys(tmp_path: Path) -> None:
    """Children and what they list neither, until the operator says otherwise."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    take(tmp_path / "store", tmp_path / "tree", public=False)
    with closing(Store.open(tmp_path / "store")) as store:
        assert store.manifest(LIST).denied  # type: ignore[union-attr]
        assert not any(blob.public for blob in store.blobs().values())
        for hexadecimal in held(tmp_path / "store"):
            assert not store.is_member(HOST, "library/tiny", Digest(hexadecimal))
    with pytest.raises(TransferRefused, match="expected a public model"):
        packed(tmp_path / "store", "tiny")
    assert take(tmp_path / "store", tmp_path / "tree") == IMPORTED
    with closing(Store.open(tmp_path / "store")) as store:
        assert all(blob.public for blob in store.blobs().values())


def test_a_confirmed_list_is_kept(tmp_path: Path) -> None:
    """Unless told otherwise, as a manifest is; a conversion of its own that a folder has is no reason to replace it."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    take(tmp_path / "store", tmp_path / "tree")
    with closing(Store.open(tmp_path / "store")) as store:
        record = store.manifest(LIST)
        assert record is not None
        store.put_manifest(LIST, record._replace(confirmed=5.0))
    own = pull_list(tmp_path / "tree", PATH, {"llamacpp": LLAMACPP}, pulled=["llamacpp"])
    ((fate, _),) = take(tmp_path / "store", tmp_path / "tree").values()
    assert fate is Fate.KEPT
    ((fate, _),) = take(tmp_path / "store", tmp_path / "tree", replace_confirmed=True).values()
    assert fate is Fate.IMPORTED
    assert stored(tmp_path / "store") == {LIST: own}


# --- a folder that both generations read


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a list of which both children are here, one with one child, and a plain model."""
    tree = tmp_path / "source"
    pull_list(tree, PATH, CHILDREN, pulled=["ggml", "llamacpp"])
    half = {"ggml": (b"nobody has this", *SHARED), "mlx": (b"mlx", *SHARED)}
    pull_list(tree, "10.0.0.1:5000/me/half/q4", half, pulled=["mlx"])
    pull_plain(tree, f"{HOST}/library/plain/latest", GGML)
    outcomes = take(tmp_path / "store", tree)
    assert {fate for fate, _ in outcomes.values()} == {Fate.IMPORTED}
    return tmp_path / "store"


def test_what_each_generation_lists(tmp_path: Path, store: Path) -> None:
    """The newer one all manifests of each list that are here, by links; the older one the best of them."""
    export(store, tmp_path / "out")
    current = read_current(tmp_path / "out")
    assert current == read_current(tmp_path / "source")
    assert {name: list(each.runnable.values()) for name, each in current.items()} == {
        PATH: [LLAMACPP, GGML],
        "10.0.0.1:5000/me/half/q4": [(b"mlx", *SHARED)],
        f"{HOST}/library/plain/latest": [GGML],
    }
    older = read_models(tmp_path / "out")
    children = [manifest_of(*LLAMACPP), manifest_of(*GGML)]
    assert older[PATH][1] == (*LLAMACPP[:-1], DOCUMENT, *children, LLAMACPP[-1])
    half = older["10.0.0.1:5000/me/half/q4"][1]
    assert (half[:2], half[3:]) == ((b"mlx", SHARED[0]), (manifest_of(b"mlx", *SHARED), SHARED[1]))
    assert older[f"{HOST}/library/plain/latest"] == (manifest_of(*GGML), GGML)
    names = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("manifests-v2/*/*/*/*")
    )
    assert names == ["manifests-v2/10.0.0.1%3A5000/me/half/q4", "manifests-v2/ollama.com/library/tiny/latest"]
    link = document_path(tmp_path / "out", PATH).readlink()
    assert link == Path(f"../../../../blobs/sha256-{sha256(DOCUMENT)}")
    assert not list((tmp_path / "out").rglob(".*"))


def test_copies_where_links_fail(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without links, or a Windows that forbids them."""

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    export(store, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert read_current(tmp_path / "out") == read_current(tmp_path / "source")
    assert take(tmp_path / "far", tmp_path / "out").keys() == read_names(store)


def read_names(store: Path) -> set[str]:
    return {str(name) for name in stored(store)}


def test_into_a_folder_where_a_newer_ollama_works(tmp_path: Path, store: Path) -> None:
    """A model that the new tree names is named anew there: what is only in the old tree would not be seen."""
    out = tmp_path / "out"
    pull_plain(out, PATH, [b"older", *SHARED])
    pull_list(out, f"{HOST}/library/plain/latest", CHILDREN, pulled=["llamacpp"], kind="copy")
    export(store, out, "tiny", "plain")
    current = read_current(out)
    assert current[PATH].document == DOCUMENT
    plain = manifest_of(*GGML)
    assert current[f"{HOST}/library/plain/latest"] == Listed(plain, {f"sha256:{sha256(plain)}": GGML})
    assert read_models(out)[f"{HOST}/library/plain/latest"] == (plain, GGML)


def test_both_representations_are_exported(tmp_path: Path) -> None:
    """The old tree has what the registry says to those who take no lists, so the far cache has it too."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    manifest = write_model(tmp_path / "tree", PATH, LLAMACPP)
    take(tmp_path / "store", tmp_path / "tree")
    export(tmp_path / "store", tmp_path / "out")
    assert read_models(tmp_path / "out") == {PATH: (manifest, LLAMACPP)}
    assert read_current(tmp_path / "out") == read_current(tmp_path / "tree")
    assert take_bundle(tmp_path / "far", packed(tmp_path / "store")) == IMPORTED
    assert stored(tmp_path / "far") == {LIST: DOCUMENT, NAME: manifest}
    # One of them may have lost its blobs.
    with closing(Store.open(tmp_path / "store")) as store:
        store.disown(Digest(sha256(GGML[0])))
    export(tmp_path / "store", tmp_path / "other")
    assert set(read_current(tmp_path / "other")) == {PATH}
    assert not (tmp_path / "other" / "manifests-v2").exists()


def test_two_plain_representations_are_one(tmp_path: Path) -> None:
    """Where both kinds of client were told a manifest, the one that was confirmed last goes."""
    for kind, blobs in (("old", LLAMACPP), ("new", GGML)):
        write_model(tmp_path / kind, PATH, blobs)
        take(tmp_path / "store", tmp_path / kind, replace_confirmed=True)
        with closing(Store.open(tmp_path / "store")) as store:
            record = store.manifest(NAME)
            assert record is not None
            store.put_manifest(NAME if kind == "old" else LIST, record._replace(confirmed=7.0 + (kind == "new")))
    with closing(Store.open(tmp_path / "store")) as store:
        old = ManifestRecord.parse(manifest_of(*LLAMACPP), DOCKER_TYPE, now=7.0)
        assert old is not None
        store.put_manifest(NAME, old)
    export(tmp_path / "store", tmp_path / "out")
    assert read_models(tmp_path / "out") == {PATH: (manifest_of(*GGML), GGML)}
    assert not (tmp_path / "out" / "manifests-v2").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda store: store.disown(Digest(sha256(SHARED[0]))), "all its blobs", id="no child is whole"),
        pytest.param(lambda store: store.deny(HOST, "library/tiny"), "expected a public model", id="private"),
        pytest.param(
            lambda store: [store.disown(child) for child in store.children()], "all its blobs", id="no child is held"
        ),
    ],
)
def test_not_exported(tmp_path: Path, spoil: Callable[[Store], object], message: str) -> None:
    """Only lists of which one manifest is here, whole and public."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    take(tmp_path / "store", tmp_path / "tree")
    with closing(Store.open(tmp_path / "store")) as store:
        spoil(store)
    with pytest.raises(TransferRefused, match=message):
        packed(tmp_path / "store", "tiny")


def test_an_anchor_that_was_taken_for_a_model(tmp_path: Path) -> None:
    """A store of before, into which one was imported: it is nobody's manifest, and what to do is said."""
    body = write_anchor(tmp_path / "tree", PATH, manifest_of(*GGML), [manifest_of(*GGML)])
    record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
    assert record is not None
    with closing(Store.open(tmp_path / "store")) as store:
        store.put_manifest(NAME, record)
    with pytest.raises(TransferRefused, match=r"expected a registry's manifest, got an anchor .*: remove"):
        packed(tmp_path / "store", "tiny")


# --- there and back, and bundles


def test_there_and_back(tmp_path: Path, store: Path) -> None:
    """Store → folder → store → bundle → store → the same bundle; each byte of each document is the same."""
    export(store, tmp_path / "out")
    take(tmp_path / "one", tmp_path / "out")
    bundle = packed(tmp_path / "one")
    assert bundle == packed(store)
    assert {fate for fate, _ in take_bundle(tmp_path / "two", bundle).values()} == {Fate.IMPORTED}
    assert packed(tmp_path / "two") == bundle
    assert stored(store) == stored(tmp_path / "one") == stored(tmp_path / "two")
    assert held(store) == held(tmp_path / "one") == held(tmp_path / "two")
    assert {fate for fate, _ in take_bundle(tmp_path / "two", bundle).values()} == {Fate.PRESENT}


def test_a_list_that_is_a_blob_of_another_model(tmp_path: Path) -> None:
    """It is one member of a bundle and one file of a folder."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    write_model(tmp_path / "tree", f"{HOST}/library/other/latest", [DOCUMENT, *SHARED])
    take(tmp_path / "store", tmp_path / "tree")
    bundle = packed(tmp_path / "store")
    assert {fate for fate, _ in take_bundle(tmp_path / "far", bundle).values()} == {Fate.IMPORTED}
    assert packed(tmp_path / "far") == bundle
    export(tmp_path / "store", tmp_path / "out")
    assert read_current(tmp_path / "out") == read_current(tmp_path / "tree")


def test_a_bundle_is_a_tar_of_a_models_folder(tmp_path: Path, store: Path) -> None:
    """Any tar unpacks it to what both generations read; no member is a link."""
    with tarfile.open(fileobj=io.BytesIO(packed(store))) as archive:
        assert all(member.isreg() for member in archive.getmembers())
        archive.extractall(tmp_path / "out", filter="data")
    export(store, tmp_path / "exported")
    assert read_current(tmp_path / "out") == read_current(tmp_path / "exported")
    assert read_models(tmp_path / "out") == read_models(tmp_path / "exported")
    for line in (tmp_path / "out" / SUMS).read_text().splitlines():
        digest, path = line.split("  ")
        assert sha256((tmp_path / "out" / path).read_bytes()) == digest


OLD = f"manifests/{PATH}"
NEW = "manifests-v2/ollama.com/library/tiny/latest"


def _blobs(*blobs: bytes) -> dict[str, bytes]:
    return {f"blobs/sha256-{sha256(blob)}": blob for blob in blobs}


def _anchor(tmp_path: Path, *extra: bytes) -> bytes:
    return write_anchor(tmp_path / "anchors", PATH, manifest_of(*GGML), [DOCUMENT, manifest_of(*GGML), *extra])


def _bundle(members: dict[str, bytes]) -> bytes:
    listed = {path: sha256(data) for path, data in members.items()}
    return (
        b"".join(
            header(path, len(data)) + data + padding(len(data))
            for path, data in {SUMS: sums(listed), **members}.items()
        )
        + END
    )


@pytest.fixture
def good(tmp_path: Path) -> dict[str, bytes]:
    """The members of a bundle with a list, of whose children one is here."""
    return {OLD: _anchor(tmp_path), NEW: DOCUMENT, **_blobs(DOCUMENT, manifest_of(*GGML), *GGML)}


def test_that_bundle(tmp_path: Path, good: dict[str, bytes]) -> None:
    """It is a good one, with the anchor and without it: the hostile ones are made from it."""
    assert take_bundle(tmp_path / "store", _bundle(good)) == IMPORTED
    assert stored(tmp_path / "store") == {LIST: DOCUMENT}
    assert held(tmp_path / "store") == hashes(manifest_of(*GGML), *GGML)
    del good[OLD]
    assert take_bundle(tmp_path / "other", _bundle(good)) == IMPORTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({NEW: None}, "got no such document of that name", id="anchor alone"),
        pytest.param({NEW: list_of({"ggml": manifest_of(*GGML)})}, "got no such document", id="anchor of another list"),
        pytest.param(
            {OLD: manifest_of(*LLAMACPP)}, "expected it in the bundle, got no such member", id="manifest without blobs"
        ),
        pytest.param({"anchor": "of more"}, "which it stands for, got others", id="anchor with more"),
        pytest.param(dict.fromkeys(_blobs(DOCUMENT)), "expected it in the bundle", id="list is no blob"),
        pytest.param(dict.fromkeys(_blobs(GGML[0])), "expected all blobs of one manifest", id="no layer"),
        pytest.param(dict.fromkeys(_blobs(manifest_of(*GGML))), "expected all blobs of one manifest", id="no child"),
        pytest.param(_blobs(manifest_of(*LLAMACPP)), "got it too", id="half a child"),
        pytest.param({NEW: b"<html>"}, "expected a manifest that lists blobs", id="no list"),
        pytest.param(
            {NEW.replace("ollama.com", HOST): DOCUMENT}, "the path of a manifest or blob", id="other name of the host"
        ),
        pytest.param({"manifests-v2/h%3a1/a/b/c": DOCUMENT}, "the path of a manifest or blob", id="other spelling"),
        pytest.param({"manifests-v2/../a/b/c": DOCUMENT}, "the path of a manifest or blob", id="escape"),
    ],
)
def test_hostile_bundle(tmp_path: Path, good: dict[str, bytes], change: dict[str, Any], message: str) -> None:
    """Refused whole, with what was expected and what was got."""
    if change == {"anchor": "of more"}:
        change = {OLD: _anchor(tmp_path, b"more")} | _blobs(b"more")
    members = {path: data for path, data in (good | change).items() if data is not None}
    with pytest.raises(TransferRefused, match=r"expected .*, got") as caught:
        take_bundle(tmp_path / "store", _bundle(members))
    assert message in str(caught.value)
    assert stored(tmp_path / "store") == {}
    assert held(tmp_path / "store") == set()


@pytest.fixture(scope="module")
def receiving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, bytes]]:
    """An empty store, and a bundle with a list for it."""
    folder = tmp_path_factory.mktemp("receiving")
    pull_list(folder / "tree", PATH, CHILDREN, pulled=["ggml"])
    take(folder / "source", folder / "tree")
    with closing(Store.open(folder / "store")) as store:
        yield store, packed(folder / "source")


@given(st.data())
def test_any_damage_is_refused_whole(receiving: tuple[Store, bytes], data: st.DataObject) -> None:
    """One byte changed, wherever it is: nothing is imported."""
    store, good = receiving
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    path = store.folder.with_name("bundle.tar")
    path.write_bytes(bad)
    with pytest.raises(TransferRefused, match="expected"):
        import_into(store, path)
    assert (dict(store.manifests()), store.blobs()) == ({}, {})


@pytest.mark.parametrize(
    ("claimed", "message"),
    [pytest.param(640, None, id="right"), pytest.param(641, "expected 641 bytes, got 640", id="wrong")],
)
def test_each_manifest_claims_the_true_sizes(tmp_path: Path, claimed: int, message: str | None) -> None:
    """Also of a blob whose size another one has told."""
    other = manifest_of(GGML[0]).replace(b":  640", b":  %d" % claimed)
    members = {OLD: manifest_of(*GGML), OLD.replace("tiny", "other"): other, **_blobs(*GGML)}
    if message is None:
        assert len(take_bundle(tmp_path / "store", _bundle(members))) == 2
        return
    with pytest.raises(TransferRefused, match=message):
        take_bundle(tmp_path / "store", _bundle(members))
    assert stored(tmp_path / "store") == {}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_bundle(tmp_path: Path, good: dict[str, bytes], kind: bytes) -> None:
    """Even the one that a models folder has there: a header is believed only if it is a file's."""
    info = tarfile.TarInfo(NEW)
    info.type, info.linkname = kind, f"../../../../blobs/sha256-{sha256(DOCUMENT)}"
    bad = _bundle(good).replace(header(NEW, len(DOCUMENT)), info.tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(TransferRefused, match="expected regular files only, got"):
        take_bundle(tmp_path / "store", bad)
    assert stored(tmp_path / "store") == {}


def test_outcomes_are_told_once(tmp_path: Path) -> None:
    """A model that comes in both representations is one model."""
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    write_model(tmp_path / "tree", PATH, GGML)
    with closing(Store.open(tmp_path / "store")) as store:
        assert import_into(store, tmp_path / "tree") == [ImportOutcome(str(NAME), Fate.IMPORTED)]
        assert set(store.manifests()) == {NAME, LIST}


def test_hard_links_of_a_list(tmp_path: Path) -> None:
    """`--link` makes them of children as of other blobs."""
    if os.name == "nt":
        pytest.skip("needs a system whose files have owners")
    pull_list(tmp_path / "tree", PATH, CHILDREN, pulled=["ggml"])
    for path in (tmp_path / "tree" / "blobs").iterdir():
        path.chmod(0o644)
    assert take(tmp_path / "store", tmp_path / "tree", link=True) == IMPORTED
    for blob in (manifest_of(*GGML), *GGML):
        name = f"blobs/sha256-{sha256(blob)}"
        assert blob_file(tmp_path / "store", Path(name).name).samefile(tmp_path / "tree" / name)
