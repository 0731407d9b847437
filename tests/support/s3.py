"""A real S3 server on loopback: OpenStack Swift with its S3 API, one process for each of its four parts.

Invariant: what was stored survives `kill` and `start`, on the same port; none of its processes outlives the `with`
block. Swift is found by this interpreter, or by the one that OLLAMA_CACHE_TEST_SWIFT names. Knows nothing of what is
stored.
"""

import contextlib
import getpass
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import obstore
from obstore.store import S3Store

from tests.support.proxy import free_port

INTERPRETER: Final = "OLLAMA_CACHE_TEST_SWIFT"
USER: Final = "test:tester"
SECRET: Final = "tier-test-key"
BUCKET: Final = "models"

_START_S: Final = 20.0
_RING: Final = """
import sys
from swift.common.ring import RingBuilder
device = {"id": 0, "region": 1, "zone": 1, "weight": 1.0, "ip": "127.0.0.1", "port": int(sys.argv[2]), "device": "disk"}
builder = RingBuilder(2, 1, 0)
builder.add_dev({**device, "meta": ""})
builder.rebalance()
builder.get_ring().save(sys.argv[1])
"""
_RUN: Final = """
from swift.{0}.server import main
main()
"""
_PIPELINE: Final = {
    "catch_errors": {},
    "gatekeeper": {},
    "cache": {"use": "egg:swift#memcache", "memcache_servers": "127.0.0.1:1"},
    "listing_formats": {},
    "bulk": {},
    "s3api": {"location": "us-east-1", "s3_acl": "false", "check_bucket_owner": "false"},
    "tempauth": {f"user_{USER.replace(':', '_')}": f"{SECRET} .admin"},
    "slo": {},
    "dlo": {},
}


def interpreter() -> str | None:
    """A Python that can run Swift, None if there is none."""
    if importlib.util.find_spec("swift") is not None:
        return sys.executable
    return os.environ.get(INTERPRETER)


def _text(sections: Mapping[str, Mapping[str, object]]) -> str:
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


class S3Server:
    """One bucket, `BUCKET`, of a server whose files lie in `directory`."""

    def __init__(self, directory: Path) -> None:
        python = interpreter()
        assert python is not None, f"expected Swift in this environment or an interpreter in {INTERPRETER}"
        self._python = python
        self._directory = directory
        self._ports = {name: free_port() for name in ("proxy", "account", "container", "object")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._configure()

    @property
    def port(self) -> int:
        return self._ports["proxy"]

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What tells a client of it."""
        return {
            "AWS_ENDPOINT_URL": self.origin,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def _configure(self) -> None:
        folder = self._directory
        for name in ("etc", "srv/disk", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        policy = {"name": "one", "default": "yes"}
        hashing = {"swift_hash_path_prefix": "p", "swift_hash_path_suffix": "s"}
        (folder / "etc" / "swift.conf").write_text(_text({"swift-hash": hashing, "storage-policy:0": policy}))
        common = {"workers": 0, "user": getpass.getuser(), "swift_dir": folder / "etc", "bind_ip": "127.0.0.1"}
        common |= {"log_address": folder / "none", "log_level": "ERROR"}
        disk = {"devices": folder / "srv", "mount_check": "false", "disable_fallocate": "true", "fallocate_reserve": 0}
        for name in ("account", "container", "object"):
            port = self._ports[name]
            app = {"use": f"egg:swift#{name}", "replication_server": "true"}
            sections: dict[str, Mapping[str, object]] = {
                "DEFAULT": common | disk | {"bind_port": port},
                "pipeline:main": {"pipeline": f"{name}-server"},
                f"app:{name}-server": app,
            }
            (folder / "etc" / f"{name}.conf").write_text(_text(sections))
            ring = folder / "etc" / f"{name}.ring.gz"
            subprocess.run([self._python, "-W", "ignore", "-c", _RING, ring, str(port)], check=True)
        app = {"use": "egg:swift#proxy", "account_autocreate": "true", "allow_account_management": "true"}
        filters = {f"filter:{name}": {"use": f"egg:swift#{name}"} | more for name, more in _PIPELINE.items()}
        sections = {
            "DEFAULT": common | {"bind_port": self.port},
            "pipeline:main": {"pipeline": " ".join([*_PIPELINE, "proxy-server"])},
            "app:proxy-server": app,
        }
        (folder / "etc" / "proxy.conf").write_text(_text(sections | filters))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and return when it answers; the bucket is there."""
        for name in self._ports:
            with (self._directory / f"{name}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [
                            self._python,
                            "-W",
                            "ignore",
                            "-c",
                            _RUN.format(name.replace("object", "obj")),
                            self._directory / "etc" / f"{name}.conf",
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in self._directory.glob("*.log"))
                self.kill()
                raise TimeoutError(f"expected an S3 server within {_START_S:.0f} s, got:\n{logs}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all of it; what is stored stays."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def pause(self) -> None:
        """Let it go silent with its connections open; `kill` and `start`, or `resume`, end that."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)

    @property
    def held(self) -> int:
        """The bytes on its disk, parts of uploads that have not ended among them."""
        return sum(path.stat().st_size for path in (self._directory / "srv").rglob("*.data"))

    def store(self, prefix: str) -> Any:
        """An obstore of this server's bucket."""
        return S3Store(BUCKET, prefix=prefix or None, **self._config)

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "endpoint": self.origin,
            "access_key_id": USER,
            "secret_access_key": SECRET,
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }

    def _answers(self) -> bool:
        """Whether the bucket could be made, or is there, and every part listens."""
        target = obstore.sign(self.store(""), "PUT", "", timedelta(minutes=1)).removeprefix(self.origin)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("PUT", target)
            if connection.getresponse().status in (200, 409):
                socket.create_connection(("127.0.0.1", self._ports["object"]), 1).close()
                return True
        return False
