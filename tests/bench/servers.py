"""The programs to compare with, as they come, and what a program costs while it serves.

**Invariant**: each server accepts connections when its block begins and is gone when it ends. Knows no load.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from tests.bench.load import Route
from tests.support.origin import Origin
from tests.support.proxy import environment, free_port

_START_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    pid: int
    port: int
    route: Route


@contextmanager
def nginx(folder: Path, origin: Origin, port: int, rules: str, *, outside: str = "") -> Iterator[Server]:
    """nginx with a TLS server at `port`, which has the origin's certificate and does as `rules` say.

    `outside` is for the http block: more servers, caches. Its workers are one for each core.
    """
    certificate = origin.ca_file.with_name("origin-leaf.pem")
    # Started by root, its workers would otherwise be nobody, who may not read a temporary folder.
    user = "user root; " if os.geteuid() == 0 else ""
    places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi"))
    (folder / "nginx.conf").write_text(
        f"{user}daemon off; worker_processes auto; events {{ worker_connections 1024; }}\n"
        f"pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 1000000; {places} scgi_temp_path {folder}/scgi;\n"
        f"ssl_certificate {certificate}; ssl_certificate_key {certificate}; log_format size '$body_bytes_sent';\n"
        f"{outside}\nserver {{ listen 127.0.0.1:{port} ssl backlog=1024; {rules} }} }}\n"
    )
    command = ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]
    with _running(command, folder, port) as pid:
        yield Server(pid, port, Route(str(origin.ca_file)))


@contextmanager
def stock_mitmdump(folder: Path, origin: Origin) -> Iterator[Server]:
    """mitmdump as it is, streaming."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "mitmdump"), "--listen-host", "127.0.0.1", "--listen-port", str(port)]
    command += ["--set", f"confdir={folder}", "--set", f"ssl_verify_upstream_trusted_ca={origin.ca_file}"]
    command += ["--set", "stream_large_bodies=1", "--set", "connection_strategy=lazy", "--set", "flow_detail=0"]
    with _running(command, folder, port) as pid:
        yield Server(pid, port, Route(str(folder / "mitmproxy-ca-cert.pem"), ("127.0.0.1", port)))


@contextmanager
def _running(command: list[str], folder: Path, port: int) -> Iterator[int]:
    log_file = folder / "output.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(folder / "home"))
    try:
        wait_for(lambda: process.poll() is not None or _accepts(port))
        if process.poll() is not None:
            raise RuntimeError(f"expected {command[0]} to run, got its end: {log_file.read_text()[-500:]}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_for(claim: Callable[[], bool], timeout_s: float = _START_S) -> None:
    """Return when the claim holds; TimeoutError if it never does."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected a server to be ready within {timeout_s:.0f} s")
        time.sleep(0.05)


def _accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Cost:
    """What a process and its children take while a block runs."""

    def __init__(self, pid: int) -> None:
        parent = psutil.Process(pid)
        self._processes = [parent, *parent.children(recursive=True)]
        self._began: list[tuple[psutil.Process, float]] = []
        self.cpu_s = 0.0
        self.peak_mib = 0.0
        """The most resident memory, by the kernel's own high-water mark."""

    def __enter__(self) -> Self:
        for process in self._processes:
            # proc(5): 5 resets the peak resident set size to the present one.
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        self._began = [(process, _used_s(process)) for process in self._processes]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, began_s in self._began:
            # nginx's cache loader ends after a minute, and has done nothing.
            if process.is_running():
                self.cpu_s += _used_s(process) - began_s
                self.peak_mib += _peak_mib(process.pid)


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
