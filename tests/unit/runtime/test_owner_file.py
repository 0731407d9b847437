"""owner_file: one owner among machines that share a disk and no locks."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pullthrough.runtime import owner_file
from pullthrough.runtime.owner_file import Owner, OwnerFile

QUICK = {"renew_s": 0.05, "stale_s": 0.6, "settle_s": 0.1}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let what follows be on another machine."""

    def move(name: str) -> None:
        monkeypatch.setattr(owner_file, "_machine", lambda: name)
        monkeypatch.setattr(owner_file.socket, "gethostname", lambda: name)

    return move


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk with hard links, and on one without."""
    if not request.param:

        def link(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_one_after_the_other(tmp_path: Path, machine: Callable[[str], None]) -> None:
    """The second is refused while the first lives, and told who that is; then it has it."""
    machine("one")
    first = OwnerFile(tmp_path / "owner", **QUICK)
    assert first.take() is None
    machine("two")
    second = OwnerFile(tmp_path / "owner", **QUICK)
    assert str(second.take()) == f"process {os.getpid()} on one"
    first.release()
    assert list(tmp_path.iterdir()) == []
    third = OwnerFile(tmp_path / "owner", **QUICK)
    assert third.take() is None
    third.release()
    assert list(tmp_path.iterdir()) == []


def test_a_silent_owner_is_taken_over(
    tmp_path: Path, machine: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """After the stated time, with a line; if it comes back it is told, and takes nothing back."""
    machine("one")
    lost: list[Owner] = []
    told = threading.Event()
    first = OwnerFile(
        tmp_path / "owner", renew_s=1.2, stale_s=0.3, settle_s=0.05, on_lost=lambda who: (lost.append(who), told.set())
    )
    assert first.take() is None
    machine("two")
    second = OwnerFile(tmp_path / "owner", **{**QUICK, "stale_s": 0.3})
    began = time.monotonic()
    assert second.take() is None
    assert time.monotonic() - began >= 0.3
    assert "taken over from process" in caplog.text
    assert "no sign of life for" in caplog.text
    assert told.wait(10)
    assert [owner.host for owner in lost] == ["two"]
    first.release()
    assert json.loads((tmp_path / "owner").read_bytes())["host"] == "two"
    second.release()


def test_a_dead_process_of_this_machine(tmp_path: Path) -> None:
    """It is taken over at once; a living one refuses at once."""
    code = (
        "import sys, os, pathlib; from pullthrough.runtime.owner_file import OwnerFile;"
        "print(OwnerFile(pathlib.Path(sys.argv[1])).take(), flush=True); sys.stdin.read(); os._exit(9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "owner")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "addon"},
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"None\n"
    mine = OwnerFile(tmp_path / "owner", settle_s=0.05)
    began = time.monotonic()
    assert (holder := mine.take()) is not None
    assert holder.pid == process.pid
    process.communicate()
    mine = OwnerFile(tmp_path / "owner", settle_s=0.05)
    assert mine.take() is None
    assert time.monotonic() - began < owner_file.STALE_S / 3
    mine.release()


def test_many_take_over_at_once(tmp_path: Path, machine: Callable[[str], None]) -> None:
    """One stays, and all others are told of it."""
    machine("gone")
    gone = OwnerFile(tmp_path / "owner", renew_s=1e9)
    assert gone.take() is None
    machine("new")
    owners = [OwnerFile(tmp_path / "owner", renew_s=0.05, stale_s=0.3, settle_s=0.5) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        holders = list(pool.map(OwnerFile.take, owners))
    assert holders.count(None) == 1
    owners[holders.index(None)].release()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_removed_file_is_made_again(tmp_path: Path) -> None:
    """Somebody has cleaned up."""
    owner = OwnerFile(tmp_path / "owner", **QUICK)
    assert owner.take() is None
    (tmp_path / "owner").unlink()
    deadline = time.monotonic() + 10
    while not _size(tmp_path / "owner") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads((tmp_path / "owner").read_bytes())["pid"] == os.getpid()
    owner.release()


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b'{"count": 1}', b"{" * 5000])
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    """What is no owner's gives no sign of life, and is taken over."""
    (tmp_path / "owner").write_bytes(content)
    owner = OwnerFile(tmp_path / "owner", renew_s=0.05, stale_s=0.1, settle_s=0.01)
    assert owner.take() is None
    owner.release()
