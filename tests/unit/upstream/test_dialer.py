"""dialer: who is connected to, and who is not; against servers on loopback with certificates of every kind."""

import contextlib
import datetime
import errno
import ipaddress
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.errors import AddressRefused, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from pullthrough.net.address_policy import AddressPolicy
from pullthrough.net.proxy_env import ParentProxies, Proxy
from pullthrough.upstream import dialer as module
from pullthrough.upstream.dialer import Caller, Dialed, Dialer
from pullthrough.upstream.resolver import AddressRules, Named

NOW: Final = datetime.datetime.now(datetime.UTC)
DAY: Final = datetime.timedelta(days=1)
WAIT_S: Final = 20.0
GREETING: Final = b"hello"


# --- certificates


class Authority:
    """A certificate authority of the tests' own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key, NOW + 30 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        subject_key = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = builder.add_extension(subject_key, critical=False)
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        self.certificate = builder.sign(self._key, hashes.SHA256())
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, until: datetime.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 10 * DAY)
            .not_valid_after(until)
        )

    def context(self, host: str, *, until: datetime.datetime = NOW + DAY) -> ssl.SSLContext:
        """What a server needs to be `host`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name: x509.GeneralName = x509.DNSName(host)
        with contextlib.suppress(ValueError):
            name = x509.IPAddress(ipaddress.ip_address(host))
        certificate = (
            self._builder(x509.Name([]), key, until)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        file = self._folder / f"{certificate.serial_number}.pem"
        file.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "trusted")


# --- servers


class Server:
    """Accepts connections, each served by a thread; `port` is where."""

    def __init__(self, serve: Callable[[socket.socket], None], host: str = "127.0.0.1") -> None:
        self._listening = socket.create_server((host, 0))
        self.port = self._listening.getsockname()[1]
        self.accepted = 0
        self._serve = serve
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            thread = threading.Thread(target=self._run, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(WAIT_S)
            self._serve(sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(serve: Callable[[socket.socket], None], **options: Any) -> Server:
            server = Server(serve, **options)
            stack.callback(server.close)
            return server

        yield make


def echo(sock: Any) -> None:
    """Greet, then say what was said."""
    sock.sendall(GREETING)
    while data := sock.recv(65536):
        sock.sendall(data)


def tls(context: ssl.SSLContext, serve: Callable[[Any], None] = echo) -> Callable[[socket.socket], None]:
    def run(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as encrypted:
            serve(encrypted)

    return run


def proxied(port: int, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n", seen: list[bytes] | None = None) -> Any:
    """A parent proxy that leads everybody to `port` of this machine."""

    def run(sock: Any) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(4096)
        if seen is not None:
            seen.append(head)
        sock.sendall(answer)
        if not answer.startswith(b"HTTP/1.1 200"):
            return
        with socket.create_connection(("127.0.0.1", port)) as onward, selectors.DefaultSelector() as selector:
            selector.register(onward, selectors.EVENT_READ, sock)
            selector.register(sock, selectors.EVENT_READ, onward)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                    if not data:
                        return
                    key.data.sendall(data)

    return run


# --- what is tested


def dialer_of(authority: Authority, *allowed: tuple[str, int], parents: ParentProxies | None = None) -> Dialer:
    """One that may connect to these (host, port) whatever their addresses are."""
    policy = AddressPolicy(frozenset(allowed), tunnels=True)
    rules = AddressRules(policy, (), frozenset, frozenset, Named(set()))
    context = ssl.create_default_context(cafile=str(authority.file))
    return Dialer(context, rules, parents or ParentProxies(), LoopGuard("ollama-cache-test"))


def converse(line: Dialed) -> None:
    """A megabyte there and back."""
    with contextlib.closing(line):
        got = b""
        while len(got) < len(GREETING):
            got += line.read()
        assert got == GREETING
        data = bytes(range(256)) * 256
        for _ in range(16):
            line.write(data)
            got = b""
            while len(got) < len(data):
                got += line.read()
            assert got == data


def test_plain(start: Start, authority: Authority) -> None:
    """HTTP without TLS is for who configured it."""
    server = start(echo)
    converse(dialer_of(authority, ("localhost", server.port)).dial(Endpoint("http", "localhost", server.port)))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_right_certificate(start: Start, authority: Authority, host: str) -> None:
    """A name, or an address where the certificate has that."""
    server = start(tls(authority.context(host)))
    converse(dialer_of(authority, (host, server.port)).dial(Endpoint("https", host, server.port)))


def refused_by(server: Server, dialer: Dialer, reason: str, host: str = "localhost") -> None:
    with pytest.raises(UpstreamUnreachable, match=rf"^{host}:{server.port}: .*{reason}"):
        dialer.dial(Endpoint("https", host, server.port))


def test_a_wrong_name_is_refused(start: Start, authority: Authority) -> None:
    """However sound the chain is."""
    server = start(tls(authority.context("elsewhere.example")))
    refused_by(server, dialer_of(authority, ("localhost", server.port)), "Hostname mismatch")


def test_a_wrong_address_is_refused(start: Start, authority: Authority) -> None:
    """The certificate's name is not asked for where the address was."""
    server = start(tls(authority.context("localhost")))
    refused_by(server, dialer_of(authority, ("127.0.0.1", server.port)), "IP address mismatch", "127.0.0.1")


def test_an_expired_certificate_is_refused(start: Start, authority: Authority) -> None:
    """It ended yesterday."""
    server = start(tls(authority.context("localhost", until=NOW - DAY)))
    refused_by(server, dialer_of(authority, ("localhost", server.port)), "expired")


def test_an_untrusted_certificate_is_refused(start: Start, authority: Authority, tmp_path: Path) -> None:
    """Right in everything but who says so."""
    server = start(tls(Authority(tmp_path, "stranger").context("localhost")))
    refused_by(server, dialer_of(authority, ("localhost", server.port)), "unable to get local issuer")


def test_what_is_no_tls_is_refused(start: Start, authority: Authority) -> None:
    """Nothing of what it said is quoted."""
    server = start(lambda sock: sock.sendall(b"HTTP/1.1 200 secret\r\n\r\n"))
    with pytest.raises(UpstreamUnreachable) as caught:
        dialer_of(authority, ("localhost", server.port)).dial(Endpoint("https", "localhost", server.port))
    assert "secret" not in str(caught.value)


# --- addresses


def test_private_addresses_are_refused(start: Start, authority: Authority) -> None:
    """Nobody is connected to before that is known."""
    server = start(echo)
    with pytest.raises(AddressRefused):
        dialer_of(authority).dial(Endpoint("https", "localhost", server.port))
    assert server.accepted == 0


def test_names_that_lead_nowhere(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the name and the reason."""
    problem = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(problem))
    with pytest.raises(UpstreamUnreachable, match=r"^a\.example: name resolution failed: .*Name or service not known"):
        dialer_of(authority).dial(Endpoint("https", "a.example", 443))


def found_at(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Let every name have these addresses."""
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)


def test_the_next_address_after_a_refusal(start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: nothing is gained by waiting."""
    server = start(tls(authority.context("a.example")))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setattr(module, "DELAY_S", 30.0)
    found_at(monkeypatch, ("127.0.0.1", port), ("127.0.0.1", server.port))
    began = time.monotonic()
    converse(dialer_of(authority, ("a.example", 443)).dial(Endpoint("https", "a.example", 443)))
    assert time.monotonic() - began < module.DELAY_S


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port of this machine where connections are neither accepted nor refused: its queue is full."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            assert sock.connect_ex(listening.getsockname()) in (0, errno.EINPROGRESS)
        yield listening.getsockname()[1]


def test_the_next_address_after_a_second(start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one is still given its chance."""
    server = start(tls(authority.context("a.example")))
    with deaf() as port:
        found_at(monkeypatch, ("127.0.0.1", port), ("127.0.0.1", server.port))
        began = time.monotonic()
        converse(dialer_of(authority, ("a.example", 443)).dial(Endpoint("https", "a.example", 443)))
        assert time.monotonic() - began >= module.DELAY_S


def test_no_address_answers(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is for all of them together."""
    monkeypatch.setattr(module, "CONNECT_S", 0.5)
    with deaf() as port:
        found_at(monkeypatch, *[("127.0.0.1", port)] * 3)
        with pytest.raises(UpstreamUnreachable, match="no connection in time"):
            dialer_of(authority, ("a.example", 443)).dial(Endpoint("https", "a.example", 443))


def test_families_take_turns(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose IPv6 leads nowhere costs one delay, not one for each of its addresses."""
    tried: list[str] = []

    def refuse(_: socket.socket, address: tuple[str, int]) -> int:
        tried.append(address[0])
        return errno.ECONNREFUSED

    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    families = {"::1": socket.AF_INET6, "::2": socket.AF_INET6, "127.0.0.1": socket.AF_INET}
    entries = [(family, socket.SOCK_STREAM, 6, "", (address, 443)) for address, family in families.items()]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(UpstreamUnreachable, match="Connection refused"):
        dialer_of(authority, ("a.example", 443)).dial(Endpoint("https", "a.example", 443))
    assert tried == ["::1", "127.0.0.1", "::2"]


# --- parents


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_through_a_parent(start: Start, authority: Authority, scheme: str) -> None:
    """TLS is with the server, within the parent's own where it has one; the parent learns the name alone."""
    server = start(tls(authority.context("far.example")))
    seen: list[bytes] = []
    serve = proxied(server.port, seen=seen)
    parent = start(tls(authority.context("localhost"), serve) if scheme == "https" else serve)
    proxy = Proxy(scheme, "localhost", parent.port, "Basic c2VjcmV0")
    dialer = dialer_of(authority, (proxy.host, proxy.port), parents=ParentProxies(https=proxy))
    line = dialer.dial(Endpoint("https", "far.example", 443))
    assert line.proxy is None
    converse(line)
    (head,) = seen
    assert head.startswith(b"CONNECT far.example:443 HTTP/1.1\r\n")
    assert b"roxy-Authorization: Basic c2VjcmV0" in head
    assert b"CDN-Loop: ollama-cache-test" in head


def test_the_server_behind_a_parent_is_verified(start: Start, authority: Authority) -> None:
    """The parent is no part of the chain of trust."""
    server = start(tls(authority.context("elsewhere.example")))
    parent = start(proxied(server.port))
    proxy = Proxy("http", "localhost", parent.port)
    dialer = dialer_of(authority, ("localhost", parent.port), parents=ParentProxies(https=proxy))
    with pytest.raises(UpstreamUnreachable, match=r"^far\.example:443: .*Hostname mismatch"):
        dialer.dial(Endpoint("https", "far.example", 443))


def test_a_parent_that_says_no(start: Start, authority: Authority) -> None:
    """Its status is told, and that it was the parent."""
    parent = start(proxied(0, b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"))
    proxy = Proxy("http", "localhost", parent.port)
    dialer = dialer_of(authority, ("localhost", parent.port), parents=ParentProxies(https=proxy))
    with pytest.raises(UpstreamUnreachable, match=r"parent proxy http://localhost:\d+ answered 407"):
        dialer.dial(Endpoint("https", "far.example", 443))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_parent_that_is_down(authority: Authority, scheme: str) -> None:
    """The error is about the parent, not about the server behind it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = Proxy("http", "localhost", unused.getsockname()[1])
    dialer = dialer_of(authority, ("localhost", proxy.port), parents=ParentProxies(http=proxy, https=proxy))
    with pytest.raises(UpstreamUnreachable, match=r"^parent proxy localhost:\d+: Connection refused$"):
        dialer.dial(Endpoint(scheme, "far.example", 443))


def test_a_plain_target_is_left_to_the_parent(start: Start, authority: Authority) -> None:
    """It is to be asked in absolute form."""
    parent = start(echo)
    proxy = Proxy("http", "localhost", parent.port)
    dialer = dialer_of(authority, ("localhost", parent.port), parents=ParentProxies(http=proxy))
    line = dialer.dial(Endpoint("http", "far.example", 80))
    assert line.proxy == proxy
    converse(line)


def test_tls_records_are_read_together(start: Start, authority: Authority) -> None:
    """OpenSSL gives one record a call: what has come is one piece for who reads, and so is one write to the disk."""
    data, sent, read = bytes(range(256)) * 64, threading.Event(), threading.Event()

    def serve(sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), 4096):
            sock.sendall(data[start : start + 4096])
        sent.set()
        read.wait(WAIT_S)

    server = start(tls(authority.context("localhost"), serve))
    endpoint = Endpoint("https", "localhost", server.port)
    with contextlib.closing(dialer_of(authority, ("localhost", server.port)).dial(endpoint)) as line:
        assert sent.wait(WAIT_S)
        assert line.wait(WAIT_S)
        buffer = memoryview(bytearray(1 << 20))
        assert line.take(buffer) == len(data)
        assert buffer[: len(data)] == data
        read.set()
        assert line.read() == b""


def test_tls_records_before_a_failure_are_not_lost(start: Start, authority: Authority) -> None:
    """What came whole is handed out, and the failure comes with the next read."""

    def serve(sock: Any) -> None:
        sock.sendall(GREETING)
        # A record of application data that nobody has sealed.
        socket.socket.sendall(sock, b"\x17\x03\x03\x00\x20" + bytes(32))
        sock.recv(1)

    server = start(tls(authority.context("localhost"), serve))
    endpoint = Endpoint("https", "localhost", server.port)
    with contextlib.closing(dialer_of(authority, ("localhost", server.port)).dial(endpoint)) as line:
        assert line.read() == GREETING
        with pytest.raises(UpstreamUnreachable):
            line.read()


# --- silence, and callers that go


def test_silence(start: Start, authority: Authority) -> None:
    """A server that says nothing is not waited for longer than the caller wants."""
    done = threading.Event()
    server = start(lambda _: done.wait(WAIT_S) or None)
    with contextlib.closing(
        dialer_of(authority, ("localhost", server.port)).dial(Endpoint("http", "localhost", server.port))
    ) as line:
        assert line.take(memoryview(bytearray(1))) is None
        assert not line.wait(0.01)
        assert line.is_idle
        with pytest.raises(TimeoutError):
            line.read_into(memoryview(bytearray(1)), 0.01)
        done.set()
        assert line.read() == b""
        assert not line.is_idle


def test_a_handshake_that_does_not_come(start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own time."""
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    done = threading.Event()
    server = start(lambda _: done.wait(WAIT_S) or None)
    with pytest.raises(UpstreamTimeout, match=f"^localhost:{server.port}: no answer in time"):
        dialer_of(authority, ("localhost", server.port)).dial(Endpoint("https", "localhost", server.port))
    done.set()


@pytest.mark.parametrize("stage", ["connecting", "handshake", "reading"])
def test_a_caller_that_goes_is_freed(start: Start, authority: Authority, stage: str) -> None:
    """Wherever its thread is blocked."""
    caller, problems, done = Caller(), list[UpstreamError](), threading.Event()
    reached = threading.Event()

    def serve(sock: socket.socket) -> None:
        reached.set()
        done.wait(WAIT_S)

    server = start(serve)
    with deaf() as port:
        port = port if stage == "connecting" else server.port
        dialer = dialer_of(authority, ("localhost", port))

        def run() -> None:
            try:
                line = dialer.dial(Endpoint("https" if stage == "handshake" else "http", "localhost", port), caller)
                with contextlib.closing(line):
                    assert line.read() == b""
                    caller.check()
            except UpstreamError as error:
                problems.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        if stage != "connecting":
            assert reached.wait(WAIT_S)
        caller.stop()
        thread.join(module.CONNECT_S / 2)
        assert not thread.is_alive()
    assert len(problems) == 1
    done.set()


def test_a_caller_that_has_gone_gets_no_connection(start: Start, authority: Authority) -> None:
    """Though there would be one."""
    server = start(echo)
    caller = Caller()
    caller.stop()
    with pytest.raises(UpstreamUnreachable, match="nobody wants it any more"):
        dialer_of(authority, ("localhost", server.port)).dial(Endpoint("http", "localhost", server.port), caller)
