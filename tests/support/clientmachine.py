"""A machine with an Ollama daemon, as far as the doctor for clients looks: processes, files, and who answers at a port.

The daemon is a process of that name in a PID namespace, with the environment that a test gives it; files lie in a
folder that stands for `/`. Ports are those of the machine that runs the tests.

Invariant: nothing outside the folder is touched, and no process outlives its call. Needs root or user namespaces.
"""

import email.utils
import http.server
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from pullthrough.doctor.rules import Finding

_SERVE: Final = "echo >up\nread -r _ <forever\n"
"""What the daemon does: its program is a shell of another name, and `serve` a script."""
_SYSTEMCTL: Final = '#!/bin/sh\n[ "$1" = show ] && cat "${0%/*}/../configured"\n'
_SHELL_S: Final = 60.0
LONG_AGO: Final = 86400.0


class Machine:
    """One client; its files are below `root`."""

    def __init__(self, folder: Path, script: bytes) -> None:
        """`script` is the doctor. Skips the test where no namespaces are to be had."""
        if sys.platform != "linux" or shutil.which("unshare") is None or shutil.which("curl") is None:
            pytest.skip("needs Linux, unshare and curl")
        self._unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if os.geteuid() != 0:
            self._unshare.insert(1, "--map-root-user")
        probe = subprocess.run([*self._unshare, "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"needs root or user namespaces: {probe.stderr.strip()}")
        self.folder = folder
        self.root = folder / "root"
        self.root.mkdir()
        self.configured: dict[str, str] = {}
        """What systemd would start the service with."""
        self.hosts = ""
        """Entries in front of those of the machine."""
        self.own_network = False
        """Whether it has a network of its own, with an IPv6 address and nobody else."""
        self.has_proc = True
        self.command: list[str | Path] = ["sh", "doctor.sh", "--fields"]
        (folder / "doctor.sh").write_bytes(script)
        (folder / "bin").mkdir()
        self.install("systemctl", _SYSTEMCTL)
        shutil.copy(Path("/bin/sh").resolve(), folder / "bin/ollama")
        (folder / "serve").write_text(_SERVE)
        for name in ("up", "forever"):
            os.mkfifo(folder / name)

    def install(self, name: str, text: str) -> None:
        """Put a program in front of the machine's own."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def write(self, path: str, text: str, *, mode: int = 0o644, age_s: float = LONG_AGO) -> str:
        """Make the file below `root`; returns its path as the machine has it."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        os.utime(file, (time.time() - age_s,) * 2)
        return path

    def run(
        self, daemon: Mapping[str, str] | None, *, user: int | None = None, **shell: str
    ) -> "subprocess.CompletedProcess[str]":
        """Let the doctor look, beside a daemon with these variables if any; `shell` are variables of whoever asks."""
        folder = self.folder
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        configured = " ".join(f"{name}={value}" for name, value in self.configured.items())
        (folder / "configured").write_text(f"{configured}\n")
        steps = ["set -e"]
        if self.hosts:
            (folder / "hosts").write_text(self.hosts)
            steps.append("mount --bind hosts /etc/hosts")
        if self.own_network:
            steps.append("ip link set lo up; ip address add 10.0.0.2/32 dev lo; ip address add 2001:db8::2/128 dev lo")
        if daemon is not None:
            variables = [f"{name}={value}" for name, value in daemon.items()]
            become = [] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups"]
            steps.append(f"{shlex.join(['env', '-i', f'PATH={path}', *variables, *become, 'ollama', 'serve'])} &")
            steps.append("read -r _ <up")
        if not self.has_proc:
            steps.append("mount -t tmpfs none /proc")
        steps.append(f"exec {shlex.join(map(str, self.command))}")
        unshare = [*self._unshare, *(["--net"] if self.own_network else [])]
        return subprocess.run(
            [*unshare, "sh", "-c", "\n".join(steps)],
            cwd=folder,
            env={"PATH": path, "DOCTOR_ROOT": str(self.root), "HOME": str(folder), **shell},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SHELL_S,
            check=False,
        )

    def findings(self, daemon: Mapping[str, str] | None, **options: Any) -> list[Finding]:
        """What the doctor finds; its exit code says whether any of it is grave."""
        done = self.run(daemon, **options)
        found = []
        for line in done.stdout.splitlines():
            grave, what, why, mend = line.split("\t")
            found.append(Finding(what, why, mend, grave == "yes"))
        assert done.returncode == int(any(finding.grave for finding in found)), done.stdout + done.stderr
        assert not done.stderr, done.stderr
        return found


@contextmanager
def answering(
    fields: Mapping[str, str],
    body: bytes = b"",
    *,
    context: ssl.SSLContext | None = None,
    ahead_s: float = 0.0,
    status: int = 200,
) -> Iterator[int]:
    """A server on loopback that answers everything so, with a clock that is ahead; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def date_time_string(self, timestamp: float | None = None) -> str:
            return email.utils.formatdate((timestamp or time.time()) + ahead_s, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that does not trust us hangs up, and that is what it should do."""

        def get_request(self) -> Any:
            sock, address = super().get_request()
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            return sock, address

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="answering", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
