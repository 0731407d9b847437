"""Measure the cache against something real in the same run: stock mitmdump, nginx, a client going direct.

Invariant: the two sides of a comparison alternate, medians are compared, and every body is checked by its length or
digest. All on loopback, so client, origin and cache share the machine's cores: figures are lower bounds.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.a2 import A2Client
from tests.support.origin import R2_HOST, Origin, Synthetic
from tests.support.proxy import PROGRAM, PeakRss, Proxy

from pullthrough.capability import Capability
from pullthrough.digest import Digest
from pullthrough.route import canonical_path
from pullthrough.store import Store

MB: Final = 1_000_000
MODEL: Final = "application/vnd.ollama.image.model"
Row = dict[str, Any]


@dataclass
class Side:
    """One of two proxies to compare."""

    pid: int
    proxy: str
    ca_file: Path
    url: str
    rates: list[float] = field(default_factory=list)
    """MB/s of each download."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of processor time per GB of each download."""

    def download(self) -> None:
        """Fetch all of the URL to nowhere and note what it took; an error if it is not all."""
        command = ["curl", "-sS", "-o", os.devnull, "-w", "%{size_download} %{time_total} %{http_code}"]
        command += ["--proxy", self.proxy, "--cacert", str(self.ca_file), self.url]
        before = cpu_s(self.pid)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, seconds, status = done.stdout.split()
        if status != "200":
            raise RuntimeError(f"expected 200, got {status}")
        self.rates.append(float(size) / float(seconds) / MB)
        self.cpu.append((cpu_s(self.pid) - before) / float(size) * 1e9)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def nginx(folder: Path, port: int, origin: Origin, plain: int = 0) -> Iterator[None]:
    """nginx serving `folder` by TLS with the origin's certificate, and on the port `plain` without."""
    certificate = next(path for path in origin.ca_file.parent.glob("*.pem") if b"PRIVATE KEY" in path.read_bytes())
    (folder / "nginx.conf").write_text(
        # Started by root, its workers would otherwise be nobody, who may not read a temporary folder.
        f"{'user root; ' if os.geteuid() == 0 else ''}daemon off; worker_processes 1; events {{}}\n"
        f"pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        f"http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port} ssl; "
        f"{f'listen 127.0.0.1:{plain};' if plain else ''} root {folder};\n"
        f"ssl_certificate {certificate}; ssl_certificate_key {certificate}; }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (folder / "nginx.pid").exists() and (folder / "nginx.pid").read_text().strip() != "")
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def stock_mitmdump(folder: Path, port: int, origin: Origin) -> Iterator[int]:
    """mitmdump as it is, streaming; yields its process id."""
    command = [str(PROGRAM[0]), "--listen-host", "127.0.0.1", "--listen-port", str(port), "--set", f"confdir={folder}"]
    command += ["--set", "stream_large_bodies=1", "--set", "connection_strategy=lazy", "--set", "flow_detail=0"]
    command += ["--set", f"ssl_verify_upstream_trusted_ca={origin.ca_file}"]
    with (folder / "mitmdump.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: b"listening" in (folder / "mitmdump.log").read_bytes())
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for(claim: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError("expected a server to start")
        time.sleep(0.05)


def add_model(origin: Origin, size: int) -> str:
    layer = origin.add_blob(Synthetic(size, 1))
    origin.add_model("library/tiny", "latest", layers=[(MODEL, layer)], config=origin.add_blob(b"{}"))
    return layer


def hold(folder: Path, size: int) -> str:
    """Put one blob into a store and into nginx's folder; its canonical path and query."""
    blob = Synthetic(size, 1)
    digest = Digest(blob.sha256())
    (folder / "www").mkdir()
    store = Store.open(folder / "store")
    ingest = store.ingest(digest)
    ingest.begin(size)
    with (folder / "www" / "blob").open("wb") as file:
        for start in range(0, size, 8 << 20):
            data = blob.read(start, min(start + (8 << 20), size))
            ingest.write_at(start, data)
            file.write(data)
    store.publish(ingest, now=time.time())
    store.confirm_public("registry.ollama.ai", "library/tiny", digest)
    query = Capability(digest, size, int(time.time()) + 3600).to_query(store.secret)
    ingest.close()
    store.close()
    return f"{canonical_path(digest)}?{query}"


def hit(folder: Path, pairs: int) -> Row:
    """One client, one verified blob of 1 GiB through TLS, against stock mitmdump streaming the same file of nginx."""
    target = hold(folder, 1 << 30)
    with (
        Origin(folder / "origin") as origin,
        nginx(folder / "www", 18443, origin),
        stock_mitmdump(folder, 18444, origin) as stock_pid,
        Proxy(folder, origin, ollama_cache_dir=folder / "store") as proxy,
    ):
        ours = Side(proxy.pid, proxy.url, proxy.ca_file, f"https://{R2_HOST}{target}")
        stock_ca = folder / "mitmproxy-ca-cert.pem"
        stock = Side(stock_pid, "http://127.0.0.1:18444", stock_ca, "https://localhost:18443/blob")
        for _ in range(pairs + 1):
            ours.download()
            stock.download()
    for side in (ours, stock):
        del side.rates[0], side.cpu[0]  # the first pair warmed the page cache
    return {
        "ours MB/s": statistics.median(ours.rates),
        "stock mitmdump MB/s": statistics.median(stock.rates),
        "ratio": statistics.median(a / b for a, b in zip(ours.rates, stock.rates, strict=True)),
        "ours CPU s/GB": statistics.median(ours.cpu),
        "stock CPU s/GB": statistics.median(stock.cpu),
    }


def direct(folder: Path, pairs: int) -> Row:
    """One verified blob of 1 GiB by direct mode, redirect and all, in 1 and 16 streams, against sendfile of nginx."""
    size = 1 << 30
    target = hold(folder, size)
    row: Row = {}
    with (
        Origin(folder / "origin") as origin,
        nginx(folder / "www", 18443, origin, plain=18445),
        Proxy(folder, origin, front=True, ollama_cache_dir=folder / "store", ollama_cache_direct="on") as proxy,
    ):
        trusted = ["--proxy", proxy.url, "--cacert", str(proxy.ca_file), "--noproxy", "127.0.0.1"]
        for streams in (1, 16):
            rates: dict[str, list[float]] = {"ours": [], "nginx": []}
            spent: list[float] = []
            for _ in range(pairs + 1):
                before = cpu_s(proxy.pid)
                rates["ours"].append(fetch(streams, size, [*trusted, f"https://{R2_HOST}{target}"]))
                spent.append((cpu_s(proxy.pid) - before) / size * 1e9)
                rates["nginx"].append(fetch(streams, size, ["http://127.0.0.1:18445/blob"]))
            pairs_of = list(zip(rates["ours"], rates["nginx"], strict=True))[1:]
            row[f"{streams} streams: ours MB/s"] = statistics.median(rates["ours"][1:])
            row[f"{streams} streams: nginx MB/s"] = statistics.median(rates["nginx"][1:])
            row[f"{streams} streams: ratio"] = statistics.median(a / b for a, b in pairs_of)
            row[f"{streams} streams: CPU s/GB"] = statistics.median(spent[1:])
    return row


def fetch(streams: int, size: int, command: list[str]) -> float:
    """MB/s of a download in equal ranges at once, by as many processes of curl."""
    step = size // streams
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [
                "curl",
                "-sSfL",
                "-w",
                "%{size_download}",
                "-o",
                os.devnull,
                *command,
                "-r",
                f"{start}-{start + step - 1}",
            ],
            stdout=subprocess.PIPE,
        )
        for start in range(0, size, step)
    ]
    got = sum(int(process.communicate()[0]) for process in processes)
    if got != size:
        raise RuntimeError(f"expected {size} bytes, got {got}")
    return size / (time.monotonic() - began) / MB


def eight(folder: Path, pairs: int) -> Row:
    """Eight cold Ollama clients of one 256 MiB blob at 10 MB/s per connection, against one client going direct."""
    size = 256 << 20
    ratios: list[float] = []
    gaps: list[float] = []
    upstream: list[float] = []
    retries = 0
    with Origin(folder / "origin") as origin:
        layer = add_model(origin, size)
        origin.rate_per_connection = 10 * MB
        for number in range(pairs):
            direct = A2Client(None, origin.ca_file, folder / f"direct{number}", resolve=origin.resolve)
            alone_s = direct.pull("tiny").transfer_s
            shutil.rmtree(folder / f"direct{number}")
            origin.reset_counters()
            with Proxy(folder / f"proxy{number}", origin) as proxy:
                clients = [A2Client(proxy.url, proxy.ca_file, folder / f"c{number}-{i}") for i in range(8)]
                with ThreadPoolExecutor(8) as pool:
                    reports = list(pool.map(lambda client: client.pull("tiny"), clients))
            ratios.append(max(report.transfer_s for report in reports) / alone_s)
            gaps.append(max(report.max_gap_s for report in reports))
            upstream.append(origin.counters.cdn_bytes_by_digest[layer] / size)
            retries += sum(report.retries + report.stalls for report in reports)
            for path in [*folder.glob(f"c{number}-*"), folder / f"proxy{number}"]:
                shutil.rmtree(path)
    return {
        "slowest of 8 / 1 direct": statistics.median(ratios),
        "longest gap s": max(gaps),
        "upstream bytes / blob": max(upstream),
        "client retries": retries,
    }


def parts(folder: Path, pairs: int) -> Row:
    """One cold 1.75 GB layer in 16 parts at 10 MB/s per connection; then warm, and warm with the origin stopped."""
    size = 1_750 * MB
    row: Row = {}
    with Origin(folder / "origin") as origin:
        layer = add_model(origin, size)
        origin.rate_per_connection = 10 * MB
        alone = A2Client(None, origin.ca_file, folder / "direct", resolve=origin.resolve).pull("tiny")
        shutil.rmtree(folder / "direct")
        origin.reset_counters()
        with Proxy(folder / "proxy", origin) as proxy:
            with PeakRss(proxy) as rss:
                cold = A2Client(proxy.url, proxy.ca_file, folder / "cold").pull("tiny")
            line = proxy.wait_for_line(f"recorded {layer[7:19]}", timeout_s=60)
            row["parts"] = sum(1 for e in cold.requests if e.range and layer[7:] in e.url)
            row["cold / direct"] = cold.transfer_s / alone.transfer_s
            row["upstream bytes / blob"] = origin.counters.cdn_bytes_by_digest[layer] / size
            row["client retries"] = cold.retries + cold.stalls
            row["longest gap s"] = cold.max_gap_s
            numbers = re.search(r"last byte ([\d.]+) %; commit ([\d.]+) s, of it fsync ([\d.]+) s", line)
            assert numbers is not None
            row["unhashed at the last byte %"], row["commit s"], row["of it fsync s"] = map(float, numbers.groups())
            row["peak RSS MiB"] = rss.mib
            origin.reset_counters()
            warm = A2Client(proxy.url, proxy.ca_file, folder / "warm").pull("tiny")
            shutil.rmtree(folder / "warm")
            row["warm MB/s"] = size / warm.transfer_s / MB
            row["warm upstream bytes"] = origin.counters.cdn_bytes
            origin.stop()
            A2Client(proxy.url, proxy.ca_file, folder / "offline").pull("tiny")
            shutil.rmtree(folder / "offline")
            proxy.restart()
            A2Client(proxy.url, proxy.ca_file, folder / "restarted").pull("tiny")
            row["offline, and after a restart"] = "correct"
    return row


def fairness(folder: Path, pairs: int) -> Row:
    """The longest wait of one client's parts, all at other places, behind a source that is slow in all."""
    row: Row = {}
    for positions, rate in ((16, 2 * MB), (64, 8 * MB)):
        gaps: list[float] = []
        for number in range(pairs):
            room = folder / f"{positions}-{number}"
            with Origin(room / "origin") as origin, Proxy(room / "proxy", origin) as proxy:
                size = 6 * rate
                add_model(origin, size)
                origin.rate_per_connection = rate // 16
                client = A2Client(
                    proxy.url, proxy.ca_file, room / "client", parts=positions, min_part=size // positions + 1
                )
                gaps.append(client.pull("tiny").max_gap_s)
            shutil.rmtree(room)
        row[f"{positions} parts at {rate // MB} MB/s: gap s"] = statistics.median(gaps)
    return row


def lag(folder: Path, pairs: int) -> Row:
    """How late the cache's event loop is while a blob is recorded and sent as fast as loopback allows."""
    values: dict[str, list[float]] = {}
    for number in range(pairs):
        room = folder / str(number)
        with Origin(room / "origin") as origin, Proxy(room / "proxy", origin) as proxy:
            add_model(origin, 1024 * MB)
            A2Client(proxy.url, proxy.ca_file, room / "client").pull("tiny")
            proxy.stop()
            line = proxy.wait_for_line("event loop lag: ")
        for name, value in re.findall(r"(\w+) ([\d.]+) ms", line):
            values.setdefault(f"{name} ms", []).append(float(value))
        shutil.rmtree(room)
    return {name: statistics.median(found) for name, found in values.items()}


ROWS: Final = {"hit": hit, "direct": direct, "eight": eight, "parts": parts, "fairness": fairness, "lag": lag}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--pairs", type=int, default=5, help="alternating repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        parser.error(f"expected rows of {', '.join(ROWS)}, got {unknown[0]}")
    for program in ("nginx", "curl"):
        if shutil.which(program) is None:
            parser.error(f"expected {program} on PATH, got none: install it")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {platform.system()}"
    print(machine)
    results: dict[str, Any] = {"machine": machine}
    for name in arguments.rows or ROWS:
        with tempfile.TemporaryDirectory(prefix="ollama-cache-bench-") as folder:
            row = results[name] = ROWS[name](Path(folder), arguments.pairs)
        print(f"\n{name}: {(ROWS[name].__doc__ or '').strip()}")
        for key, value in row.items():
            print(f"  {key:<32} {value:.3f}" if isinstance(value, float) else f"  {key:<32} {value}")
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
