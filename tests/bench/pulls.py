"""The inside of a recording, against the tests' own origin: one large layer, fair shares, the event loop's lag.

**Invariant**: the clients are the strict emulators, so a figure is that of a pull that was right to the last byte.
Knows the lines that the cache logs at the end of a recording and of its own life.
"""

import re
from collections.abc import Iterator
from typing import Final

from tests.bench.figures import OURS, Bench, Figure, Sample, workplace
from tests.support.a2 import A2Client
from tests.support.origin import MODEL_TYPE, Origin, Synthetic
from tests.support.proxy import PeakRss, Proxy

MB: Final = 1_000_000
RATE: Final = 10 * MB
_RECORDED: Final = re.compile(r"last byte ([\d.]+) %; commit ([\d.]+) s, of it fsync ([\d.]+) s")


def add_model(origin: Origin, size: int) -> str:
    """A model of one layer; the layer's digest."""
    layer = origin.add_blob(Synthetic(size, 1))
    origin.add_model("library/tiny", "latest", layers=[(MODEL_TYPE, layer)], config=origin.add_blob(b"{}"))
    return layer


def parts(bench: Bench) -> Iterator[Figure]:
    """One layer in Ollama's sixteen parts, 10 MB/s per connection: cold, its commit, warm, and with the origin gone."""
    size = bench.size(1_750 * MB)
    commits: list[Sample] = []
    with workplace() as new, Origin(new("origin")) as origin, Proxy(new("proxy"), origin) as proxy:
        layer = add_model(origin, size)
        origin.rate_per_connection = RATE

        def cold(_round: int) -> Sample:
            origin.reset_counters()
            with PeakRss(proxy) as rss, workplace() as own:
                report = A2Client(proxy.url, proxy.ca_file, own("cold")).pull("tiny")
            line = proxy.wait_for_line(f"recorded {layer[7:19]}", timeout_s=60)
            numbers = _RECORDED.search(line)
            assert numbers is not None, line
            unhashed, commit, fsync = map(float, numbers.groups())
            commits.append(
                {"commit ms": commit * 1e3, "of it fsync ms": fsync * 1e3, "unhashed at the last byte %": unhashed}
            )
            return {
                "s": report.transfer_s,
                "upstream bytes / blob": origin.counters.cdn_bytes_by_digest[layer] / size,
                "longest gap s": report.max_gap_s,
                "client retries": float(report.retries + report.stalls),
                "peak RSS MiB": rss.mib,
            }

        def direct(_round: int) -> Sample:
            with workplace() as own:
                client = A2Client(None, origin.ca_file, own("direct"), resolve=origin.resolve)
                return {"s": client.pull("tiny").transfer_s}

        yield bench.compare(
            f"one Ollama, {size / 1e9:.2f} GB, source limited to 10 MB/s per connection",
            {OURS: cold, "one direct": direct},
            warm=False,
            pairs=1,
        )
        yield Figure.single("the end of that recording", commits)
        for name, is_away in (("the same, warm", False), ("the same, origin stopped, cache restarted", True)):
            if is_away:
                origin.stop()
                proxy.restart()
            origin.reset_counters()
            with workplace() as own:
                report = A2Client(proxy.url, proxy.ca_file, own("warm")).pull("tiny")
            rate = size / report.transfer_s / MB
            yield Figure.single(name, [{"MB/s": rate, "upstream bytes": float(origin.counters.cdn_bytes)}])


def fairness(bench: Bench) -> Iterator[Figure]:
    """The longest wait of one client's parts, all at other places, behind a source that is slow in all."""
    for positions, rate in ((16, 2 * MB), (64, 8 * MB)):
        gaps: list[Sample] = []
        for _ in range(bench.pairs):
            with workplace() as new, Origin(new("origin")) as origin, Proxy(new("proxy"), origin) as proxy:
                size = bench.size(6 * rate)
                add_model(origin, size)
                origin.rate_per_connection = rate // 16
                client = A2Client(
                    proxy.url, proxy.ca_file, new("client"), parts=positions, min_part=size // positions + 1
                )
                gaps.append({"longest gap s": client.pull("tiny").max_gap_s})
        yield Figure.single(f"{positions} parts at {rate // MB} MB/s in all", gaps)


def lag(bench: Bench) -> Iterator[Figure]:
    """How late the cache's event loop is while a blob is recorded and sent as fast as loopback allows."""
    lags: list[Sample] = []
    size = bench.size(1024 * MB)
    for _ in range(bench.pairs):
        with (
            workplace() as new,
            Origin(new("origin")) as origin,
            Proxy(new("proxy"), origin, ollama_cache_log_level="debug") as proxy,
        ):
            add_model(origin, size)
            A2Client(proxy.url, proxy.ca_file, new("client")).pull("tiny")
            proxy.stop()
            line = proxy.wait_for_line("event loop lag: ")
        lags.append({f"{name} ms": float(value) for name, value in re.findall(r"(\w+) ([\d.]+) ms", line)})
    yield Figure.single(f"recording and sending {size / 1e6:.0f} MB at once", lags)
