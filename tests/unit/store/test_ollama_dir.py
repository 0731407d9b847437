"""Ollama's models folder, of either generation: what is found in it, in which order, and what is not believed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.records import DEFAULT_HOST, Name
from pullthrough.store import ollama_dir
from pullthrough.store.ollama_dir import OllamaDir, anchor, anchored
from tests.support.modelsfolder import (
    LIST_TYPE,
    MANIFEST_TYPE,
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

PATH = f"{DEFAULT_HOST}/library/tiny/latest"
NAME = Name(DEFAULT_HOST, "library/tiny", "latest")
BLOBS = (b"0123456789abcdef" * 40, b"{{ .Prompt }}", b"{}")
OTHER = (b"converted" * 40, b"{{ .Prompt }}", b"{}")
CHILDREN = {"llamacpp": BLOBS, "ggml": OTHER}


def documents(folder: Path) -> dict[Name, bytes | None]:
    """What each name of the folder leads to."""
    tree = OllamaDir(folder)
    named, strays = tree.models()
    assert not strays
    return {
        name: next((body for path in paths if (body := tree.read(path)) is not None), None)
        for name, paths in named.items()
    }


# --- what is found


@pytest.mark.parametrize("kind", ["link", "hard link", "copy"])
def test_names_of_the_new_tree(tmp_path: Path, kind: Kind) -> None:
    """A link, a hard link and a copy name a document; ollama.com is the public registry, and %3A is a colon."""
    plain = pull_plain(tmp_path, PATH, BLOBS, kind=kind)
    listed = pull_list(tmp_path, "10.0.0.1:5000/me/tiny/q4", CHILDREN, pulled=["ggml"], kind=kind)
    (tmp_path / "manifests-v2" / "10.0.0.1%3A5000").rename(tmp_path / "manifests-v2" / "10.0.0.1%3a5000")
    assert documents(tmp_path) == {NAME: plain, Name("10.0.0.1:5000", "me/tiny", "q4"): listed}


def test_names_of_the_old_tree(tmp_path: Path) -> None:
    """Both names of the public registry lead to one model; the one that the files usually have comes first."""
    usual = write_model(tmp_path, PATH, BLOBS)
    other = write_model(tmp_path, PATH.replace(DEFAULT_HOST, "ollama.com"), OTHER)
    assert documents(tmp_path) == {NAME: usual}
    (tmp_path / "manifests" / PATH).unlink()
    assert documents(tmp_path) == {NAME: other}


def test_the_new_tree_comes_first_for_each_name(tmp_path: Path) -> None:
    """A name of both trees is read in the new one, others where they are; a tree that is not there is empty."""
    old = write_model(tmp_path, PATH, BLOBS)
    assert documents(tmp_path) == {NAME: old}
    older = write_model(tmp_path, f"{DEFAULT_HOST}/library/older/latest", OTHER)
    new = list_of({"ggml": manifest_of(*BLOBS)})
    write_document(tmp_path, PATH, new)
    assert documents(tmp_path) == {NAME: new, NAME._replace(repository="library/older"): older}
    (tmp_path / "manifests").rename(tmp_path / "elsewhere")
    assert documents(tmp_path) == {NAME: new}


def test_the_new_tree_comes_first_in_either_spelling(tmp_path: Path) -> None:
    """A colon that is written as %3a is one; the name that the registry usually has there comes before the other."""
    new = write_document(tmp_path, "10.0.0.1:5000/me/tiny/q4", b"new")
    new.parents[2].rename(tmp_path / "manifests-v2" / "10.0.0.1%3a5000")
    write_model(tmp_path, "10.0.0.1:5000/me/tiny/q4", BLOBS)
    (tmp_path / "manifests-v2" / DEFAULT_HOST / "library" / "tiny").mkdir(parents=True)
    (tmp_path / "manifests-v2" / PATH).write_bytes(b"unusual")
    write_model(tmp_path, PATH, BLOBS)
    assert documents(tmp_path) == {Name("10.0.0.1:5000", "me/tiny", "q4"): b"new", NAME: b"unusual"}
    write_document(tmp_path, PATH, b"usual")
    assert documents(tmp_path)[NAME] == b"usual"


def test_a_dangling_link_falls_back(tmp_path: Path) -> None:
    """An older version has pruned the document: its own manifest counts, under either name of the registry."""
    write_document(tmp_path, PATH, b"pruned").resolve().unlink()
    assert documents(tmp_path) == {NAME: None}
    old = write_model(tmp_path, PATH.replace(DEFAULT_HOST, "ollama.com"), BLOBS)
    assert documents(tmp_path) == {NAME: old}


@pytest.mark.parametrize("kind", ["hard link", "copy"])
def test_a_name_that_is_no_link_dangles_never(tmp_path: Path, kind: Kind) -> None:
    """Its bytes are the document, whether or not that is still a blob."""
    manifest = pull_plain(tmp_path, PATH, BLOBS, kind=kind)
    (tmp_path / "blobs" / f"sha256-{sha256(manifest)}").unlink()
    assert documents(tmp_path) == {NAME: manifest}


def test_what_is_passed_over(tmp_path: Path) -> None:
    """Hidden files, interrupted writes, and what Ollama has converted for itself."""
    manifest = pull_plain(tmp_path, PATH, BLOBS)
    write_shadow(tmp_path, OTHER)
    for tree in ("manifests", "manifests-v2/ollama.com"):
        (tmp_path / tree / ".DS_Store").write_bytes(b"x")
    document_path(tmp_path, PATH).with_name(".manifest-123").symlink_to("/etc/passwd")
    (tmp_path / "manifests" / PATH).with_name(".manifest-123").write_bytes(b"half")
    assert documents(tmp_path) == {NAME: manifest}
    model = write_model(tmp_path, f"{DEFAULT_HOST}/library/llamacpp/latest", OTHER)
    assert documents(tmp_path) == {NAME: manifest, NAME._replace(repository="library/llamacpp"): model}


# --- anchors


def test_an_anchor_stands_for_its_document(tmp_path: Path) -> None:
    """Where the new tree is gone: the manifest itself, or the list rather than its child."""
    plain = pull_plain(tmp_path, PATH, BLOBS)
    listed = pull_list(tmp_path, f"{DEFAULT_HOST}/library/two/latest", CHILDREN, pulled=["ggml", "llamacpp"])
    for path in (tmp_path / "manifests-v2").rglob("latest"):
        path.unlink()
    assert documents(tmp_path) == {NAME: plain, NAME._replace(repository="library/two"): listed}


def test_an_anchor_without_its_document(tmp_path: Path) -> None:
    """Its bytes are nobody's upstream: it is refused, and what to do is said."""
    manifest = pull_plain(tmp_path, PATH, BLOBS)
    document_path(tmp_path, PATH).resolve().unlink()
    with pytest.raises(TransferRefused, match=f"expected sha256:{sha256(manifest)} in blobs, .* pull the model again"):
        documents(tmp_path)


def test_an_anchor_that_stands_for_several(tmp_path: Path) -> None:
    """Two manifests and no list: which is the model's cannot be told."""
    write_blob(tmp_path, manifest_of(*BLOBS))
    write_anchor(tmp_path, PATH, manifest_of(*BLOBS), [manifest_of(*BLOBS), manifest_of(*OTHER)])
    with pytest.raises(TransferRefused, match="expected a manifest that stands for one document, got one for 2"):
        documents(tmp_path)


def test_anchors_are_told_from_manifests() -> None:
    """By a layer that is a document; ours are like Ollama's."""
    manifest = manifest_of(*BLOBS)
    listed = list_of({"ggml": manifest})
    assert anchored(manifest) is None
    digests = [Digest(sha256(listed)), Digest(sha256(manifest))]
    kept = {digests[0]: (LIST_TYPE, len(listed)), digests[1]: (MANIFEST_TYPE, len(manifest))}
    parsed = json.loads(manifest)
    assert anchored(anchor(parsed, kept)) == digests[0]
    assert anchored(anchor(parsed, {digests[1]: kept[digests[1]]})) == digests[1]


@given(st.binary(max_size=40) | st.sampled_from([b"[]", b"{}", b'{"layers":[1]}', b'{"layers":[{"mediaType":[]}]}']))
@example(b'{"layers":[{"mediaType":"%s","digest":"sha256:x"}]}' % LIST_TYPE.encode())
@example(b"[" * 100_000)
def test_no_manifest_is_no_anchor(body: bytes) -> None:
    """Whatever it is instead."""
    assert anchored(body) is None


# --- what is not believed


def _to(target: Callable[[Path, Path], str]) -> Callable[[Path], object]:
    """Let the name be a link to where `target` says, given the folder and the blob."""

    def spoil(folder: Path) -> None:
        path = document_path(folder, PATH)
        blob = path.resolve()
        path.unlink()
        path.symlink_to(target(folder, blob))

    return spoil


def _outside(folder: Path, blob: Path) -> str:
    copy = folder.parent / "blobs" / blob.name
    copy.parent.mkdir()
    copy.write_bytes(blob.read_bytes())
    return f"../../../../../blobs/{blob.name}"


def _beside(folder: Path, blob: Path) -> str:
    (folder / "blobs" / "notes").write_bytes(blob.read_bytes())
    return "../../../../blobs/notes"


def _link_in_blobs(folder: Path, blob: Path) -> str:
    blob.rename(folder / "elsewhere")
    blob.symlink_to(folder / "elsewhere")
    return f"../../../../blobs/{blob.name}"


def _other_bytes(folder: Path) -> None:
    document_path(folder, PATH).resolve().write_bytes(manifest_of(*OTHER))


def _linked_tree(folder: Path) -> None:
    (folder / "manifests-v2").rename(folder.parent / "elsewhere")
    (folder / "manifests-v2").symlink_to(folder.parent / "elsewhere")


def _linked_blobs(folder: Path) -> None:
    (folder / "blobs").rename(folder.parent / "elsewhere")
    (folder / "blobs").symlink_to(folder.parent / "elsewhere")


def _large(folder: Path) -> None:
    path = document_path(folder, PATH)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(_to(lambda folder, blob: "/etc/passwd"), "expected a link to blobs/sha256-", id="absolute"),
        pytest.param(_to(lambda folder, blob: "../../../../../../etc/passwd"), "expected a link to", id="escape"),
        pytest.param(_to(_outside), "expected a link to", id="a blob outside"),
        pytest.param(_to(_beside), "expected a link to", id="no blob"),
        pytest.param(_to(lambda folder, blob: f"../../../../blobs/{blob.name.upper()}"), "got one to", id="upper case"),
        pytest.param(_to(lambda folder, blob: "latest"), "expected a link to", id="itself"),
        pytest.param(
            _to(lambda folder, blob: f"../../../../manifests/{PATH}"), "expected a link to", id="the old tree"
        ),
        pytest.param(_to(_link_in_blobs), "expected a regular file, got a link", id="a blob that is a link"),
        pytest.param(_other_bytes, f"got sha256:{sha256(manifest_of(*OTHER))}", id="other bytes"),
        pytest.param(_linked_tree, "manifests-v2: expected a folder, got a link", id="a tree elsewhere"),
        pytest.param(_linked_blobs, "blobs: expected a folder, got a link", id="blobs elsewhere"),
        pytest.param(_large, "expected a manifest of at most 4194304 bytes, got more", id="large"),
    ],
)
def test_hostile_names(tmp_path: Path, spoil: Callable[[Path], object], why: str) -> None:
    """An error that says why, though the old tree has a manifest of that name; nothing is read but what is meant."""
    folder = tmp_path / "models"
    pull_plain(folder, PATH, BLOBS)
    write_model(folder, PATH, BLOBS)
    spoil(folder)
    with pytest.raises((TransferRefused, OSError), match=why):
        documents(folder)


def test_an_absolute_link_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to the same blob, however the folder was typed."""
    manifest = pull_plain(tmp_path, PATH, BLOBS)
    _to(lambda folder, blob: str(blob))(tmp_path)
    assert documents(tmp_path) == {NAME: manifest}
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    assert documents(Path("..")) == {NAME: manifest}


def test_strays(tmp_path: Path) -> None:
    """Names that are none are told, folders that are links are not entered."""
    pull_plain(tmp_path, PATH, BLOBS)
    new = tmp_path / "manifests-v2"
    (new / "linked").symlink_to(new / "ollama.com")
    (new / "ollama.com" / "library" / "two words").mkdir()
    (new / "ollama.com" / "library" / "two words" / "latest").write_bytes(b"x")
    (new / "a.host" / "a" / "b" / "c").mkdir(parents=True)
    if os.name != "nt":
        os.mkfifo(new / "ollama.com" / "library" / "tiny" / "pipe")
    named, strays = OllamaDir(tmp_path).models()
    assert list(named) == [NAME]
    expected = ["a.host/a/b/c", "linked", "ollama.com/library/tiny/pipe", "ollama.com/library/two words/latest"]
    assert strays == [f"manifests-v2/{path}" for path in expected if os.name != "nt" or "pipe" not in path]


# --- names and places


@given(st.text(max_size=80))
@example(f"manifests/{PATH}")
@example(f"manifests-v2/{PATH}")
@example("manifests-v2/10.0.0.1%3a5000/a/b/c")
@example("manifests/10.0.0.1%3A5000/a/b/c")
@example(f"manifests/{DEFAULT_HOST}/a/b/sha256:{'0' * 64}")
@example(f"manifests/{DEFAULT_HOST}/a/b/c\n")
def test_paths_name_models(text: str) -> None:
    """A path that is understood leads nowhere else, and its model has one place in each tree."""
    name = ollama_dir.parse_manifest_path(text)
    if name is not None:
        for path in (ollama_dir.manifest_path(name), ollama_dir.document_path(name)):
            assert ollama_dir.parse_manifest_path(path) == name
            assert ".." not in Path(path).parts
    digest = ollama_dir.parse_blob_path(text)
    assert digest is None or ollama_dir.blob_path(digest) == text


def test_places() -> None:
    """The host is spelled as each tree does."""
    assert ollama_dir.manifest_path(NAME) == f"manifests/{PATH}"
    assert ollama_dir.document_path(NAME) == "manifests-v2/ollama.com/library/tiny/latest"
    assert ollama_dir.manifest_path(NAME._replace(host="ollama.com")) == f"manifests/{PATH}"
    other = Name("10.0.0.1:5000", "me/tiny", "q4")
    assert ollama_dir.manifest_path(other) == "manifests/10.0.0.1:5000/me/tiny/q4"
    assert ollama_dir.document_path(other) == "manifests-v2/10.0.0.1%3A5000/me/tiny/q4"


def test_names_without_a_place() -> None:
    """Ollama's folders are four deep."""
    for repository in ("tiny", "a/b/c"):
        with pytest.raises(TransferRefused, match="expected host/namespace/model:tag"):
            ollama_dir.manifest_path(NAME._replace(repository=repository))


def test_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLLAMA_MODELS first, then the user's folder, of either generation; none is said with where was looked."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ollama_dir.default_tree({"OLLAMA_MODELS": "/elsewhere"}) == Path("/elsewhere")
    if not Path("/usr/share/ollama").exists():
        with pytest.raises(TransferRefused, match=r"expected OLLAMA_MODELS or models in .*models.*, got none"):
            ollama_dir.default_tree({})
    models = tmp_path / ".ollama" / "models"
    for tree in ("manifests-v2", "manifests"):
        (models / tree).mkdir(parents=True)
        assert ollama_dir.default_tree({}) == models
        (models / tree).rmdir()


# --- the support, which the tests of import and export rely on


def test_the_emulators_read_what_is_generated(tmp_path: Path) -> None:
    """Each generation lists what it can run; a child that is not here is none to the newer."""
    one, two = tmp_path / "one", tmp_path / "two"
    plain = pull_plain(one, PATH, BLOBS)
    assert read_current(one) == {PATH: Listed(plain, {f"sha256:{sha256(plain)}": BLOBS})}
    assert read_models(one)[PATH][1] == (*BLOBS[:-1], plain, BLOBS[-1])
    listed = pull_list(two, PATH, CHILDREN, pulled=["ggml"])
    child = manifest_of(*OTHER)
    assert read_current(two) == {PATH: Listed(listed, {f"sha256:{sha256(child)}": OTHER})}
    assert read_models(two)[PATH][1] == (*OTHER[:-1], listed, child, OTHER[-1])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(_to(lambda folder, blob: "/etc/passwd"), "is not a sha256 blob", id="link elsewhere"),
        pytest.param(_other_bytes, "digest mismatch", id="other bytes"),
    ],
)
def test_the_newer_emulator_is_strict(tmp_path: Path, spoil: Callable[[Path], object], why: str) -> None:
    """As Ollama: an error, though the old tree has that name."""
    pull_plain(tmp_path, PATH, BLOBS)
    spoil(tmp_path)
    with pytest.raises(AssertionError, match=why):
        read_current(tmp_path)


def test_the_newer_emulator_needs_a_child(tmp_path: Path) -> None:
    """A list of which nothing is here cannot be run."""
    pull_list(tmp_path, PATH, CHILDREN, pulled=["ggml"])
    (tmp_path / "blobs" / f"sha256-{sha256(manifest_of(*OTHER))}").unlink()
    with pytest.raises(AssertionError, match="no compatible manifest"):
        read_current(tmp_path)
