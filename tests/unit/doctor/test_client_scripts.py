"""client_scripts: what is filled in, and that the shell's script is one for any POSIX shell.

What the scripts find is shown in tests/e2e/test_doctor.py.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.errors import CacheError
from pullthrough.doctor import client_scripts
from pullthrough.doctor.client_scripts import SCRIPTS, scripts

FOLDERS: Final = {"dir": Path("/store"), "certs": Path("/certs")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_filled_in(name: str) -> None:
    """The hosts, the port that clients reach, and the versions; nothing is left open."""
    body = scripts(parse_settings({"registries": "hf.co,registry.ollama.ai"}, **FOLDERS))[f"/{name}"].body.decode()
    assert f"'hf.co registry.ollama.ai {R2_HOST}'" in body
    assert f"http://CACHE:9200/{name}" in body
    assert "'0.35.0'" in body and "'0.40.2'" in body
    assert "@@" not in body
    assert all(len(line) < 250 and line.isascii() for line in body.splitlines())


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ({"listen": ":9300"}, "plain_port='9300'"),
        ({"advertise": "cache.lan:9400"}, "plain_port='9400'"),
        ({"listen": "off"}, "plain_port=''"),
    ],
)
def test_port(texts: dict[str, str], line: str) -> None:
    """That under which clients reach it, if there is one."""
    assert line in scripts(parse_settings(texts, **FOLDERS))["/doctor.sh"].body.decode().splitlines()


@pytest.mark.parametrize(
    "checker", [("dash", "-n"), ("bash", "--posix", "-n"), ("shellcheck", "-s", "sh")], ids=lambda words: words[0]
)
def test_shell(checker: tuple[str, ...], tmp_path: Path) -> None:
    """It is a script of the POSIX shell, and nothing in it is suspicious."""
    if shutil.which(checker[0]) is None:
        pytest.skip(f"needs the program {checker[0]}")
    script = tmp_path / "doctor.sh"
    script.write_bytes(scripts(parse_settings({}, **FOLDERS))["/doctor.sh"].body)
    done = subprocess.run([*checker, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs ends in words, with what the script had to say until then."""
    shell = tmp_path / "sh"
    shell.write_text("#!/bin/sh\necho so far >&2\nexec sleep 30\n")
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(client_scripts, "_PATIENCE_S", 0.5)
    with pytest.raises(CacheError, match=r"doctor.sh has not come to an end .*\(so far\)"):
        client_scripts.examine(parse_settings({}, **FOLDERS))


def test_refusal(tmp_path: Path) -> None:
    """An argument that it does not know is an error of its own, and nothing is looked at."""
    script = tmp_path / "doctor.sh"
    script.write_bytes(scripts(parse_settings({}, **FOLDERS))["/doctor.sh"].body)
    done = subprocess.run(["sh", script, "--undo"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ollama-cache: expected --fields or nothing, got '--undo'\n"
