"""The monitoring files as their programs see them, and a real Prometheus that scrapes the cache."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from pullthrough.monitoring.status_page import SHARE
from tests.e2e.conftest import MB, add_model, unique
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy, free_port

pytestmark = pytest.mark.long

HERE: Final = Path(__file__).parent


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} on this machine")
    return path


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules(tmp_path: Path) -> None:
    """promtool takes the rules, each fires in its story, and none where all is well."""
    promtool = program("promtool")
    shutil.copy(SHARE / "alerts.yml", tmp_path)
    shutil.copy(HERE / "alerts_test.yml", tmp_path)
    assert "12 rules found" in run(promtool, "check", "rules", "--lint-fatal", "alerts.yml", cwd=tmp_path)
    run(promtool, "test", "rules", "alerts_test.yml", cwd=tmp_path)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Callable[[str], float | None]]:
    """A Prometheus that scrapes `target` each second; asks it for the one value of an expression."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(SHARE / "alerts.yml")],
        "scrape_configs": [{"job_name": "ollama-cache", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def ask(expression: str) -> float | None:
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=5) as response:
                result = json.load(response)["data"]["result"]
        except OSError:
            return None
        return float(result[0]["value"][1]) if result else None

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def wait_for(ask: Callable[[str], float | None], expression: str, expected: float) -> None:
    deadline = time.monotonic() + 30
    while (value := ask(expression)) != expected:
        assert time.monotonic() < deadline, f"expected {expression} to become {expected}, got {value}"
        time.sleep(0.1)


def test_a_prometheus_scrapes(tmp_path: Path) -> None:
    """What a pull has brought arrives there, and no rule has anything to complain of."""
    program("prometheus")
    with (
        Origin(tmp_path / "origin") as origin,
        Proxy(tmp_path, origin, front=True) as proxy,
        prometheus(tmp_path, f"127.0.0.1:{proxy.front_port}") as ask,
    ):
        wait_for(ask, "ollama_cache_models", 0)
        model = add_model(origin, unique(3 * MB))
        for name in ("cold", "warm"):
            A2Client(proxy.url, proxy.ca_file, tmp_path / name).pull(model.name)
            for blob in model.blobs:
                proxy.wait_for_line(f"recorded {blob[7:19]}")
        size = 3 * MB + origin.blob(model.config).size
        wait_for(ask, "ollama_cache_models", 1)
        wait_for(ask, "ollama_cache_upstream_bytes_total", size)
        wait_for(ask, "ollama_cache_served_bytes_total", 2 * size)
        wait_for(ask, 'ollama_cache_recordings_ended_total{result="stored"}', 2)
        wait_for(ask, 'sum(ollama_cache_requests_total{status=~"4xx|5xx"}) or vector(0)', 0)
        assert ask("process_resident_memory_bytes") is not None
        assert ask("ollama_cache_build_info") == 1
        with urllib.request.urlopen(f"http://127.0.0.1:{proxy.front_port}/metrics", timeout=20) as response:
            metrics = response.read()
        done = subprocess.run(
            [program("promtool"), "check", "metrics"], input=metrics, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")
        assert ask("count(ALERTS)") is None
