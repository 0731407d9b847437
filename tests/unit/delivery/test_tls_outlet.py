"""tls_outlet: bytes through TLS, begun by others or not, from files and memory, to slow clients and lost ones."""

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from OpenSSL import SSL

from pullthrough.delivery import tls_outlet
from pullthrough.delivery.outlets import PIECE, Buffers, ClientGone, Unreadable
from pullthrough.delivery.tls_contexts import TlsContext
from pullthrough.delivery.tls_outlet import TlsOutlet
from pullthrough.pki.authority import CERTIFICATE_NAME, Authority

NAME = "blobs.test"
DATA = os.urandom(3 * PIECE + 12345)
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def context(folder: Path) -> SSL.Context:
    now = datetime.now(UTC)
    tls = TlsContext()
    tls.renew(Authority.load_or_create(folder, (NAME,), now=now).issue(NAME, now=now))
    return tls.current


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


class Pair:
    """An outlet, and the client at its other end; the outlet's side runs in a thread."""

    def __init__(self, context: SSL.Context, folder: Path, *, early: int) -> None:
        self.buffers = Buffers()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            raw = socket.create_connection(listening.getsockname(), PATIENCE_S)
            ours, _ = listening.accept()
        self._context = ssl.create_default_context(cafile=folder / CERTIFICATE_NAME)
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        hello = threading.Thread(target=self._connect, args=(raw,))
        hello.start()
        self.out = TlsOutlet(ours, self.buffers, ours.recv(early) if early else b"")
        self.out.handshake(context)
        hello.join(PATIENCE_S)
        self.problem: BaseException | None = None

    def _connect(self, raw: socket.socket) -> None:
        self.client = self._context.wrap_socket(raw, server_hostname=NAME)

    def send(self, work: Callable[[TlsOutlet], object]) -> threading.Thread:
        def run() -> None:
            try:
                work(self.out)
            except OSError as error:
                self.problem = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (more := self.client.recv(size - len(data))):
            data += more
        return bytes(data)


@pytest.fixture(params=[0, 10, 65536], ids=["from the start", "half a hello", "the whole hello"])
def pair(request: pytest.FixtureRequest, context: SSL.Context, folder: Path) -> Iterator[Pair]:
    pair = Pair(context, folder, early=request.param)
    yield pair
    pair.out.stop()
    pair.out.close()
    pair.client.close()


def test_handshake(pair: Pair) -> None:
    """HTTP/1.1 is what is chosen, the name is known, and nothing older than TLS 1.2 is spoken."""
    assert pair.client.selected_alpn_protocol() == "http/1.1"
    assert pair.out.server_name == NAME
    assert pair.client.version() in ("TLSv1.2", "TLSv1.3")


def test_head_file_and_memory(pair: Pair, file: int) -> None:
    """What is held back comes first, and everything in order; only bodies are counted."""

    def work(out: TlsOutlet) -> None:
        out.hold(b"head")
        out.put_file(file, 5, len(DATA))
        out.put(b"memory")
        out.hold(b"end")
        out.flush()
        out.put(b"")

    thread = pair.send(work)
    assert pair.receive(len(DATA) + 8) == b"head" + DATA[5:] + b"memory" + b"end"
    thread.join(PATIENCE_S)
    assert (pair.problem, pair.out.sent) == (None, len(DATA) - 5 + 6)


def test_requests(pair: Pair) -> None:
    """Bytes are readable when they have come, whole records that lie in memory too; the end is no bytes."""
    assert not pair.out.readable(0.0)
    pair.client.send(b"one")
    pair.client.send(b"two")
    got = b""
    while got != b"onetwo":
        assert pair.out.readable(PATIENCE_S)
        got += pair.out.read()
    assert not pair.out.readable(0.0)
    assert not pair.out.is_gone()
    pair.client.close()
    assert pair.out.readable(PATIENCE_S)
    assert pair.out.read() == b""
    assert pair.out.is_gone()


def test_a_client_that_stalls_holds_no_memory(
    context: SSL.Context, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The piece's memory is given back while nothing is taken; then the same bytes go on."""
    waiting, go = threading.Event(), threading.Event()
    pair = Pair(context, folder, early=0)
    size = 64 << 20
    path = tmp_path / "large"
    with path.open("wb") as hole:
        hole.truncate(size)
        hole.seek(size - 1)
        hole.write(b"!")
    descriptor = os.open(path, os.O_RDONLY)
    writable = tls_outlet.writable

    def watched(sock: socket.socket, timeout_s: float | None) -> bool:
        waiting.set()
        assert go.wait(PATIENCE_S)
        return writable(sock, timeout_s)

    monkeypatch.setattr(tls_outlet, "writable", watched)
    thread = pair.send(lambda out: out.put_file(descriptor, 0, size))
    assert waiting.wait(PATIENCE_S)
    assert pair.buffers.in_use == 0
    go.set()
    received = pair.receive(size)
    thread.join(PATIENCE_S)
    assert (len(received), received[-1:], received.count(0), pair.problem) == (size, b"!", size - 1, None)
    os.close(descriptor)
    pair.out.close()
    pair.client.close()


def test_stop_frees_a_blocked_write(pair: Pair) -> None:
    """From another thread, and at once; the reason is in the error."""
    began = threading.Event()

    def work(out: TlsOutlet) -> None:
        began.set()
        out.put(bytes(64 << 20))

    thread = pair.send(work)
    assert began.wait(PATIENCE_S)
    pair.out.stop("because")
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert isinstance(pair.problem, ClientGone)
    assert str(pair.problem) == "because"


def test_a_short_file(pair: Pair, file: int) -> None:
    """It is the file's fault, and what was there has been sent."""
    pair.send(lambda out: out.put_file(file, len(DATA) - 10, len(DATA) + 10)).join(PATIENCE_S)
    assert isinstance(pair.problem, Unreadable)
    assert pair.buffers.in_use == 0


def test_goodbye(pair: Pair) -> None:
    """The end is FIN behind close_notify, although the client has said what nobody has read."""
    pair.client.send(b"unread")
    thread = pair.send(lambda out: out.say_goodbye())
    assert pair.client.recv(1) == b""
    pair.client.close()
    thread.join(PATIENCE_S)
    assert pair.problem is None


def test_who_does_not_trust_us(context: SSL.Context, folder: Path) -> None:
    """An alert is an error of TLS; a connection that just ends is a client that has gone."""
    for ends, expected in ((False, SSL.Error), (True, ClientGone)):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            raw = socket.create_connection(listening.getsockname(), PATIENCE_S)
            ours, _ = listening.accept()

        def refuse(raw: socket.socket = raw, ends: bool = ends) -> None:
            if not ends:
                with pytest.raises(ssl.SSLError):
                    ssl.create_default_context(cafile=folder / CERTIFICATE_NAME).wrap_socket(
                        raw, server_hostname="another.test"
                    )
            raw.close()

        client = threading.Thread(target=refuse)
        client.start()
        with pytest.raises(expected):
            TlsOutlet(ours, Buffers()).handshake(context)
        client.join(PATIENCE_S)
        ours.close()


def test_a_renewed_leaf_is_another_context(folder: Path) -> None:
    """Connections of the former one go on with it."""
    now = datetime.now(UTC)
    authority = Authority.load_or_create(folder, (NAME,), now=now)
    tls = TlsContext()
    tls.renew(authority.issue(NAME, now=now))
    before = tls.current
    tls.renew(authority.issue(NAME, now=now))
    assert tls.current is not before
