"""What nobody has yet: one client, many clients, a source that limits each connection or none.

**Invariant**: the CDN is nginx, so that what is measured is the cache; every round has a blob of its own, and each body
byte that the CDN sends to the cache is counted. Knows no store.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.routes import canonical_path
from tests.bench.figures import OURS, Bench, Figure, Sample, workplace
from tests.bench.load import Ask, Route
from tests.bench.servers import Cost, Server, nginx
from tests.support.a2 import A2Client, PullReport
from tests.support.http1 import Resolve
from tests.support.origin import MODEL_TYPE, R2_HOST, REGISTRY_HOST, Origin, Synthetic
from tests.support.proxy import Proxy, free_port
from tests.support.transfer import TENSOR_TYPE, TransferClient

SINGLE: Final = 64 << 20
PULLED: Final = 256 << 20
RATE: Final = 10_000_000
"""Bytes a second on one connection of the limited CDN."""
TENSORS: Final = ((60, 4 << 20), (200, 1 << 20))
"""How many blobs of how many bytes."""
_PIECE: Final = 8 << 20
_PUBLIC: Final = "104.16.0.1"
"""What a client finds that looks where the blob host's name leads."""
_LOGGED_S: Final = 0.1
"""Within which nginx writes its log behind the last byte."""


@dataclass(frozen=True, slots=True)
class _Scene:
    """A registry, an nginx as its CDN, an empty cache, and an nginx with a cache of its own."""

    origin: Origin
    www: Path
    cdn: Server
    slices: Server
    proxy: Proxy
    log: Path
    """A line for each body that the CDN has sent: its bytes."""

    @property
    def ours(self) -> Route:
        """To everything, through the cache."""
        return Route(str(self.proxy.ca_file), ("127.0.0.1", self.proxy.port))

    @property
    def direct(self) -> Route:
        """To the registry and the CDN."""
        hosts = {(R2_HOST, 443): ("127.0.0.1", self.cdn.port)}
        return Route(str(self.origin.ca_file), resolve={**self.origin.resolve, **hosts})

    def add(self, name: str, size: int, seed: int) -> str:
        """A model of one layer; the layer's digest."""
        return self.add_layers(name, MODEL_TYPE, [Synthetic(size, seed)])[0]

    def add_layers(self, name: str, media_type: str, blobs: Sequence[Synthetic]) -> list[str]:
        """A model of these layers; their digests."""
        layers = [self.origin.add_blob(blob) for blob in blobs]
        config = self.origin.add_blob(b"{}")
        pairs = [(media_type, layer) for layer in layers]
        self.origin.add_model(f"library/{name}", "latest", layers=pairs, config=config)
        for digest in (*layers, config):
            path = self.www / canonical_path(Digest.parse(digest))[1:]
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self.origin.blob(digest)
            with path.open("wb") as file:
                for start in range(0, content.size, _PIECE):
                    file.write(content.read(start, start + _PIECE))
        return layers

    def sent(self) -> int:
        """Body bytes that the CDN has sent so far."""
        return sum(map(int, self.log.read_text().split()))

    def answered(self) -> int:
        """Requests that the CDN has answered so far."""
        return len(self.log.read_text().split())


@contextmanager
def _scene(rate: int | None) -> Iterator[_Scene]:
    with ExitStack() as stack:
        new = stack.enter_context(workplace())
        origin = stack.enter_context(Origin(new("origin")))
        www, cdn_folder, cache_folder = new("www"), new("cdn"), new("slices")
        limit = f"limit_rate {rate};" if rate else ""
        log = cdn_folder / "sent.log"
        rules = f"root {www}; access_log {log} size; {limit}"
        cdn = stack.enter_context(nginx(cdn_folder, origin, free_port(), rules))
        # http://nginx.org/en/docs/http/ngx_http_slice_module.html, its example, with the lock.
        rules = (
            "location / { slice 8m; proxy_cache blobs; proxy_cache_lock on; proxy_cache_key $uri$slice_range;\n"
            "proxy_set_header Range $slice_range; proxy_cache_valid 200 206 1h; proxy_cache_lock_timeout 60s;\n"
            f"proxy_cache_lock_age 60s; proxy_http_version 1.1; proxy_pass https://127.0.0.1:{cdn.port}; }}"
        )
        outside = f"proxy_cache_path {cache_folder}/cache keys_zone=blobs:10m;"
        slices = stack.enter_context(nginx(cache_folder, origin, free_port(), rules, outside=outside))
        upstream = f"{REGISTRY_HOST}=https://localhost:{origin.registry_port},{R2_HOST}=https://localhost:{cdn.port}"
        proxy = stack.enter_context(Proxy(new("proxy"), origin, ollama_cache_upstream=upstream))
        yield _Scene(origin, www, cdn, slices, proxy, log)


def _touch(size: int) -> None:
    """Use as much memory as a round writes to files, and free it: of a virtual machine's memory the host provides each
    page when it is first used, which costs whoever comes first 2 s of CPU per GB.
    """
    bytearray(b"\1") * min(4 * size, 2 << 30)


def _condition(rate: int | None) -> str:
    return f"source limited to {rate // 1_000_000} MB/s per connection" if rate else "source without limit"


def single(bench: Bench) -> Iterator[Figure]:
    """Clients of one blob nobody has, a single stream each: through the cache, through nginx's, and directly."""
    size = bench.size(SINGLE)
    for rate in (RATE, None):
        with _scene(rate) as scene:
            for clients in (1, 8, 32):
                yield _single(bench, scene, clients, size, _condition(rate))


def _single(bench: Bench, scene: _Scene, clients: int, size: int, condition: str) -> Figure:
    name = f"single{clients}"
    blobs = [scene.add(name, size, 100 * clients + number) for number in bench.rounds]

    def measure(route: Route, address: Callable[[str], str], pid: int) -> Callable[[int], Sample]:
        def run(number: int) -> Sample:
            digest = blobs[number]
            _touch(size)
            before = scene.sent()
            with Cost(pid) as cost:
                tally = bench.load.fetch(route, [[Ask(address(digest), follows=True)]] * clients)
            if tally.bytes < clients * size:
                raise RuntimeError(f"expected {clients * size} bytes, got {tally.bytes}")
            time.sleep(_LOGGED_S)
            return {
                "s": tally.seconds,
                "upstream bytes / blob": (scene.sent() - before) / size,
                "CPU s/GB": cost.cpu_s / tally.bytes * 1e9,
            }

        return run

    def by_registry(digest: str) -> str:
        return f"https://{REGISTRY_HOST}/v2/library/{name}/blobs/{digest}"

    def by_slices(digest: str) -> str:
        return f"https://localhost:{scene.slices.port}{canonical_path(Digest.parse(digest))}"

    figure = bench.compare(
        f"{clients} single-stream client{'s' if clients > 1 else ''} of {size >> 20} MiB, {condition}",
        {
            OURS: measure(scene.ours, by_registry, scene.proxy.pid),
            "nginx proxy_cache": measure(scene.slices.route, by_slices, scene.slices.pid),
            "direct": measure(scene.direct, by_registry, scene.cdn.pid),
        },
    )
    for digest in blobs:
        (scene.www / canonical_path(Digest.parse(digest))[1:]).unlink()
    return figure


def ollama(bench: Bench) -> Iterator[Figure]:
    """Ollama's own way of pulling (HEAD, probe, parts of 100 MB at once), emulated, against one client going direct."""
    for rate, clients in ((RATE, 1), (RATE, 8), (None, 1)):
        with _scene(rate) as scene:
            yield _ollama(bench, scene, clients, _condition(rate))


def _ollama(bench: Bench, scene: _Scene, clients: int, condition: str) -> Figure:
    size = bench.size(PULLED)
    for number in bench.rounds:
        scene.add(f"pulled{number}", size, 10 + number)

    def ours(number: int) -> Sample:
        _touch(clients * size)
        before = scene.sent()
        reports = _pull(f"pulled{number}", clients, scene.proxy.url, scene.proxy.ca_file)
        time.sleep(_LOGGED_S)
        return {
            "s": max(report.transfer_s for report in reports),
            "upstream bytes / blob": (scene.sent() - before) / size,
            "longest gap s": max(report.max_gap_s for report in reports),
            "client retries": float(sum(report.retries + report.stalls for report in reports)),
        }

    def direct(number: int) -> Sample:
        _touch(size)
        report = _pull(f"pulled{number}", 1, None, scene.origin.ca_file, scene.direct.resolve)[0]
        return {"s": report.transfer_s, "longest gap s": report.max_gap_s}

    who = "one Ollama" if clients == 1 else f"the slowest of {clients} Ollamas"
    return bench.compare(f"{who}, {size >> 20} MiB, {condition}", {OURS: ours, "one direct": direct})


def tensors(bench: Bench) -> Iterator[Figure]:
    """A model of tensors as x/transfer pulls it, emulated: four of its blobs at a time, against one going direct."""
    for full, size in TENSORS:
        with _scene(None) as scene:
            yield _tensors(bench, scene, full // 20 if bench.is_quick else full, size)


def _tensors(bench: Bench, scene: _Scene, count: int, size: int) -> Figure:
    for number in bench.rounds:
        blobs = [Synthetic(size, count * number + each) for each in range(count)]
        scene.add_layers(f"tensors{number}", TENSOR_TYPE, blobs)

    def pull(number: int, proxy_url: str | None, ca_file: Path, version: str, resolve: Resolve | None = None) -> float:
        with workplace() as new:
            dns = {R2_HOST: [_PUBLIC]}
            client = TransferClient(proxy_url, ca_file, new("client"), version=version, dns=dns, resolve=resolve)
            return client.pull(f"tensors{number}").transfer_s

    def ours(number: int) -> Sample:
        _touch(count * size)
        before = scene.answered()
        with Cost(scene.proxy.pid) as cost:
            seconds = pull(number, scene.proxy.url, scene.proxy.ca_file, "0.40.3")
        time.sleep(_LOGGED_S)
        return {
            "s": seconds,
            "upstream requests / blob": (scene.answered() - before) / count,
            "CPU ms / blob": cost.cpu_s / count * 1e3,
        }

    def direct(number: int) -> Sample:
        _touch(count * size)
        # The last one that asks no proxy, and does not dial what it has looked up itself.
        return {"s": pull(number, None, scene.origin.ca_file, "current", scene.direct.resolve)}

    what = f"x/transfer, {count} blobs of {size >> 20} MiB, source without limit"
    return bench.compare(what, {OURS: ours, "one direct": direct})


def _pull(
    name: str, clients: int, proxy_url: str | None, ca_file: Path, resolve: Resolve | None = None
) -> list[PullReport]:
    with workplace() as new, ThreadPoolExecutor(clients) as pool:
        pulling = [A2Client(proxy_url, ca_file, new("client"), resolve=resolve) for _ in range(clients)]
        return list(pool.map(lambda client: client.pull(name), pulling))
