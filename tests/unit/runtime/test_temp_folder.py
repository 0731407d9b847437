"""temp_folder: what killed processes have left goes, and nothing else."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pullthrough.runtime import platform
from pullthrough.runtime.temp_folder import TemporaryFolder

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from pullthrough.runtime.temp_folder import TemporaryFolder
folder = TemporaryFolder()
print(folder.name, flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is removed there")


@pytest.fixture(autouse=True)
def own_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def holder(tmp_path: Path, *wrapper: str) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and the folder."""
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", HOLD, str(tmp_path)],
        env={"PYTHONPATH": str(Path(platform.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_process(tmp_path: Path) -> None:
    """While its process lives it stays, whatever that is called elsewhere; once killed, the next to come removes it."""
    process, folder = holder(tmp_path)
    (folder / "leaf.pem").touch()
    TemporaryFolder().cleanup()
    assert (folder / "leaf.pem").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    TemporaryFolder().cleanup()
    assert not folder.exists()


def test_another_container_that_shares_the_folder(tmp_path: Path) -> None:
    """Its processes have other numbers, of which none here is one."""
    probe = subprocess.run(["unshare", "--user", "--map-root-user", "--pid", "--fork", "true"], check=False)
    if probe.returncode:
        pytest.skip("no namespaces here")
    wrapper = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    process, folder = holder(tmp_path, *wrapper)
    with TemporaryFolder() as own:
        other, theirs = holder(tmp_path, *wrapper)
        assert folder.is_dir() and theirs.is_dir() and Path(own).is_dir()
        other.communicate()
    process.communicate()


def test_what_else_lies_there_stays(tmp_path: Path) -> None:
    """Folders without a lock, links, and what has another name."""
    for name in ("ollama-cache-x", "ollama-cached", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "target" / "lock").touch()
    (tmp_path / "ollama-cache-link").symlink_to(tmp_path / "target")
    with TemporaryFolder() as own:
        assert Path(own).stat().st_mode & 0o077 == 0
        left = {path.name for path in tmp_path.iterdir()} - {Path(own).name}
    assert left == {"ollama-cache-x", "ollama-cached", "target", "ollama-cache-link"}
    assert (tmp_path / "target" / "lock").exists()
    assert not Path(own).exists()
