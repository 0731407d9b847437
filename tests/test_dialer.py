"""dialer: whom it believes, which way it goes, and what it says when that does not work."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pullthrough.ca import CERTIFICATE_NAME, Authority
from pullthrough.dialer import Dialer
from pullthrough.errors import LoopDetected, UpstreamError, UpstreamUnreachable
from pullthrough.loopguard import LoopGuard
from pullthrough.parent import Parents
from pullthrough.settings import Endpoint
from tests.support.connectproxy import ConnectProxy

NAME = "localhost"


class Echo:
    """A TLS server with a certificate of its own authority, which sends back what it is sent."""

    def __init__(self, folder: Path, host: str = NAME, *, issued: datetime | None = None) -> None:
        now = datetime.now(UTC)
        authority = Authority.load_or_create(folder, (NAME, "other.test"), now=now - timedelta(days=400))
        leaf = authority.issue(host, now=issued or now)
        (folder / f"{host}.pem").write_bytes(leaf.pem)
        self.ca_file = folder / CERTIFICATE_NAME
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / f"{host}.pem")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def __enter__(self) -> "Echo":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            try:
                with closing(self._context.wrap_socket(sock, server_side=True)) as tls:
                    while data := tls.recv(65536):
                        tls.sendall(data)
            except OSError:
                continue


def dialer(ca_file: Path | None, parents: Parents | None = None, *, is_own: bool = False) -> Dialer:
    return Dialer(
        ssl.create_default_context(cafile=ca_file),
        parents or Parents(),
        LoopGuard("this-cache"),
        is_own=lambda *_: is_own,
        own_addresses=frozenset,
    )


def echoes(dialer: Dialer, endpoint: Endpoint) -> bool:
    line = dialer.dial(endpoint)
    try:
        line.write(b"hello " * 100_000)
        received = b""
        while len(received) < 600_000:
            received += line.read()
        return received == b"hello " * 100_000
    finally:
        line.close()


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Echo]:
    with Echo(tmp_path) as echo:
        yield echo


def test_a_trusted_server(echo: Echo) -> None:
    """Its chain and its name are right: bytes go both ways."""
    assert echoes(dialer(echo.ca_file), Endpoint("https", NAME, echo.port))


@pytest.mark.parametrize("fault", ["another name", "an unknown authority", "an expired certificate"])
def test_who_is_not_believed(tmp_path: Path, fault: str) -> None:
    """Each is refused before a byte is sent, and the message says why."""
    issued = datetime.now(UTC) - timedelta(days=200) if fault == "an expired certificate" else None
    host = "other.test" if fault == "another name" else NAME
    with Echo(tmp_path, host, issued=issued) as echo:
        ca_file = None if fault == "an unknown authority" else echo.ca_file
        with pytest.raises(UpstreamUnreachable, match="certificate verify failed"):
            dialer(ca_file).dial(Endpoint("https", NAME, echo.port))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_through_a_parent(echo: Echo, scheme: str) -> None:
    """By CONNECT, with its credentials and our own mark; in TLS to the parent itself too."""
    with ExitStack() as stack:
        parent = stack.enter_context(
            ConnectProxy({("blobs.test", 443): ("127.0.0.1", echo.port)}, credentials="user:word")
        )
        port = parent.port
        if scheme == "https":
            port = stack.enter_context(TlsFront(echo, parent.port)).port
        parents = Parents.parse({"HTTPS_PROXY": f"{scheme}://user:word@{NAME}:{port}"})
        line = None
        with pytest.raises(UpstreamUnreachable, match="certificate verify failed"):
            # The tunnel is there; the server behind it has another name.
            line = dialer(echo.ca_file, parents).dial(Endpoint("https", "blobs.test", 443))
        assert line is None
        (asked,) = parent.asked
        assert (asked.method, asked.target, asked.headers["cdn-loop"]) == ("CONNECT", "blobs.test:443", "this-cache")


class TlsFront:
    """TLS in front of a plain port."""

    def __init__(self, echo: Echo, port: int) -> None:
        self._context, self._behind = echo._context, port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def __enter__(self) -> "TlsFront":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        try:
            sock, _ = self._listening.accept()
            with (
                closing(self._context.wrap_socket(sock, server_side=True)) as tls,
                socket.create_connection(("127.0.0.1", self._behind)) as behind,
            ):
                back = threading.Thread(target=self._copy, args=(behind, tls))
                back.start()
                self._copy(tls, behind)
                back.join()
        except OSError:
            return

    @staticmethod
    def _copy(source: Any, target: Any) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


def test_a_parent_that_refuses(echo: Echo) -> None:
    """What it said is in the error, and no password."""
    with ConnectProxy({}, credentials="user:word") as parent:
        parents = Parents.parse({"HTTPS_PROXY": f"http://user:wrong@{NAME}:{parent.port}"})
        with pytest.raises(UpstreamUnreachable) as caught:
            dialer(echo.ca_file, parents).dial(Endpoint("https", "blobs.test", 443))
    assert str(caught.value) == f"parent proxy http://{NAME}:{parent.port} answered 407"


def test_a_name_that_leads_here(echo: Echo) -> None:
    """A registry's name that is this machine is a loop."""
    with pytest.raises(LoopDetected):
        dialer(echo.ca_file, is_own=True).dial(Endpoint("https", NAME, echo.port))


def test_the_next_address_is_tried(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose first address does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
            for address in (unused.getsockname(), ("127.0.0.1", echo.port))
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert echoes(dialer(echo.ca_file), Endpoint("https", NAME, 443))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
        with pytest.raises(UpstreamError):
            dialer(echo.ca_file).dial(Endpoint("https", NAME, 443))
