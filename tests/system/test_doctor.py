"""The doctor beside real faults: each is planted, found, and its mend named."""

import contextlib
import email.utils
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pullthrough.cli import app as cli
from pullthrough.config.paths import own_program
from pullthrough.pki.authority import Authority
from tests.e2e.conftest import add_model
from tests.support.clientmachine import Machine, answering
from tests.support.origin import R2_HOST, REGISTRY_HOST, Fault, Mode
from tests.support.proxy import environment
from tests.support.world import CACHE, REDIRECT, World, play

pytestmark = pytest.mark.long


class Doctor:
    """Runs it for one store, and for the Ollama daemon of this process's machine."""

    def __init__(self, folder: Path, store: Path, certs: Path) -> None:
        self._folder = folder
        self._env = {"OLLAMA_CACHE_DIR": str(store), "OLLAMA_CACHE_CERTS": str(certs), "OLLAMA_CACHE_MIN_FREE": "0"}

    def findings(self, *arguments: str, **env: str) -> dict[str, str]:
        """What is wrong, and what mends it."""
        told = CliRunner().invoke(cli.app, ["doctor", "--json", *arguments], env={**self._env, **env})
        found = json.loads(told.stdout)
        assert told.exit_code == int(any(finding["grave"] for finding in found)), told.output
        # Wherever it lies, it is named by how it is called from here.
        return {finding["what"]: finding["mend"].replace(own_program(), "ollama-cache") for finding in found}


@contextlib.contextmanager
def bare_mitmdump(folder: Path, port: int) -> Iterator[None]:
    """A proxy that knows nothing of us."""
    program = Path(sys.executable).with_name("mitmdump")
    with subprocess.Popen(
        [program, "--listen-port", str(port), "--set", f"confdir={folder / 'bare'}", "--ssl-insecure"],
        env=environment(folder / "home"),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "listening" in line:
                    break
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def moved_away(path: Path) -> Iterator[None]:
    """The file or folder is not there meanwhile."""
    away = path.with_name(f"{path.name} away")
    path.rename(away)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        away.rename(path)


def server(world: World) -> None:
    origin, folder = world.origin, world.folder
    add_model(origin, b"x", repository="library/all-minilm")
    with world.at("cache"):
        doctor = Doctor(folder, folder / "store", folder / "certs")
        assert set(doctor.findings()) == {"the cache does not run", "the registry cannot be reached"}
        # Nobody knows of the origin's CA but the cache that is to run.
        assert "ssl_verify_upstream_trusted_ca" in doctor.findings()["the registry cannot be reached"]
        full = doctor.findings(OLLAMA_CACHE_MIN_FREE="100PB", OLLAMA_CACHE_OFFLINE="true")
        assert full.keys() == {"the cache does not run", "min_free is more than the disk has"}
        with bare_mitmdump(folder, 8080):
            found = doctor.findings(OLLAMA_CACHE_OFFLINE="true")
            assert found == {"another program has the port": "stop it, or ollama-cache run --listen-port and listen="}
    with world.cache("regular@0.0.0.0:8080", ollama_cache_listen=":9200") as proxy, world.at("cache"):
        doctor = Doctor(folder, proxy.store, proxy.ca_file.parent)
        assert doctor.findings() == {}
        origin.faults.append(Fault(Mode.IGNORE_RANGE))
        assert doctor.findings().keys() == {"blobs cannot be had in parts"}
        late = {"Date": email.utils.formatdate(time.time() - 3600, usegmt=True)}
        origin.faults.append(Fault(Mode.STATUS, where="registry", status=404, headers=late))
        assert doctor.findings() == {"the clock is wrong": "timedatectl set-ntp true"}
        (proxy.store / "quarantine/x").touch()
        assert doctor.findings() == {"bytes in quarantine": "ollama-cache verify"}
        (proxy.store / "quarantine/x").unlink()
        marker = proxy.store / "ollama-cache.json"
        with moved_away(marker):
            assert doctor.findings().keys() == {"the store cannot be used"}
        with moved_away(proxy.ca_file.parent):
            assert doctor.findings().keys() == {"the certificate authority cannot be used"}
            Authority.load_or_create(proxy.ca_file.parent, (REGISTRY_HOST, R2_HOST), now=datetime.now(UTC))
            found = doctor.findings()
            assert found.keys() == {"the running cache has another authority"}
            assert "start the cache again" in found["the running cache has another authority"]
        with world.at("internet"):
            origin.stop()
        assert "firewall" in doctor.findings()["the registry cannot be reached"]
        with world.at("internet"):
            origin.start()
        assert doctor.findings() == {}


def client(world: World) -> None:
    (world.folder / "machine").mkdir()
    machine = Machine(world.folder / "machine", b"")
    machine.command = ["sh", "-c", f"curl -fsS http://{CACHE}:9200/doctor.sh | sh -s -- --fields"]
    gateway = any(map(shutil.which, REDIRECT))
    modes = ("regular@0.0.0.0:8080", f"reverse:https://{REGISTRY_HOST}@0.0.0.0:443")
    with world.cache(*modes, *(["transparent@0.0.0.0:8081"] if gateway else []), ollama_cache_listen=":9200") as proxy:
        trusts = {"SSL_CERT_FILE": machine.write("/ca.pem", proxy.ca_file.read_text())}
        assert machine.findings({**trusts, "HTTPS_PROXY": f"http://{CACHE}:8080"}) == []
        (found,) = machine.findings(trusts)
        assert found.what == "the daemon has no HTTPS_PROXY"
        world.client_hosts({REGISTRY_HOST: CACHE})
        assert machine.findings(trusts) == []
        (found,) = machine.findings({})
        assert found.what == "the daemon does not trust the cache"
        with answering({}, b'{"version": "0.40.1"}') as port:
            (found,) = machine.findings({**trusts, "OLLAMA_HOST": f"127.0.0.1:{port}"})
        assert found.what == "this Ollama refuses a hosts entry"
        world.client_hosts({})
        if gateway:
            world.redirect()
            with answering({}, b'{"version": "0.40.1"}') as port:
                # It goes past every proxy, and not past a gateway.
                assert machine.findings({**trusts, "OLLAMA_HOST": f"127.0.0.1:{port}"}) == []


def test_client(tmp_path: Path) -> None:
    """A client that fetches its doctor from the cache: by a proxy, by a hosts entry, and at a gateway."""
    play(client, tmp_path)


def test_server(tmp_path: Path) -> None:
    """Ten faults of a cache, and a cache that is well."""
    play(server, tmp_path)
