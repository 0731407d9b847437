"""layout: who may write to a store, who may have it, and where nothing in it leads."""

import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError
from pullthrough.store.layout import FORMAT, PINS, load_pins, save_pins
from pullthrough.store.store import Store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="rights of files are others there")


def link(name: str) -> Callable[[Path], str]:
    """Somebody has moved a part of the store, and put a link in its place."""

    def spoil(folder: Path) -> str:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")
        return f"{folder / name} is a link to {folder.parent / 'elsewhere'}, which the store does not follow"

    return spoil


def mode(name: str, bits: int, mend: str) -> Callable[[Path], str]:
    """A part of the store is open to others."""

    def spoil(folder: Path) -> str:
        (folder / name).chmod(bits)
        return f"(mode {bits:04o}): {mend} {folder / name}"

    return spoil


def file_for_folder(folder: Path) -> str:
    (folder / "ingest").rmdir()
    (folder / "ingest").touch()
    return "ingest: expected a folder, got another kind"


@pytest.mark.parametrize(
    "spoil",
    [
        *(link(name) for name in ("lock", "secret", "pins", "verified", "index", "ingest", "private", "public/blobs")),
        mode("", 0o777, "chmod o-w"),
        mode("secret", 0o666, "chmod 600"),
        mode("verified", 0o644, "chmod 600"),
        mode("private", 0o755, "chmod 700"),
        mode("public/blobs", 0o777, "chmod o-w"),
        file_for_folder,
    ],
)
def test_what_is_not_safe(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    """It is refused with the mend, and after that nothing is held."""
    folder = tmp_path / "store"
    with closing(Store.open(folder)) as store:
        store.ledger.pin("x")
        path = tmp_path / "blob"
        path.write_bytes(b"")
        store.place(Digest("0" * 64), path)
    expected = spoil(folder)
    with pytest.raises(StoreError) as refusal:
        Store.open(folder)
    assert expected in str(refusal.value).replace(f"{folder}/ ", f"{folder} ")


def test_an_open_umask(tmp_path: Path) -> None:
    """What the cache makes is safe whatever the umask is."""
    before = os.umask(0)
    try:
        for _ in range(2):
            Store.open(tmp_path / "store").close()
    finally:
        os.umask(before)
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        if path.parent.name != "index":
            assert not path.stat().st_mode & stat.S_IWOTH, path


def _try(folder: Path, queue: Any) -> None:
    try:
        Store.open(folder).close()
        queue.put("opened")
    except StoreError as error:
        queue.put(str(error))


def test_a_removed_lock_lets_nobody_in(tmp_path: Path) -> None:
    """The folder itself is locked, too."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with closing(Store.open(tmp_path / "store")):
        (tmp_path / "store" / "lock").unlink()
        process = context.Process(target=_try, args=(tmp_path / "store", queue))
        process.start()
        assert "expected a free store, got one in use by process unknown" in queue.get(timeout=60)
        process.join()
    Store.open(tmp_path / "store").close()


@pytest.mark.long
def test_a_locked_index(tmp_path: Path) -> None:
    """Another process that has it locked holds up neither the end nor the start beyond some seconds."""
    folder = tmp_path / "store"
    store = Store.open(folder)
    with closing(sqlite3.connect(folder / "index" / "cache.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        store._index.put_members("h", "r", ["x"])
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 10
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"index in .* is locked by another process"):
            Store.open(folder)
        assert time.monotonic() - began < 10
    Store.open(folder).close()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs root")
def test_root_acts_as_the_owner(tmp_path: Path) -> None:
    """What a verb makes in another user's store is that user's."""
    folder = tmp_path / "store"
    Store.open(folder).close()
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 12345, 12345)
    for path in (tmp_path, *tmp_path.parents):
        if (mode := path.stat().st_mode) & 0o055 != 0o055:
            path.chmod(mode | 0o055)
    program = [sys.executable, "-c", "from pullthrough.cli import main; main()", "pin", "llama*", "--dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": "addon", "HOME": str(tmp_path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_pins(folder) == {"llama*"}
    assert {path.lstat().st_uid for path in folder.rglob("*")} == {12345}


def test_pins_are_a_list(tmp_path: Path) -> None:
    """A pattern on each line, which a person may edit."""
    assert load_pins(tmp_path) == set()
    save_pins(tmp_path, {"b*", "a"})
    assert (tmp_path / PINS).read_text() == "a\nb*\n"
    (tmp_path / PINS).write_text(" a \n\nc:*\n")
    assert load_pins(tmp_path) == {"a", "c:*"}
    (tmp_path / PINS).write_bytes(b"\xff")
    with pytest.raises(StoreError, match="expected a pattern on each line"):
        load_pins(tmp_path)


def test_the_format_counts(tmp_path: Path) -> None:
    """It is what the marker says."""
    Store.open(tmp_path / "store").close()
    assert f'"format": {FORMAT}' in (tmp_path / "store" / "ollama-cache.json").read_text()
