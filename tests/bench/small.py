"""Many small requests: how many a second, how late, and a model of two thousand blobs.

**Invariant**: nginx answers behind stock mitmdump what the registry and its blob host answer, so that both proxies say
the same. Knows no store.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.routes import canonical_path
from tests.bench.figures import OURS, Bench, Figure, Sample, workplace
from tests.bench.load import Ask, Route, once
from tests.bench.servers import Server, nginx, stock_mitmdump
from tests.support.origin import MANIFEST_TYPE, MODEL_TYPE, REGISTRY_HOST, Origin
from tests.support.proxy import Proxy, free_port

BLOB: Final = 4096
CONNECTIONS: Final = 8
OPEN: Final = 64
OFFERED: Final = 200.0
BLOBS: Final = 2000
_REPOSITORY: Final = "/v2/library/tiny"


@dataclass(frozen=True, slots=True)
class _Scene:
    """A model of small blobs that the cache holds."""

    proxy: Proxy
    ours: Route
    stock: Server
    nginx: Server
    digests: list[str]

    @property
    def behind(self) -> str:
        """nginx, for those who ask it."""
        return f"https://localhost:{self.nginx.port}"

    def walk(self, registry: str) -> list[list[Ask]]:
        """The whole model: its manifest, then every blob by way of its redirect, over several connections."""
        asks = [Ask(f"{registry}{_REPOSITORY}/blobs/{digest}", follows=True) for digest in self.digests]
        lists = [asks[number::CONNECTIONS] for number in range(min(CONNECTIONS, len(asks)))]
        return [[Ask(f"{registry}{_REPOSITORY}/manifests/latest"), *lists[0]], *lists[1:]]


@contextmanager
def _scene(bench: Bench, blobs: int) -> Iterator[_Scene]:
    with workplace() as new, Origin(new("origin")) as origin:
        www = new("www")
        digests = []
        for number in range(blobs):
            data = f"{number:016}".encode() * (BLOB // 16)
            digests.append(origin.add_blob(data))
            path = www / canonical_path(Digest.parse(digests[-1]))[1:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        layers = [(MODEL_TYPE, digest) for digest in digests[1:]]
        manifest = origin.add_model("library/tiny", "latest", layers=layers, config=digests[0])
        path = www / f"{_REPOSITORY[1:]}/manifests/latest"
        path.parent.mkdir(parents=True)
        path.write_bytes(manifest)
        port = free_port()
        file = "/ollama/docker/registry/v2/blobs/sha256/$ab/$ab$rest/data"
        rules = (
            f"root {www}; location /v2/library/tiny/manifests/ {{ default_type {MANIFEST_TYPE}; }}\n"
            "location ~ ^/v2/.*/blobs/sha256:(?<ab>..)(?<rest>.*)$ {"
            f"if ($request_method = GET) {{ return 307 https://localhost:{port}{file}; }} try_files {file} =404; }}"
        )
        with (
            nginx(new("nginx"), origin, port, rules) as server,
            stock_mitmdump(new("stock"), origin) as stock,
            Proxy(new("proxy"), origin) as proxy,
        ):
            scene = _Scene(proxy, Route(str(proxy.ca_file), ("127.0.0.1", proxy.port)), stock, server, digests)
            bench.load.fetch(scene.ours, scene.walk(f"https://{REGISTRY_HOST}"))
            yield scene


def _kinds(scene: _Scene, route: Route, registry: str) -> dict[str, Ask]:
    blob = Ask(f"{registry}{_REPOSITORY}/blobs/{scene.digests[1]}")
    return {
        "manifest": Ask(f"{registry}{_REPOSITORY}/manifests/latest"),
        "HEAD of a blob": Ask(blob.url, "HEAD"),
        "redirect of a blob": blob,
        "blob of 4 KiB": Ask(once(route, blob).headers["location"]),
    }


def _all_kinds(scene: _Scene) -> Iterator[tuple[str, dict[str, tuple[Route, Ask]]]]:
    """For each kind, by side: the way there and the request."""
    ours = _kinds(scene, scene.ours, f"https://{REGISTRY_HOST}")
    theirs = _kinds(scene, scene.nginx.route, scene.behind)
    for kind, ask in ours.items():
        yield (
            kind,
            {
                OURS: (scene.ours, ask),
                "stock mitmdump": (scene.stock.route, theirs[kind]),
                "nginx": (scene.nginx.route, theirs[kind]),
            },
        )


def requests(bench: Bench) -> Iterator[Figure]:
    """Requests a second, each connection asking again as soon as it is answered."""

    def measure(route: Route, ask: Ask) -> Callable[[int], Sample]:
        def run(_round: int) -> Sample:
            tally = bench.load.fetch(route, [[ask]] * CONNECTIONS, seconds=bench.seconds(2))
            return {"requests/s": tally.requests / tally.seconds}

        return run

    with _scene(bench, 2) as scene:
        for kind, sides in _all_kinds(scene):
            what = f"{kind}, {CONNECTIONS} connections"
            yield bench.compare(what, {name: measure(*side) for name, side in sides.items()}, warm=False)


def latency(bench: Bench) -> Iterator[Figure]:
    """Latency at 200 requests a second over 64 open connections, from when each request is due."""

    def measure(route: Route, ask: Ask) -> Callable[[int], Sample]:
        def run(_round: int) -> Sample:
            found = bench.load.pace(route, ask, connections=OPEN, rate=OFFERED, seconds=bench.seconds(3))
            return {"p50 ms": percentile(found, 50) * 1e3, "p99 ms": percentile(found, 99) * 1e3}

        return run

    with _scene(bench, 2) as scene:
        for kind, sides in _all_kinds(scene):
            what = f"{kind}, {OPEN} open connections, {OFFERED:.0f} requests/s offered"
            yield bench.compare(what, {name: measure(*side) for name, side in sides.items()}, warm=False)


def model(bench: Bench) -> Iterator[Figure]:
    """A stored model of two thousand blobs of 4 KiB, each by way of its redirect, over eight connections."""
    blobs = 40 if bench.is_quick else BLOBS
    with _scene(bench, blobs) as scene:

        def measure(route: Route, registry: str) -> Callable[[int], Sample]:
            def run(_round: int) -> Sample:
                return {"s": bench.load.fetch(route, scene.walk(registry)).seconds}

            return run

        yield bench.compare(
            f"{blobs} stored blobs of 4 KiB",
            {
                OURS: measure(scene.ours, f"https://{REGISTRY_HOST}"),
                "stock mitmdump": measure(scene.stock.route, scene.behind),
                "nginx": measure(scene.nginx.route, scene.behind),
            },
            warm=False,
        )


def percentile(ordered: list[float], percent: float) -> float:
    """The nearest rank of sorted values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
