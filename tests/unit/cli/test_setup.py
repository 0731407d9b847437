"""setup without a cache that runs: what is printed for a client, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from click.testing import Result
from typer.testing import CliRunner

from pullthrough.cli import app as cli
from pullthrough.config.settings import R2_HOST
from pullthrough.pki.authority import Authority

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb, with folders of the test's own and no settings but those in `env`."""
    for name in ("TERMINAL_WIDTH", "COLUMNS"):
        monkeypatch.setenv(name, "80")
    monkeypatch.setattr("pullthrough.runtime.platform.lan_address", lambda: "10.0.0.1")
    Authority.load_or_create(tmp_path / "certs", ["registry.ollama.ai", R2_HOST], now=datetime.now(UTC))
    folders = {"OLLAMA_CACHE_DIR": str(tmp_path / "store"), "OLLAMA_CACHE_CERTS": str(tmp_path / "certs")}

    def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(cli.app, arguments, env={**folders, **(env or {})}, prog_name="ollama-cache")

    return invoke


ADDRESSES: Final = {
    "given": ("--address 10.9.8.7", {}, "10.9.8.7:9200", "10.9.8.7:8080"),
    "given with a port": ("--address cache.lan:3128", {}, "cache.lan:9200", "cache.lan:3128"),
    "IPv6 without brackets": ("--address fd00::2", {}, "[fd00::2]:9200", "[fd00::2]:8080"),
    "IPv6": ("--address [fd00::1]:3128", {}, "[fd00::1]:9200", "[fd00::1]:3128"),
    "advertised": ("", {"OLLAMA_CACHE_ADVERTISE": "cache.lan:9300"}, "cache.lan:9300", "cache.lan:8080"),
    "own": ("", {}, "10.0.0.1:9200", "10.0.0.1:8080"),
    "another port": ("", {"OLLAMA_CACHE_LISTEN": ":9999", "OLLAMA_CACHE_FRONT": ""}, "10.0.0.1:9999", "10.0.0.1:8080"),
}


@pytest.mark.parametrize(("line", "env", "server", "proxy"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_address(run: Run, line: str, env: dict[str, str], server: str, proxy: str) -> None:
    """Where the script is fetched from, and what it is told; standard output is the command and nothing else."""
    result = run("connect", *line.split(), env=env)
    assert result.exit_code == 0, result.output
    (command,) = result.stdout.splitlines()
    assert f"curl -fsSO --noproxy '*' http://{server}/connect/linux.sh " in command
    assert command.endswith(f"-c && $(command -v sudo) sh linux.sh http://{proxy}")


@pytest.mark.parametrize(
    ("arguments", "env", "expected"),
    [
        pytest.param("", {"OLLAMA_CACHE_LISTEN": "off"}, "the port of the option listen, which is off", id="no port"),
        pytest.param("--address a;reboot", {}, "expected a host or host:port, got 'a;reboot'", id="not an address"),
        pytest.param("--address cache.lan:65536", {}, "expected a port from 1 to 65535, got 65536", id="port too high"),
        pytest.param("--address cache.lan:0", {}, "expected a port from 1 to 65535, got 0", id="port 0"),
        pytest.param("--address http://a", {}, "got 'http://a'", id="a URL"),
        pytest.param("--for amiga", {}, "'amiga'", id="unknown system"),
    ],
)
def test_refused(run: Run, arguments: str, env: dict[str, str], expected: str) -> None:
    """Nothing is printed that could be run."""
    result = run("connect", *arguments.split(), env=env)
    assert result.exit_code in (1, 2) and result.stdout == ""
    assert expected in re.sub(r"\s+", " ", result.stderr)


def test_no_address(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client is never sent to its own loopback; an address that is named is the user's matter."""
    monkeypatch.setattr("pullthrough.runtime.platform.lan_address", lambda: "127.0.0.1")
    result = run("connect")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "clients cannot reach 127.0.0.1" in result.stderr and "--address" in result.stderr
    assert "http://10.9.8.7:9200" in run("connect", "--address", "10.9.8.7").stdout
    assert "http://cache.lan:9200" in run("connect", env={"OLLAMA_CACHE_ADVERTISE": "cache.lan"}).stdout


@pytest.mark.parametrize(
    ("host", "listen", "told"),
    [
        ("127.0.0.1", ":9200", "at port 8080 (127.0.0.1), and"),
        ("", "127.0.0.1:9200", "at port 9200 (127.0.0.1), and"),
        ("", ":9200", ""),
    ],
)
def test_a_cache_for_its_own_machine(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, listen: str, told: str
) -> None:
    """Whoever prints a line for a client is told that none can connect."""

    def answer(_: Path, command: str, __: object) -> object:
        rows = {"dir": str(tmp_path / "store"), "certs": str(tmp_path / "certs"), "listen": listen}
        return {
            "proxy": {"host": host, "port": 8080},
            "config": [{"name": name, "value": value, "source": ""} for name, value in rows.items()],
        }[command]

    for module in ("common", "setup"):
        monkeypatch.setattr(f"pullthrough.cli.{module}.ask", answer)
    result = run("connect")
    assert result.exit_code == 0 and "http://10.0.0.1:" in result.stdout
    assert told in result.stderr
    assert ("for this machine alone" in result.stderr) is bool(told)


def test_json(run: Run) -> None:
    """The command, or the document, is a member."""
    told = json.loads(run("connect", "--for", "macos", "--json").stdout)
    assert told["command"] == run("connect", "--for", "macos").stdout.strip()
    told = json.loads(run("connect", "--for", "compose", "--json").stdout)
    assert told["document"] == run("connect", "--for", "compose").stdout


@pytest.mark.parametrize("kind", ["linux", "macos", "windows", "compose", "kubernetes"])
def test_undo(run: Run, tmp_path: Path, kind: str) -> None:
    """For each kind of client there is a line, which needs no address, store or authority."""
    shutil.rmtree(tmp_path / "certs")
    told = run("connect", "--undo", "--for", kind)
    assert (told.exit_code, told.stderr, told.stdout.count("\n")) == (0, "", 1)
    assert json.loads(run("connect", "--undo", "--for", kind, "--json").stdout) == {
        "for": kind,
        "undo": told.stdout[:-1],
    }
    assert list(tmp_path.iterdir()) == []


def test_doctor(run: Run, tmp_path: Path) -> None:
    """Where nothing runs it says what to start, in words and as JSON, and makes nothing."""
    env = {"OLLAMA_CACHE_OFFLINE": "true", "OLLAMA_CACHE_MIN_FREE": "0"}
    told = run("doctor", "--json", env=env)
    (finding,) = json.loads(told.stdout)
    assert told.exit_code == 1
    assert list(finding) == ["what", "why", "mend", "grave"]
    # Somebody else may use mitmproxy's port on this machine.
    assert finding["what"] in ("the cache does not run", "another program has the port")
    told = run("doctor", env=env)
    assert told.exit_code == 1
    assert told.stdout == f"{finding['what']}: {finding['why']}\n    {finding['mend']}\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "certs"]


def test_connect_without_a_cache(run: Run, tmp_path: Path) -> None:
    """It says that none runs, and on which store; without an authority too it makes none and prints nothing."""
    result = run("connect")
    assert result.exit_code == 0 and f"No cache runs on {tmp_path / 'store'}: start it" in result.stderr
    for path in (tmp_path / "certs").iterdir():
        path.unlink()
    (tmp_path / "certs").rmdir()
    result = run("connect")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"no cache runs on {tmp_path / 'store'}, and there is no authority in {tmp_path / 'certs'}" in result.stderr
    assert list(tmp_path.iterdir()) == []
