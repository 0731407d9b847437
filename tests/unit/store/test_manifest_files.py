"""manifest_files: where the file of a name lies, on every disk, and what the newest state of a name is."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.records import DEFAULT_HOST, Name
from pullthrough.runtime import platform
from pullthrough.store import manifest_files
from pullthrough.store.manifest_files import ModelFiles

TINY = Name(DEFAULT_HOST, "library/tiny", "latest")
COMPONENT = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", fullmatch=True)
SHORT = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,5}|con|AUX\.x|a\.|lpt1", fullmatch=True)
NAMES = st.builds(
    Name,
    st.sampled_from([DEFAULT_HOST, "hf.co", "localhost:5000", "HUB.example", "ollama.com"]),
    st.lists(st.one_of(SHORT, COMPONENT), min_size=1, max_size=8).map("/".join),
    st.one_of(SHORT, COMPONENT, st.just("sha256:" + "0a" * 32)),
    st.booleans(),
)


def files(folder: Path, *, folds_case: bool = False) -> ModelFiles:
    (folder / "ingest").mkdir(exist_ok=True)
    return ModelFiles(folder, folds_case=folds_case)


def paths(folder: Path) -> list[str]:
    """All files but those on their way."""
    every = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in every if path.parts[0] != "ingest")


@given(name=NAMES, folds_case=st.booleans())
def test_every_name_has_a_path_of_its_own(name: Name, folds_case: bool) -> None:
    """From which it can be read again, and which every system takes."""
    found = ModelFiles(Path("x"), folds_case=folds_case)._paths(name)
    for path in found:
        assert manifest_files._parse(path) == name
        for part in path.split("/"):
            assert len(part) <= 255
            assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[. ]", part)
            assert not set(part) & set('<>:"\\|?*')
    if folds_case:
        assert found[0] == found[0].lower() or "%3A" in found[0]


@given(names=st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_names_are_distinct_on_disks_that_fold_case(names: list[Name]) -> None:
    """None takes another's place."""
    first, second = (ModelFiles(Path("x"), folds_case=True)._paths(name)[0].lower() for name in names)
    assert first != second


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(TINY, "manifests/registry.ollama.ai/library/tiny/latest", id="plain"),
        pytest.param(TINY.twin, "manifests-v2/ollama.com/library/tiny/latest", id="lists"),
        pytest.param(Name("hf.co", "Me/M-GGUF", "Q4_K_M"), "manifests/hf.co/Me/M-GGUF/Q4_K_M", id="capitals"),
        pytest.param(Name("h:1", "a/b", "c", True), "manifests-v2/h%3A1/a/b/c", id="port, lists"),
        pytest.param(Name("h:1", "a/b", "c"), "other-names/h%3a1%2fa%2fb/@c", id="port, for Ollama 0.33"),
        pytest.param(Name("h", "a/b/c", "d", True), "other-names/h%2fa%2fb%2fc/@d.lists", id="deep, lists"),
        pytest.param(Name("h", "a/con", "c"), "other-names/h%2fa%2fcon/@c", id="a device of Windows"),
        pytest.param(
            TINY._replace(reference="v1."), "other-names/registry%2eollama%2eai%2flibrary%2ftiny/@v1%2e", id="dot"
        ),
    ],
)
def test_paths(tmp_path: Path, name: Name, path: str) -> None:
    """What Ollama has a place for lies there."""
    with closing(files(tmp_path)) as store:
        store.put(name, b"body", denied=False)
        store.flush()
        assert paths(tmp_path) == [f"public/{path}"]
        assert (tmp_path / "public" / path).read_bytes() == b"body"
        ((place, found),) = store.walk()
        assert (place, list(found)) == (name.place, [name])
        assert found == store.of(*name.place)


def test_a_disk_of_the_other_kind(tmp_path: Path) -> None:
    """Files that came from a disk that tells capitals apart are found, replaced and removed on one that does not."""
    name = Name("hf.co", "Me/M", "Q4")
    with closing(files(tmp_path)) as store:
        store.put(name, b"1", denied=False)
    with closing(files(tmp_path, folds_case=True)) as store:
        assert {each: document.body for each, document in store.of(*name.place).items()} == {name: b"1"}
        store.put(name, b"2", denied=False)
        store.flush()
        assert paths(tmp_path) == ["public/other-names/hf%2eco%2f%4de%2f%4d/@%514"]
        store.remove(name)
        store.flush()
        assert paths(tmp_path) == []


def test_hidden_at_once(tmp_path: Path) -> None:
    """The file has left `public/` when `hide` returns, also if it had not been written; no folder is left empty."""
    with closing(files(tmp_path)) as store:
        store.put(TINY, b"1", denied=False)
        store.flush()
        store.hide(TINY, b"1")
        assert not [path for path in paths(tmp_path) if path.startswith("public/")]
        store.flush()
        assert paths(tmp_path) == ["private/manifests/registry.ollama.ai/library/tiny/latest"]
        assert list((tmp_path / "public" / "manifests").iterdir()) == []
        assert store.of(*TINY.place)[TINY].denied
        store.put(TINY, b"2", denied=False)
        store.flush()
        assert paths(tmp_path) == ["public/manifests/registry.ollama.ai/library/tiny/latest"]


def test_the_newest_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hidden while it is being written is not public after that."""
    began, go_on = threading.Event(), threading.Event()
    write: Callable[..., None] = platform.write_at

    def slow(*arguments: object) -> None:
        began.set()
        assert go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr(platform, "write_at", slow)
    with closing(files(tmp_path)) as store:
        store.put(TINY, b"1", denied=False)
        assert began.wait(10)
        store.hide(TINY, b"1")
        go_on.set()
        store.flush()
        store.flush()
        assert paths(tmp_path) == ["private/manifests/registry.ollama.ai/library/tiny/latest"]
        assert not store.is_pending(TINY)
    assert list((tmp_path / "ingest").iterdir()) == []


def test_what_the_disk_refuses_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what comes next, or at the end."""

    def full(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    with closing(files(tmp_path)) as store:
        with monkeypatch.context() as patch:
            patch.setattr(platform, "write_at", full)
            store.put(TINY, b"1", denied=False)
            store.flush()
        assert [message.partition(":")[0] for message in caplog.messages] == [
            "writing the manifest of registry.ollama.ai/library/tiny"
        ]
        assert paths(tmp_path) == []
        assert store.is_pending(TINY)
    assert paths(tmp_path) == ["public/manifests/registry.ollama.ai/library/tiny/latest"]
    assert list((tmp_path / "ingest").iterdir()) == []


def test_strangers_are_passed_over(tmp_path: Path) -> None:
    """What is no name's file says nothing, and a link is not followed."""
    folder = tmp_path / "public" / "manifests" / "hf.co" / "me" / "x"
    folder.mkdir(parents=True)
    (tmp_path / "public" / "other-names" / "%zz").mkdir(parents=True)
    (tmp_path / "public" / "other-names" / "%zz" / "@%ff").write_bytes(b"{}")
    (tmp_path / "secret").write_bytes(b"{}")
    (folder / "linked").symlink_to(tmp_path / "secret")
    (folder / ".hidden").write_bytes(b"{}")
    (folder / "long").write_bytes(bytes((4 << 20) + 1))
    with closing(files(tmp_path)) as store:
        assert list(store.walk()) == [(("hf.co", "me/x"), {})]
