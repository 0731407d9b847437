"""The real product as its users start it: a mitmdump subprocess with the addon script, and what it printed.

Invariant: a `Proxy` that was entered has said that it is ready, and none outlives its `with` block. The
process gets no settings but those named here: its home is a folder of its own, proxy and product variables of
the environment are dropped. Knows nothing of what the product does.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.origin import Origin

READY_MARKER: Final = "ollama-cache ready"
"""What the addon logs when it can serve."""
CA_NAME: Final = "ollama-cache-ca-cert.pem"
ADDON: Final = Path(__file__).resolve().parents[2] / "addon" / "ollama_cache.py"
PROGRAM: Final = (Path(sys.executable).parent / "mitmdump", "-s", ADDON)

_LISTENING: Final = re.compile(r'proxy listening at \S*?:(?P<port>\d+)\.?(?:"|\s*$)')
_START_S: Final = 30.0
_STOP_S: Final = 30.0
_SAMPLE_S: Final = 0.05
_DROPPED: Final = re.compile(
    r"(?i)(https?|all|no)_proxy|ollama_.*|xdg_.*|ssl_cert_.*|mitmproxy_.*|python(path|warnings)"
)


class StartFailed(Exception):
    """The process ended, or was not ready in time; the message is its whole output."""


def arguments(options: Mapping[str, object], *, port: int = 0, program: Sequence[str | Path] = PROGRAM) -> list[str]:
    """The command line; booleans are written the way mitmproxy reads them."""
    command = [*map(str, program), "--listen-host", "127.0.0.1", "--listen-port", str(port)]
    for name, value in options.items():
        command += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return command


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without anything that configures a proxy, a CA or the product.

    But for its port without a proxy, which is off, and the place of its note: tests run at the same time.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not _DROPPED.fullmatch(name)}
    return {
        **kept,
        "HOME": str(home),
        "PYTHONUNBUFFERED": "1",
        "OLLAMA_CACHE_LISTEN": "off",
        "OLLAMA_CACHE_RUNTIME_DIR": str(home / "run"),
        **(extra or {}),
    }


def run_until_exit(
    directory: Path,
    *,
    timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    program: Sequence[str | Path] = PROGRAM,
    port: int = 0,
    **options: object,
) -> tuple[int, str]:
    """Start a process that is expected to refuse; its return code and output. `directory` is for its home."""
    try:
        done = subprocess.run(
            arguments(options, port=port, program=program),
            env=environment(directory / "home", env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = (error.output or b"").decode("utf-8", "replace")
        raise TimeoutError(f"expected an exit within {timeout_s:.0f} s, output:\n{output}") from None
    return done.returncode, done.stdout.decode("utf-8", "replace")


def patched(folder: Path, patch: str) -> tuple[str | Path, ...]:
    """The program, with a script in `folder` that runs these lines before it loads the addon."""
    script = folder / "patched.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ADDON.parent)!r})\n{patch}\n{ADDON.read_text()}")
    return PROGRAM[0], "-s", script


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Proxy:
    """mitmdump with the addon. Store, certificates and home lie in `directory` and survive restarts.

    `options` are mitmproxy options by their full names; they win over the defaults made from the other
    parameters. With an `origin`, it is the upstream and its CA the trusted one.
    """

    def __init__(
        self,
        directory: Path,
        origin: Origin | None = None,
        *,
        env: Mapping[str, str] | None = None,
        program: Sequence[str | Path] = PROGRAM,
        front: bool = False,
        **options: object,
    ) -> None:
        """`program` is what takes mitmdump's arguments, with whatever starts it. With `front`, `front_port` is open."""
        self.directory = directory
        self.options: dict[str, object] = {
            "ollama_cache_dir": directory / "store",
            "ollama_cache_certs": directory / "certs",
            # The machine's disk may be nearly full: that is not what a test is about.
            "ollama_cache_min_free": "0",
        }
        if origin is not None:
            self.options["ollama_cache_upstream"] = origin.upstream_option
            self.options["ssl_verify_upstream_trusted_ca"] = origin.ca_file
        self.front_port = 0
        """Where the registry is spoken for without a proxy, kept by later starts; 0 for nowhere."""
        if front:
            self.front_port = free_port()
            hosts = ("127.0.0.1", "[::1]") if _has_ipv6() else ("127.0.0.1",)
            self.options["ollama_cache_listen"] = ",".join(f"{host}:{self.front_port}" for host in hosts)
            self.options["ollama_cache_front"] = f"{self.front_port}=registry.ollama.ai"
        self.options |= options
        self.output: list[str] = []
        """Lines of stdout and stderr, over all starts."""
        self.port = 0
        """Chosen by the system at the first start and kept by later ones."""
        self._env = dict(env or {})
        self._program = tuple(program)
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._from = 0

    # --- facts

    @property
    def url(self) -> str:
        """What a client puts into HTTPS_PROXY."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        """The value of the option `ollama_cache_dir`."""
        return Path(str(self.options["ollama_cache_dir"]))

    @property
    def ca_file(self) -> Path:
        """The certificate that clients trust."""
        return Path(str(self.options["ollama_cache_certs"])) / CA_NAME

    @property
    def pid(self) -> int:
        """The running process."""
        assert self._process is not None, "expected a started proxy"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """The process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Of the process that ended last; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def rss_mib(self) -> float:
        """Resident memory now."""
        return _status_mib(self.pid, "VmRSS")

    def high_water_mib(self) -> float:
        """The most resident memory since the start, as the kernel recorded it."""
        return _status_mib(self.pid, "VmHWM")

    # --- life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.kill()
            self.dump()

    def start(self) -> None:
        """Start the process and return when it serves."""
        assert not self.is_running, "expected a stopped proxy"
        self._from = len(self.output)
        self._process = subprocess.Popen(
            arguments(self.options, port=self.port, program=self._program),
            env=environment(self.directory / "home", self._env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="proxy-output", daemon=True)
        self._reader.start()
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready() or self._has_ended(), _START_S)
            if self._is_ready():
                self.port = self._listening_port()
                return
        self.kill()
        raise StartFailed(
            f"expected a line with {READY_MARKER!r} and the listening port within {_START_S:.0f} s, "
            f"return code {self.returncode}, output:\n{self._since_start()}"
        )

    def stop(self) -> int:
        """SIGTERM; the return code. One that does not end is killed, and that is an error."""
        if self._process is None:
            return 0
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"expected an end within {_STOP_S:.0f} s of SIGTERM, output:\n{self._since_start()}"
            ) from None
        self._finish()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._finish()

    def restart(self) -> None:
        """Stop and start on the same port."""
        self.stop()
        self.start()

    # --- output

    def wait_for_line(self, text: str, *, count: int = 1, timeout_s: float = 20.0) -> str:
        """Return the `count`-th line since the start that contains `text`, when it is there."""

        def found() -> list[str]:
            return [line for line in self.output[self._from :] if text in line]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count, timeout_s):
                raise TimeoutError(f"expected {text!r} {count} times, got {found()} in:\n{self._since_start()}")
            return found()[count - 1]

    def forget_lines(self) -> None:
        """Make `wait_for_line` look only at what comes from now on."""
        self._from = len(self.output)

    def dump(self) -> str:
        """All output, also printed, so that pytest shows it beside a failure."""
        text = "\n".join(self.output)
        print(f"--- output of the proxy ---\n{text}\n--- end of output ---", file=sys.stderr)
        return text

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                self.output.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._changed.notify_all()
        process.wait()
        with self._changed:
            self._changed.notify_all()

    def _finish(self) -> None:
        # A grandchild that inherited the pipe would keep the reader waiting.
        assert self._reader is not None and self._process is not None and self._process.stdout is not None
        self._reader.join(5.0)
        if not self._reader.is_alive():
            self._process.stdout.close()

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _is_ready(self) -> bool:
        is_said = any(READY_MARKER in line for line in self.output[self._from :])
        return is_said and self._listening_port() > 0 and not self._has_ended()

    def _listening_port(self) -> int:
        for line in self.output[self._from :]:
            if match := _LISTENING.search(line):
                return int(match["port"])
        return 0

    def _since_start(self) -> str:
        return "\n".join(self.output[self._from :])


class PeakRss:
    """Samples a process's resident memory while a block runs."""

    def __init__(self, proxy: Proxy) -> None:
        self.start_mib = 0.0
        self.mib = 0.0
        """The most seen so far."""
        self._proxy = proxy
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-rss", daemon=True)

    @property
    def growth_mib(self) -> float:
        """How far the peak lies above the beginning."""
        return self.mib - self.start_mib

    def __enter__(self) -> Self:
        self.start_mib = self.mib = self._proxy.rss_mib()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._note()

    def _note(self) -> None:
        # The process may be restarted or killed while it is watched.
        with contextlib.suppress(OSError, LookupError):
            self.mib = max(self.mib, self._proxy.rss_mib())


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def _status_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _colon, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    # A zombie has no memory and no such line.
    raise LookupError(f"expected {field} in the status of process {pid}")
