"""whereabouts: whose notes count, which are stale, and that looking leaves no trace."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pullthrough.runtime import whereabouts
from pullthrough.runtime.whereabouts import announce, own_folder, running_caches

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no control socket to find")


def note(folder: Path) -> Path:
    return announce(folder, store=Path("/srv/store"), certs=Path("/srv/certs"), page="http://cache:9200/")


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_found(tmp_path: Path) -> None:
    """All of it, for everybody to read, until it is taken away."""
    folder = tmp_path / "run"
    previous = os.umask(0o077)
    try:
        path = note(folder)
    finally:
        os.umask(previous)
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o755, 0o644)
    (found,) = running_caches(folder)
    assert (found.store, found.certs, found.page, found.pid) == (
        "/srv/store",
        "/srv/certs",
        "http://cache:9200/",
        os.getpid(),
    )
    assert found.is_ours and not replace(found, user="somebody").is_ours
    assert str(found) == f"process {os.getpid()} of user {psutil.Process().username()}, store /srv/store"
    path.unlink()
    assert running_caches(folder) == []


@pytest.mark.parametrize("change", [{"boot": "another"}, {"started": 1.0}, {"pid": 2**22 + 1}, {"pid": "x"}])
def test_stale(tmp_path: Path, change: dict[str, object]) -> None:
    """Of an earlier boot, of a process that ended or whose number another has; the next cache removes it."""
    path = note(tmp_path)
    old = path.with_name("1.json")
    path.rename(old)
    rewrite(old, **change)
    assert running_caches(tmp_path) == []
    assert old.exists()
    note(tmp_path)
    assert len(running_caches(tmp_path)) == 1
    assert old.exists() == ("x" in change.values()), "what is no note is not ours to remove"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"store": 1}'])
def test_no_note(tmp_path: Path, text: str) -> None:
    """What cannot be read is none."""
    (tmp_path / "1.json").write_text(text)
    assert running_caches(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_elses_note_about_our_process(tmp_path: Path) -> None:
    """Whoever leaves a note must be who runs the process."""
    os.chown(note(tmp_path), 12345, 12345)
    assert running_caches(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can be another user")
def test_a_cache_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, as theirs; a folder in the shared place counts only for the user whose number it has."""
    monkeypatch.setattr(whereabouts, "SHARED", tmp_path / "shared")
    with subprocess.Popen(["sleep", "100"], user=12345, group=12345) as process:
        try:
            for number in (12345, 12346):
                folder = tmp_path / "shared" / f"ollama-cache-{number}"
                path = note(tmp_path / "made").rename(tmp_path / "1.json")
                folder.mkdir(mode=0o755, parents=True)
                path = path.rename(folder / "1.json")
                rewrite(path, pid=process.pid, started=psutil.Process(process.pid).create_time(), store=str(number))
                os.chown(path, 12345, 12345)
                os.chown(folder, 12345, 12345)
            (found,) = running_caches(None)
            assert (found.store, found.is_ours) == ("12345", False)
            (tmp_path / "shared" / "ollama-cache-12345").chmod(0o777)
            assert running_caches(None) == []
        finally:
            process.kill()


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd made, root's, the user's own; looking makes none of them."""
    monkeypatch.setattr(whereabouts, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(whereabouts, "SHARED", tmp_path / "shared")
    assert running_caches(None) == []
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert own_folder() == tmp_path / "shared" / "ollama-cache-7"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert own_folder() == tmp_path / "system"
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/made:{tmp_path}/other")
    assert own_folder() == tmp_path / "made"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"store": ["x"], "certs": "", "page": "", "pid": 1, "started": 1, "boot": ""}', id="no text"),
        pytest.param(
            b'{"store": "\\u001b]0;x\\u0007", "certs": "", "page": "", "pid": 1, "started": 1, "boot": ""}', id="escape"
        ),
        pytest.param(None, id="fifo"),
    ],
)
def test_a_note_that_means_harm(tmp_path: Path, content: bytes | None) -> None:
    """It is passed over: no wait, no traceback, nothing of it on a terminal."""
    path = tmp_path / "0.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert running_caches(tmp_path) == []
