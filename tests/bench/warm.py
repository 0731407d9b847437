"""A stored blob, sent: through TLS, by plain HTTP, and while a tiny request waits beside it.

**Invariant**: all sides send the same file, which the page cache holds. Knows the store only to fill it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pullthrough.core.capability import Capability
from pullthrough.core.digest import Digest
from pullthrough.core.routes import canonical_path
from pullthrough.store.store import Store
from tests.bench.figures import OURS, Bench, Figure, Sample, workplace
from tests.bench.load import Ask, Load, Route
from tests.bench.servers import Cost, Server, nginx, stock_mitmdump
from tests.support.origin import MODEL_TYPE, R2_HOST, REGISTRY_HOST, Origin, Synthetic
from tests.support.proxy import Proxy, free_port

SIZE: Final = 512 << 20
PLAIN_SIZE: Final = 2 << 30
"""So that each of 16 parts is 128 MiB: Ollama's are 100 MB at least (server/download.go, minDownloadPartSize)."""
STREAMS: Final = (1, 4, 16)
MACHINES: Final = 100
"""That pull at the same time, each by Ollama's sixteen connections."""
MANIFEST: Final = "/v2/library/tiny/manifests/latest"
_PIECE: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class _Scene:
    """One blob of `size` bytes at `path` of each server."""

    proxy: Proxy
    ours: Route
    stock: Server
    nginx: Server
    plain_port: int
    """Where nginx serves without TLS."""
    path: str
    query: str
    size: int

    @property
    def behind_stock(self) -> str:
        """The origin that stock mitmdump is asked for."""
        return f"https://localhost:{self.nginx.port}"


@contextmanager
def _scene(size: int) -> Iterator[_Scene]:
    plain_port = free_port()
    with workplace() as new:
        blob = Synthetic(size, 1)
        digest = Digest(blob.sha256())
        path = canonical_path(digest)
        www, home = new("www"), new("proxy")
        query = _fill(home / "store", www / path[1:], blob, digest)
        with Origin(new("origin")) as origin:
            layer = origin.add_blob(b"0" * 4096)
            manifest = origin.add_model(
                "library/tiny", "latest", layers=[(MODEL_TYPE, layer)], config=origin.add_blob(b"{}")
            )
            (www / MANIFEST[1:]).parent.mkdir(parents=True)
            (www / MANIFEST[1:]).write_bytes(manifest)
            plain = f"server {{ listen 127.0.0.1:{plain_port} backlog=1024; root {www}; }}"
            with (
                nginx(new("nginx"), origin, free_port(), f"root {www};", outside=plain) as server,
                stock_mitmdump(new("stock"), origin) as stock,
                Proxy(home, origin, front=True) as proxy,
            ):
                ours = Route(str(proxy.ca_file), ("127.0.0.1", proxy.port))
                yield _Scene(proxy, ours, stock, server, plain_port, path, query, size)


def _fill(store_folder: Path, file_path: Path, blob: Synthetic, digest: Digest) -> str:
    """Put the blob into a store and a file; the query that opens it."""
    file_path.parent.mkdir(parents=True)
    store = Store.open(store_folder)
    ingest = store.ingest(digest)
    ingest.begin(blob.size)
    with file_path.open("wb") as file:
        for start in range(0, blob.size, _PIECE):
            data = blob.read(start, start + _PIECE)
            ingest.write_at(start, data)
            file.write(data)
    store.publish(ingest.digest, store.place(ingest.digest, ingest.partial_path), now=time.time())
    ingest.forget()
    query = Capability(digest, blob.size, int(time.time()) + 3600).to_query(store.secret)
    ingest.close()
    store.close()
    return query


def shares(url: str, size: int, streams: int) -> list[list[Ask]]:
    """The blob once, in as many ranges as there are streams."""
    if streams == 1:
        return [[Ask(url)]]
    step = -(-size // streams)
    return [[Ask(url, interval=(start, min(start + step, size)))] for start in range(0, size, step)]


def _sent(load: Load, route: Route, url: str, size: int, streams: int, pid: int) -> Callable[[int], Sample]:
    def measure(_round: int) -> Sample:
        with Cost(pid) as cost:
            tally = load.fetch(route, shares(url, size, streams))
        return {"MB/s": tally.mb_per_s, "CPU s/GB": cost.cpu_s / size * 1e9, "peak RSS MiB": cost.peak_mib}

    return measure


def generator(bench: Bench) -> Iterator[Figure]:
    """The load generator alone, against nginx."""
    size = bench.size(SIZE)
    with _scene(size) as scene:
        for what, route, origin in (
            ("by plain HTTP", Route(), f"http://127.0.0.1:{scene.plain_port}"),
            ("through TLS", scene.nginx.route, scene.behind_stock),
        ):
            for streams in STREAMS:
                measure = _sent(bench.load, route, origin + scene.path, size, streams, scene.nginx.pid)
                yield _alone(f"{_mib(size)} {what}, {_streams(streams)}", [measure(number) for number in bench.rounds])
        tallies = [
            bench.load.fetch(scene.nginx.route, [[Ask(scene.behind_stock + MANIFEST)]] * 8, seconds=bench.seconds(2))
            for _ in bench.rounds
        ]
        rates = [{"requests/s": tally.requests / tally.seconds} for tally in tallies]
        yield _alone("a manifest through TLS, 8 connections", rates)


def _alone(what: str, samples: list[Sample]) -> Figure:
    return Figure.single(what, samples[1:], side="nginx")


def hit(bench: Bench) -> Iterator[Figure]:
    """A stored blob through TLS; nginx serves the same file directly, and to stock mitmdump, which streams it."""
    size = bench.size(SIZE)
    with _scene(size) as scene:
        ours, behind = f"https://{R2_HOST}{scene.path}?{scene.query}", scene.behind_stock + scene.path
        for streams in STREAMS:
            yield bench.compare(
                f"{_mib(size)} through TLS, {_streams(streams)}",
                {
                    OURS: _sent(bench.load, scene.ours, ours, size, streams, scene.proxy.pid),
                    "stock mitmdump": _sent(bench.load, scene.stock.route, behind, size, streams, scene.stock.pid),
                    "nginx": _sent(bench.load, scene.nginx.route, behind, size, streams, scene.nginx.pid),
                },
            )


def plain(bench: Bench) -> Iterator[Figure]:
    """A stored blob by plain HTTP from the cache's own port, against nginx with sendfile."""
    size = bench.size(PLAIN_SIZE)
    with _scene(size) as scene:
        ours = f"http://127.0.0.1:{scene.proxy.front_port}{scene.path}?{scene.query}"
        theirs = f"http://127.0.0.1:{scene.plain_port}{scene.path}"
        for streams in STREAMS:
            yield bench.compare(
                f"{_mib(size)} by plain HTTP, {_streams(streams)}",
                {
                    OURS: _sent(bench.load, Route(), ours, size, streams, scene.proxy.pid),
                    "nginx": _sent(bench.load, Route(), theirs, size, streams, scene.nginx.pid),
                },
            )


def beside(bench: Bench) -> Iterator[Figure]:
    """A manifest, twenty times a second on a connection of its own, beside sixteen clients that take all they can."""
    with _scene(bench.size(SIZE)) as scene:

        def measure(route: Route, heavy: str, tiny: str) -> Callable[[int], Sample]:
            def run(_round: int) -> Sample:
                latencies = bench.load.beside(route, [Ask(heavy)] * 16, Ask(tiny), rate=20, seconds=bench.seconds(4))
                return {"p50 ms": statistics.median(latencies) * 1e3, "longest ms": latencies[-1] * 1e3}

            return run

        behind = scene.behind_stock
        yield bench.compare(
            "a manifest beside sixteen saturating clients",
            {
                OURS: measure(
                    scene.ours, f"https://{R2_HOST}{scene.path}?{scene.query}", f"https://{REGISTRY_HOST}{MANIFEST}"
                ),
                "stock mitmdump": measure(scene.stock.route, behind + scene.path, behind + MANIFEST),
                "nginx": measure(scene.nginx.route, behind + scene.path, behind + MANIFEST),
            },
            warm=False,
        )


def many(bench: Bench) -> Iterator[Figure]:
    """A small part of a stored blob, asked for over 1,600 connections that are made in the same moment."""
    with _scene(bench.size(SIZE)) as scene:
        connections = 16 * (4 if bench.is_quick else MACHINES)

        def measure(route: Route, url: str) -> Callable[[int], Sample]:
            def run(_round: int) -> Sample:
                latencies = bench.load.storm(route, Ask(url, interval=(0, 4096)), connections)
                return {"p50 ms": statistics.median(latencies) * 1e3, "longest ms": latencies[-1] * 1e3}

            return run

        yield bench.compare(
            f"{connections} connections at once, through TLS",
            {
                OURS: measure(scene.ours, f"https://{R2_HOST}{scene.path}?{scene.query}"),
                "nginx": measure(scene.nginx.route, scene.behind_stock + scene.path),
            },
            warm=False,
        )


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"
