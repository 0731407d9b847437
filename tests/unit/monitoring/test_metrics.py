"""metrics: each number under its name, bounded labels, and formats that parse."""

import asyncio
import json
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.errors import UpstreamTimeout
from pullthrough.library.eviction import Evictor
from pullthrough.library.listing import JSON
from pullthrough.monitoring.health import Health
from pullthrough.monitoring.metrics import Metrics
from pullthrough.monitoring.probes import Probes
from pullthrough.monitoring.status_page import SHARE
from pullthrough.recording.plan import Line
from pullthrough.recording.pulls import Counts
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.recorder import Recorder
from pullthrough.recording.states import Event
from pullthrough.runtime.executors import Threads
from pullthrough.runtime.loop_lag import LoopLag
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

END = datetime(2030, 1, 1, tzinfo=UTC)


class Daemon:
    """The parts that metrics are read from."""

    def __init__(self, folder: Path, store: Store, threads: Threads) -> None:
        self.settings = parse_settings({"max_size": "1GB"}, dir=folder, certs=folder)
        self.upstream = Upstream(self.settings)
        evictor = Evictor(store, threads, max_size=None, min_free=0)
        line = Line(16, RateLimit(None))
        self.recorder = Recorder(store, evictor, self.upstream, threads, line, self.settings.finish)
        self.requests = RequestLog()
        self.health = Health(store.folder, lambda: {"CA": END})
        self.reachability = self.upstream.reachability
        self.metrics = Metrics(
            self.settings,
            store,
            self.recorder,
            self.upstream,
            self.requests,
            LoopLag(),
            self.health,
            Counts(7, 8),
            self.tier,
        )

    def tier(self) -> JSON:
        counts = ("waiting", "uploaded_bytes", "failures", "forged", "corrupt")
        return {"state": "in use", **{name: number for number, name in enumerate(counts, 10)}}

    async def scrape(self) -> dict[tuple[str, ...], float]:
        """Our samples by name and values of labels."""
        self.health.open(Probes(self.reachability, {}))
        body, _ = await self.metrics.expose("")
        families = parse_text(body.decode())
        samples = [sample for family in families for sample in family.samples if sample.name.startswith("ollama")]
        return {
            (sample.name.removeprefix("ollama_cache_"), *sample.labels.values()): sample.value for sample in samples
        }


@contextmanager
def running(folder: Path) -> Iterator[Daemon]:
    store, threads = Store.open(folder / "store"), Threads()
    try:
        yield Daemon(folder, store, threads)
    finally:
        threads.close()
        store.close()


def test_numbers(tmp_path: Path) -> None:
    """What was counted is told; what has not happened is told as 0, so that its first time is an increase."""

    async def count(daemon: Daemon) -> list[dict[tuple[str, ...], float]]:
        fresh = await daemon.scrape()
        daemon.requests.answer("a", "GET", "/v2/x", 307, CacheStatus(Outcome.MISS))
        daemon.requests.transfer("a", "GET", "/y", 206, CacheStatus(Outcome.HIT), sent=7, seconds=1, problem="")
        daemon.requests.answer("a", "GET", "/v2/x", 304, CacheStatus(Outcome.MISS))
        counters = daemon.recorder.counters
        counters.upstream_bytes, counters.retries, counters.mismatches, counters.restarts = 5, 4, 3, 2
        counters.near_bytes = 8
        counters.ended[Event.STORED] += 1
        daemon.upstream.errors[UpstreamTimeout] += 6
        daemon.reachability.failed("registry.ollama.ai", "connection refused")
        daemon.reachability.answered(R2_HOST)
        return [fresh, await daemon.scrape()]

    with running(tmp_path) as daemon:
        fresh, told = asyncio.run(count(daemon))
    changed = {key: value for key, value in told.items() if value != fresh.get(key) and key[0] != "disk_free_bytes"}
    assert changed == {
        ("requests_total", "fwd=miss", "3xx"): 2,
        ("requests_total", "hit", "2xx"): 1,
        ("served_bytes_total",): 7,
        ("upstream_bytes_total",): 5,
        ("near_bytes_total",): 8,
        ("upstream_retries_total",): 4,
        ("digest_mismatches_total",): 3,
        ("source_changes_total",): 2,
        ("recordings_ended_total", "stored"): 1,
        ("upstream_errors_total", "timeout"): 6,
        ("upstream_up", "registry.ollama.ai", "registry"): 0,
        ("upstream_up", R2_HOST, "blob host"): 1,
    }
    assert {key[0]: value for key, value in fresh.items() if key[0].startswith("tier_")} == {
        "tier_up": 1,
        "tier_waiting_blobs": 10,
        "tier_uploaded_bytes_total": 11,
        "tier_failures_total": 12,
        "tier_forged_documents_total": 13,
        "tier_corrupt_blobs_total": 14,
    }
    assert (fresh["bypassed_pulls_total",], fresh["unseen_pulls_total",]) == (7, 8)
    assert fresh["store_max_bytes",] == 1e9
    assert fresh["disk_min_free_bytes",] == 5 << 30
    assert fresh["disk_free_bytes",] > 0
    assert fresh["store_writable",] == 1
    assert fresh["certificate_expiry_timestamp_seconds", "CA"] == END.timestamp()
    assert {key[1] for key in fresh if key[0] == "event_loop_lag_seconds"} == {"0.5", "0.99", "1"}
    assert {key[1] for key in fresh if key[0] == "requests_total"} == {str(outcome) for outcome in Outcome}
    assert {key[1] for key in fresh if key[0] == "upstream_errors_total"} == {
        *("unreachable", "offline", "timeout", "refused", "unexpected_response", "validator_changed"),
        *("source_expired", "address_refused", "loop_detected"),
        *("not_the_registry", "disagreement", "length_contradicted"),
    }


@pytest.mark.parametrize("name", ["alerts.yml", "dashboard.json"])
def test_what_is_asked_for_exists(tmp_path: Path, name: str) -> None:
    """Every metric of the rules and the dashboard is told, and the dashboard shows every one that is."""
    with running(tmp_path) as daemon:
        daemon.reachability.answered("registry.ollama.ai")
        told = {key[0] for key in asyncio.run(daemon.scrape())}
    text = (SHARE / name).read_text(encoding="utf-8")
    asked = set(re.findall(r"ollama_cache_([a-z_]+)", text))
    assert asked - told == set()
    if name == "dashboard.json":
        panels = json.loads(text)["panels"]
        assert told - asked == set()
        assert len({panel["id"] for panel in panels}) == len(panels)


def kind_of(metric: str) -> str:
    """What a metric counts, by its name."""
    return next((unit for unit in ("bytes", "seconds", "info") if unit in metric), "number")


def test_each_panel_has_one_unit() -> None:
    """Nothing is scaled to fit beside something else, and the unit is that of what is shown."""
    panels = json.loads((SHARE / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    units = {"bytes": {"bytes", "Bps", "percentunit"}, "seconds": {"s"}, "info": {"none"}}
    for panel in panels:
        expressions = [target["expr"] for target in panel["targets"]]
        assert not [text for text in expressions if re.search(r"[*/] *[0-9]", text)], panel["title"]
        kinds = {
            kind_of(metric) for text in expressions for metric in re.findall(r"\b(?:ollama_cache|process)_\w+", text)
        }
        assert len(kinds) == 1, panel["title"]
        unit, kind = panel["fieldConfig"]["defaults"]["unit"], kinds.pop()
        if panel["title"] == "Processor cores":
            kind = "number"  # seconds in a second
        assert unit in units.get(kind, {"short", "reqps", "ops", "bool_yes_no"}), panel["title"]


def test_versions(tmp_path: Path) -> None:
    """Those of the packages that run."""
    with running(tmp_path) as daemon:
        told = [key for key in asyncio.run(daemon.scrape()) if key[0] == "build_info"]
    expected = {metadata.version("ollama-cache"), metadata.version("mitmproxy"), platform.python_version()}
    assert [set(key[1:]) for key in told] == [expected]


@pytest.mark.parametrize("accept", ["", "text/plain;version=1.0.0", "application/openmetrics-text;version=1.0.0"])
def test_formats(tmp_path: Path, accept: str) -> None:
    """What a Prometheus of any age asks for, it gets; what is said of the process is there too."""
    with running(tmp_path) as daemon:
        body, content_type = asyncio.run(daemon.metrics.expose(accept))
    assert content_type.partition(";")[0] == (accept.partition(";")[0] or "text/plain")
    parse = parse_openmetrics if "openmetrics" in accept else parse_text
    names = {family.name for family in parse(body.decode())}
    assert {"ollama_cache_recordings", "ollama_cache_models", "process_resident_memory_bytes"} <= names
