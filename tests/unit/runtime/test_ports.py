"""ports: who has a port, or what would let us have it."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pullthrough.runtime import ports
from pullthrough.runtime.ports import listening, reason, shown_address


def taken(port: int) -> OSError:
    with pytest.raises(OSError, match="in use") as refused:
        listening("127.0.0.1", port)
    return refused.value


def test_taken_by_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and number; we are told as ourselves."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        error = taken(port)
        assert reason(error, port) == "it is taken by this cache itself, for another of its listeners"
        own = os.getpid()
        monkeypatch.setattr(ports.os, "getpid", lambda: 1)
        assert reason(error, port).endswith(f"(process {own})")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")
def test_taken_by_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells us whose it is, if not which process."""
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [])
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        name = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        assert reason(taken(port), port) == f"it is taken by a process of user {name}"
    assert reason(OSError(errno.EADDRINUSE, ""), port) == "it is taken by another process"


def test_what_would_allow_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A privileged port and a foreign address."""
    assert "ports below 1024 are for root, or for a program with CAP_NET_BIND_SERVICE" in reason(
        PermissionError(errno.EACCES, "Permission denied"), 443
    )
    with pytest.raises(OSError, match=r".") as refused:
        listening("192.0.2.1", 1)
    assert reason(refused.value, 1) == "this machine has no such address"
    assert reason(OSError(errno.EMFILE, "Too many open files"), 1) == "Too many open files"


def test_nothing_is_left_open() -> None:
    """Where one of several addresses cannot be had."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            listening("", port)
    for again in listening("127.0.0.1", port):
        again.close()


def test_addresses_as_people_write_them() -> None:
    """IPv6 in brackets, a star for all."""
    assert [shown_address(host, 80) for host in ("", "::1", "cache.lan")] == ["*:80", "[::1]:80", "cache.lan:80"]
