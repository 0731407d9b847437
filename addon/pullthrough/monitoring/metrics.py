"""The daemon's counts, in Prometheus's format.

Invariant: the options bound the number of series, whatever is pulled: no digest, model or client is a label. Nothing is
counted here: each number is read where it is kept.
"""

import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pullthrough.config.settings import Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import Outcome
from pullthrough.core.errors import UpstreamError
from pullthrough.core.records import by_model
from pullthrough.library.listing import JSON
from pullthrough.monitoring.health import Disk, Health
from pullthrough.recording.pulls import Counts
from pullthrough.recording.recorder import Recorder
from pullthrough.recording.states import ENDINGS
from pullthrough.runtime.loop_lag import LoopLag
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import Service, State

PREFIX: Final = "ollama_cache_"

Values = Iterable[tuple[Sequence[str], float]]
"""(the values of the labels, the number)."""


class Metrics(Collector):
    """The metrics of one daemon."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        recorder: Recorder,
        upstream: Upstream,
        requests: RequestLog,
        lag: LoopLag,
        health: Health,
        pulls: Counts,
        tier: Callable[[], JSON] | None = None,
    ) -> None:
        """`pulls` counts those past the cache; `tier` returns the state of the fleet's object store, if any."""
        self._pulls = pulls
        self._tier = tier
        self._settings = settings
        self._store = store
        self._recorder = recorder
        self._upstream = upstream
        self._requests = requests
        self._lag = lag
        self._health = health
        self._disk = Disk(0)
        self._services: tuple[Service, ...] = ()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    async def expose(self, accept: str) -> tuple[bytes, str]:
        """Return (all metrics, their Content-Type) in the format that an Accept field asks for."""
        self._disk, self._services = await self._health.disk(), await self._health.services()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield the current numbers."""
        yield from self._traffic()
        yield from self._upstreams()
        yield from self._storage()
        if self._tier is not None:
            yield from _fleet(self._tier())
        yield from self._process()

    def _traffic(self) -> Iterator[Metric]:
        text = "Requests by RFC 9211 outcome and class of status."
        classes = Counter({(str(outcome), "2xx"): 0 for outcome in Outcome})
        for (outcome, status), count in self._requests.answers.items():
            classes[str(outcome), f"{status // 100}xx"] += count
        yield _counters("requests", text, classes.items(), "outcome", "status")
        yield _counter("served_bytes", "Bytes of blobs that went to clients.", self._requests.sent)
        yield _counter("bypassed_pulls", "Pulls past the cache, by Ollama 0.35.0 to 0.40.2.", self._pulls.bypassed)
        text = "Pulls by others that were sent to the registry's address and never came back."
        yield _counter("unseen_pulls", text, self._pulls.unseen)
        came = self._recorder.counters.upstream_bytes
        yield _counter("upstream_bytes", "Bytes of blobs that came from upstream.", came)
        near = self._recorder.counters.near_bytes
        yield _counter("near_bytes", "Bytes of blobs that came from the fleet's own sources.", near)

    def _upstreams(self) -> Iterator[Metric]:
        counters = self._recorder.counters
        yield _gauge("recordings", "Blobs that are being recorded.", len(self._recorder.recordings()))
        ended = (((result,), counters.ended[result]) for result in ENDINGS)
        yield _counters("recordings_ended", "Recordings by how they ended.", ended, "result")
        errors = (((_snake(kind.__name__),), self._upstream.errors[kind]) for kind in _kinds())
        yield _counters("upstream_errors", "What upstream did wrong, by kind.", errors, "kind")
        yield _counter("upstream_retries", "Failures that were absorbed behind clients' connections.", counters.retries)
        yield _counter("digest_mismatches", "Blobs that did not hash to their name.", counters.mismatches)
        yield _counter("source_changes", "Recordings begun again as their source had changed.", counters.restarts)
        known = (service for service in self._services if service.state is not State.NOT_ASKED)
        up = (((service.role, service.host), float(service.state is State.UP)) for service in known)
        text = "Whether a server answers that the cache draws on; nothing while it has not been asked."
        yield _gauges("upstream_up", text, up, "service", "host")

    def _storage(self) -> Iterator[Metric]:
        store, settings = self._store, self._settings
        yield _gauge("models", "Models that are stored.", len(by_model(store.manifests())))
        yield _gauge("store_bytes", "Bytes of verified blobs.", store.held_bytes)
        if settings.max_size is not None:
            yield _gauge("store_max_bytes", "The option max_size.", settings.max_size)
        yield _gauge("store_writable", "Whether the store can be written to.", not self._disk.problem)
        yield _gauge("disk_free_bytes", "Free bytes of the store's disk.", self._disk.free)
        yield _gauge("disk_min_free_bytes", "The option min_free.", settings.min_free)
        yield _counter("evicted_blobs", "Blobs that were removed.", store.evicted)
        yield _counter("evicted_bytes", "Their bytes.", store.evicted_bytes)

    def _process(self) -> Iterator[Metric]:
        text = "1; the labels are the versions of what runs."
        yield _gauges("build_info", text, [(_versions(), 1.0)], "version", "python", "mitmproxy")
        quantiles = (0.5, 0.99, 1.0)
        lag = Metric(f"{PREFIX}event_loop_lag_seconds", "Lateness of the event loop in ten minutes.", "summary")
        for quantile, seconds in zip(quantiles, self._lag.quantiles(*quantiles), strict=True):
            lag.add_sample(lag.name, {"quantile": f"{quantile:g}"}, seconds)
        yield lag
        ends = (((name,), end.timestamp()) for name, end in self._health.certificates().items())
        yield _gauges("certificate_expiry_timestamp_seconds", "When a certificate ends.", ends, "name")


def _fleet(state: JSON) -> Iterator[Metric]:
    yield _gauge("tier_up", "0 while the fleet's object store is left alone.", state["state"] == "in use")
    yield _gauge("tier_waiting_blobs", "Blobs that are still to be uploaded.", state["waiting"])
    yield _counter("tier_uploaded_bytes", "Bytes of blobs that were uploaded.", state["uploaded_bytes"])
    yield _counter("tier_failures", "Calls of the object store that failed.", state["failures"])
    yield _counter("tier_forged_documents", "Documents there that the fleet has not signed.", state["forged"])
    yield _counter("tier_corrupt_blobs", "Blobs from there that did not hash to their name.", state["corrupt"])


def _versions() -> tuple[str, str, str]:
    """Return the versions of the cache, of Python and of mitmproxy."""

    def told(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"  # run from a checkout that was not installed

    return told("ollama-cache"), platform.python_version(), told("mitmproxy")


def _counter(name: str, text: str, value: float) -> Metric:
    return _counters(name, text, [((), value)])


def _gauge(name: str, text: str, value: float) -> Metric:
    return _gauges(name, text, [((), float(value))])


def _counters(name: str, text: str, values: Values, *labels: str) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _gauges(name: str, text: str, values: Values, *labels: str) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _kinds(above: type[UpstreamError] = UpstreamError) -> Iterator[type[UpstreamError]]:
    """Yield all subclasses, at any depth."""
    for kind in above.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _snake(name: str) -> str:
    """Return `UpstreamTimeout` as "timeout"."""
    return re.sub("(?<=.)(?=[A-Z])", "_", name.removeprefix("Upstream")).lower()
