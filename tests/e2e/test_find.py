"""Commands find the cache that runs: from another home and folder, and not when it is gone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.proxy import Proxy, environment, free_port


@pytest.fixture
def proxy(tmp_path: Path) -> Proxy:
    """A cache whose port without a proxy is open; not started."""
    port = free_port()
    return Proxy(tmp_path / "cache", ollama_cache_listen=f"127.0.0.1:{port}")


def call(folder: Path, proxy: Proxy, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call a verb in an empty home and an empty folder, knowing no more than where notes lie on this machine."""
    notes = {"OLLAMA_CACHE_RUNTIME_DIR": str(proxy.directory / "home" / "run")}
    env = environment(folder / "other home", notes)
    del env["OLLAMA_CACHE_LISTEN"]
    program = Path(sys.executable).with_name("ollama-cache")
    return subprocess.run([program, *arguments], env=env, cwd=folder, capture_output=True, text=True, check=False)


def test_commands_find_the_cache(tmp_path: Path, proxy: Proxy) -> None:
    """The store, the port and the authority are those of the one that runs; nothing is made by looking."""
    with proxy:
        rows = {row["name"]: row["value"] for row in json.loads(call(tmp_path, proxy, "config", "--json").stdout)}
        assert rows["dir"] == str(proxy.store)
        assert rows["certs"] == str(proxy.ca_file.parent)
        told = call(tmp_path, proxy, "connect", "--address", "cache.lan")
        assert told.returncode == 0, told.stderr
        assert told.stdout.rstrip().endswith(f"sh linux.sh http://cache.lan:{proxy.port}")
        assert "No cache runs" not in told.stderr
    for verb in (["ls"], ["connect"], ["doctor"]):
        told = call(tmp_path, proxy, *verb)
        assert told.returncode == 1, told
        assert "Traceback" not in told.stderr
    assert "/other home/" in call(tmp_path, proxy, "connect").stderr, "expected the store that was looked at"
    assert list((tmp_path / "other home").iterdir()) == []


@pytest.mark.long
def test_another_authority_is_told(tmp_path: Path) -> None:
    """A store that is served with another authority than before: which one its clients trust."""
    first = Proxy(tmp_path)
    with first:
        pass
    with Proxy(tmp_path, ollama_cache_certs=tmp_path / "others") as proxy:
        line = proxy.wait_for_line("this store was served with another authority")
        assert f"in {tmp_path / 'certs'}: clients that were set up by then trust that one" in line
