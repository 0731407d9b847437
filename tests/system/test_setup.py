"""A new machine, from the printed command to a pull, and back to what it was.

The client is a network namespace whose /etc is a copy: the system's own update-ca-certificates works on that. systemd
is played by a program that reads the drop-ins and notes the environment that the service is started with.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pullthrough.cli import app as cli
from tests.e2e.conftest import MB, Model, add_model, unique
from tests.support.a2 import A2Client
from tests.support.foreign import gguf
from tests.support.proxy import environment
from tests.support.world import CACHE, Missing, World, play

pytestmark = pytest.mark.long

ANCHORS = Path("/usr/local/share/ca-certificates")
SYSTEM_LIST = Path("/etc/ssl/certs/ca-certificates.crt")
SYSTEMCTL = r"""#!/bin/sh
given() { cat /etc/systemd/system/ollama.service.d/*.conf 2>/dev/null | sed -n 's/^Environment="\(.*\)"$/\1/p'; }
case $1 in
    show) given | tr '\n' ' ' ;;
    try-restart) given >"$DAEMON" ;;
esac
"""


class NewMachine:
    """What the printed command is run on, and the Ollama daemon there as far as it is an environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemon = folder / "daemon"
        self._daemon.touch()
        tools = folder / "bin"
        tools.mkdir()
        for name, text in {"systemctl": SYSTEMCTL, "sudo": '#!/bin/sh\nexec "$@"\n'}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.env = environment(folder / "home", {"DAEMON": str(self._daemon)})
        self.env["PATH"] = f"{tools}:{self.env['PATH']}"
        for place in (Path("/etc"), ANCHORS):
            if not place.is_dir():
                raise Missing(f"needs a system with {place}")
            copy = folder / place.name
            # What may not be read is not needed; the hosts entries are the world's own.
            subprocess.run(["cp", "-a", "--no-preserve=ownership", place, copy], capture_output=True, check=False)
            shutil.copy("/etc/hosts", copy)
            # What other packages make of the list is theirs; Java's has the time in it.
            shutil.rmtree(copy / "ca-certificates" / "update.d", ignore_errors=True)
            subprocess.run(["mount", "--bind", copy, place], check=True)
        # Others may have left links that it would put right.
        self.sh("update-ca-certificates --fresh")

    def attempt(self, line: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sh", "-c", line], cwd=self._folder, env=self.env, capture_output=True, text=True, check=False
        )

    def sh(self, line: str) -> str:
        """What the line says, which has to succeed."""
        done = self.attempt(line)
        assert done.returncode == 0, f"{line} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @property
    def daemon(self) -> dict[str, str]:
        """The environment that the service was started with."""
        return dict(line.split("=", 1) for line in self._daemon.read_text().splitlines())

    def files(self) -> dict[str, str | bytes]:
        """All that the command could have touched."""
        found: dict[str, str | bytes] = {}
        for place in (Path("/etc"), ANCHORS):
            for path in place.rglob("*"):
                if path.is_symlink():
                    found[str(path)] = str(path.readlink())
                else:
                    found[str(path)] = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else ""
        return found

    def assert_as(self, before: Mapping[str, str | bytes]) -> None:
        """All is as it was."""
        after = self.files()
        touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not touched, f"expected everything as it was, got other {touched}"

    def pull(self, model: Model, folder: Path) -> None:
        """As the daemon does, and as ramalama does: by the daemon's environment and nothing else."""
        trusted = Path(self.daemon.get("SSL_CERT_FILE", SYSTEM_LIST))
        client = A2Client(self.daemon["HTTPS_PROXY"], trusted, folder / "a2", min_part=MB, max_part=10 * MB)
        report = client.pull(model.name)
        assert report.retries == report.stalls == 0
        ramalama = shutil.which("ramalama", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if ramalama is None:
            raise Missing("needs the program ramalama: pip's extra `test` has it")
        done = subprocess.run(
            [ramalama, "--store", folder / "store", "--nocontainer", "pull", f"ollama://{model.name}"],
            env={**environment(folder / "home"), **self.daemon, "RAMALAMA_IN_CONTAINER": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert any(path.name.endswith(model.layer[7:]) for path in (folder / "store").rglob("*")), "no blob"


def new_machine(world: World) -> None:
    models = [add_model(world.origin, gguf(unique(2 * MB).read(0, 2 * MB))) for _ in range(2)]
    with world.cache("regular@0.0.0.0:8080", ollama_cache_listen=":9200") as proxy:
        with world.at("cache"):
            env = {"OLLAMA_CACHE_DIR": str(proxy.store)}
            printed = CliRunner().invoke(cli.app, ["connect", "--address", f"{CACHE}:8080"], env=env)
        assert printed.exit_code == 0, printed.output
        machine = NewMachine(world.folder)
        before = machine.files()

        said = machine.sh(printed.stdout)
        assert f"ollama.service pulls through http://{CACHE}:8080" in said, said
        assert machine.daemon == {"HTTPS_PROXY": f"http://{CACHE}:8080"}
        machine.pull(models[0], world.folder / "by the system's list")
        assert "nothing to change" in machine.sh(printed.stdout)
        machine.sh(f"curl -fsSo script http://{CACHE}:9200/connect/linux.sh && sh script --undo")
        assert machine.daemon == {}
        machine.assert_as(before)

        machine.sh(f"sh script --no-system-store http://{CACHE}:8080")
        machine.pull(models[1], world.folder / "by a list of its own")
        machine.sh("sh script --undo")
        assert machine.daemon == {}
        machine.assert_as(before)

        wrong = printed.stdout.replace("linux.sh && echo", "macos.sh && mv macos.sh linux.sh && echo")
        assert wrong != printed.stdout
        done = machine.attempt(wrong)
        assert done.returncode != 0 and "FAILED" in done.stdout
        machine.assert_as(before)
    for model in models:
        for digest in model.blobs:
            assert world.origin.counters.cdn_bytes_by_digest[digest] == world.origin.blob(digest).size


def test_new_machine(tmp_path: Path) -> None:
    """The printed command fetches, checks and runs; then two clients pull at once, and after --undo nothing is left."""
    play(new_machine, tmp_path)
