"""Connections that are served from threads: how they are taken, kept, refused and ended, and those that are not."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, add_model, canonical, get, to_cdn, unique
from tests.e2e.test_gate import tunnel
from tests.support.http1 import connect
from tests.support.origin import R2_HOST, Fault, Mode, Origin
from tests.support.proxy import ADDON, PROGRAM, Proxy

CONNECT = f"CONNECT {R2_HOST}:443 HTTP/1.1\r\nHost: {R2_HOST}:443\r\n\r\n".encode()


def trusting(proxy: Proxy) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=proxy.ca_file)


def ask(target: str, *fields: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {R2_HOST}", *fields, "\r\n"]).encode()


def receive(sock: socket.socket, size: int) -> tuple[bytes, bytes]:
    """(head, body) of a response with a body of `size` bytes."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < size:
        more = sock.recv(65536)
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("newline", [b"", b"\r\n"], ids=["", "behind a newline"])
def test_a_hello_right_behind_connect(origin: Origin, proxy: Proxy, newline: bytes) -> None:
    """A client that does not wait for the answer to its CONNECT is served as any other."""
    blob = unique(3 * MB)
    address = canonical(proxy, add_model(origin, blob))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(proxy).wrap_bio(incoming, outgoing, server_hostname=R2_HOST)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with socket.create_connection(("127.0.0.1", proxy.port), 20) as sock:
        sock.sendall(CONNECT + newline + outgoing.read())

        def step(once: Callable[[], bytes | int | None]) -> bytes:
            while True:
                try:
                    result = once()
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
                else:
                    sock.sendall(outgoing.read())
                    return result if isinstance(result, bytes) else b""

        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert head == b"HTTP/1.1 200 Connection established\r\n\r\n"
        step(tls.do_handshake)
        for _ in range(2):
            step(lambda: tls.write(ask(address)))
            data = b""
            while len(data.partition(b"\r\n\r\n")[2]) < 3 * MB:
                data += step(lambda: tls.read(65536))
            assert data.partition(b"\r\n\r\n")[2] == blob.read(0, 3 * MB)


def test_a_plain_request_for_bytes(origin: Origin, proxy: Proxy) -> None:
    """By http:// through the proxy the bytes come from mitmproxy, which has them from our own listener: the same."""
    blob = unique(5 * MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    for _ in ("cold", "warm"):
        with connect(proxy.url, R2_HOST, 80, None) as connection:
            status, headers, body = get(connection, address, Range="bytes=1000-2000999")
            assert (status, body) == (206, blob.read(1000, 2_001_000))
            assert headers["content-range"] == f"bytes 1000-2000999/{5 * MB}"
            assert {"server", "date"}.isdisjoint(headers)
            assert get(connection, address)[2] == blob.read(0, 5 * MB)
        proxy.wait_for_line("-> 206, 2000000 bytes")
        proxy.wait_for_line(model.recorded)
    assert any("127.0.0.1 GET /ollama/" in line for line in proxy.output)


def test_a_short_body_by_plain_http(origin: Origin, proxy: Proxy) -> None:
    """What breaks off breaks off there too, without another byte."""
    blob = unique(5 * MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    origin.faults.append(Fault(Mode.CONTENT_RANGE, digest=model.layer, times=None))
    with connect(proxy.url, R2_HOST, 80, None) as connection:
        response = connection.request("GET", address, [])
        body = response.read()
    assert (response.status, response.content_length) == (200, 5 * MB)
    assert len(body) < 5 * MB
    assert body == blob.read(0, len(body))


def test_nobody_else_reaches_the_private_listener(origin: Origin, proxy: Proxy) -> None:
    """Its port is one that no client is led to, by name or address."""
    address = canonical(proxy, add_model(origin, unique(10)))
    with connect(proxy.url, R2_HOST, 80, None) as connection:
        get(connection, address)
    ports = {
        int(line.split()[1].rpartition(":")[2], 16)
        for line in Path(f"/proc/{proxy.pid}/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].startswith("0100007F")
    }
    assert ports
    for port in ports:
        with connect(proxy.url, "127.0.0.1", port, None) as connection:
            response = connection.request("GET", "/", [("Host", f"127.0.0.1:{port}")])
            # At the proxy's own it is told what that is.
            assert response.status == (421 if port == proxy.port else 502)
            response.read()


def test_the_idle_are_served_again(origin: Origin, proxy: Proxy) -> None:
    """A client that says nothing for longer than its thread waits."""
    blob = unique(MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        assert get(connection, address)[2] == blob.read(0, MB)
        proxy.wait_for_line(model.recorded)
        for _ in range(2):
            assert get(connection, address)[2] == blob.read(0, MB)
            serving, deadline = threads(proxy), time.monotonic() + 20
            while threads(proxy) >= serving:
                assert time.monotonic() < deadline, "expected the thread to be given back"
                time.sleep(0.05)
        assert connection.is_reusable


def threads(proxy: Proxy) -> int:
    """How many threads the process has."""
    return len(list(Path(f"/proc/{proxy.pid}/task").iterdir()))


def test_pipelined_requests(origin: Origin, proxy: Proxy) -> None:
    """Two heads in one segment are answered one after the other."""
    blob = unique(1000)
    address = canonical(proxy, add_model(origin, blob))
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(ask(address, "Range: bytes=0-9") + ask(address, "Range: bytes=10-19", "Connection: close"))
        data = b""
        while more := sock.recv(65536):
            data += more
    assert data.count(b"HTTP/1.1 206") == 2
    assert blob.read(0, 10) in data and blob.read(10, 20) in data


@pytest.mark.parametrize(
    "fields", [("Host", "registry.ollama.ai"), ("Host", "another.example"), (":target", "https://another.example/x")]
)
def test_names_must_agree(origin: Origin, proxy: Proxy, fields: tuple[str, str]) -> None:
    """421, and nothing goes upstream."""
    host, target = (fields[1], "/x") if fields[0] == "Host" else (R2_HOST, fields[1])
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 421")
    assert not origin.counters.requests


def test_another_sni(origin: Origin, proxy: Proxy) -> None:
    """A name in SNI that is not the blob host's is 421 for who takes our certificate all the same."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname="another.example") as sock:
        sock.sendall(ask("/x"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 421")


def test_what_is_no_http(origin: Origin, proxy: Proxy) -> None:
    """A head that is none, and one without an end, are refused."""
    for data, status in ((b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, b"431")):
        with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
            sock.sendall(data)
            assert sock.recv(65536).startswith(b"HTTP/1.1 " + status)


def test_sessions_are_resumed(origin: Origin, proxy: Proxy) -> None:
    """A second connection with the first one's ticket does without another certificate."""
    context = trusting(proxy)
    address = canonical(proxy, add_model(origin, unique(10)))
    with context.wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(ask(address))
        receive(sock, 10)
        session = sock.session
    with context.wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST, session=session) as sock:
        assert sock.session_reused


def test_old_tls_is_not_spoken(proxy: Proxy) -> None:
    """TLS 1.1 and older are refused."""
    context = trusting(proxy)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        context.wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST)


def test_who_does_not_trust_the_ca_is_named(origin: Origin, proxy: Proxy) -> None:
    """As for the registry."""
    with pytest.raises(ssl.SSLError):
        connect(proxy.url, R2_HOST, 443, origin.ca_file)
    proxy.wait_for_line(f"did not accept our certificate for {R2_HOST}")


def test_an_upload_that_waits_for_100(origin: Origin, proxy: Proxy) -> None:
    """Expect is answered here, and the body goes on as it comes."""
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(
            f"PUT /upload/1 HTTP/1.1\r\nHost: {R2_HOST}\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"0123456789")
        # Unsigned as it is.
        assert sock.recv(65536).startswith(b"HTTP/1.1 403 ")
    assert "expect" not in origin.counters.requests[-1].headers


def put(target: str, size: int) -> bytes:
    return f"PUT {target} HTTP/1.1\r\nHost: {R2_HOST}\r\nContent-Length: {size}\r\n\r\n".encode()


def test_an_upload_beside_session_tickets(origin: Origin, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TLS sends of its own accord is no answer: the whole body goes up."""
    monkeypatch.setattr(origin._context, "num_tickets", 2)
    target = origin.signed_url(origin.add_blob(unique(MB)), "PUT").removeprefix(f"https://{R2_HOST}")
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(put(target, MB))
        for _ in range(10):
            sock.sendall(bytes(MB // 10))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "head",
    [
        f"GET HTTP://{R2_HOST}/?X-Amz-Signature=hunter2 HTTP/1.1\r\nHost: {R2_HOST}",
        "HEAD /?X-Amz-Signature=hunter2 HTTP/1.1\r\nHost: other.example",
        f"GET /?X-Amz-Signature=hunter2 b HTTP/1.1\r\nHost: {R2_HOST}",
        f"GET / HTTP/1.1\r\nHost: {R2_HOST}\r\nAuthorization: Bearer hunter2\x00",
        f"HEAD / HTTP/1.1\r\nHost: {R2_HOST}\r\nTransfer-Encoding: chunked\r\n\r\nhunter2",
    ],
    ids=["another scheme", "another host", "a space", "a control character", "a bad chunk"],
)
def test_what_is_refused_is_not_quoted(proxy: Proxy, head: str) -> None:
    """The answer and the log say what was wrong with a request, without what may be secret of it."""
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(f"{head}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")) and b"hunter2" not in answer
    assert answer.endswith(b"\r\n\r\n") == head.startswith("HEAD")
    proxy.wait_for_line("expected ")
    assert not [line for line in proxy.output if "hunter2" in line or "Traceback" in line]


def test_an_address_in_absolute_form(origin: Origin, proxy: Proxy) -> None:
    """However its scheme is spelt (RFC 3986 section 3.1)."""
    blob = unique(3000)
    address = canonical(proxy, add_model(origin, blob))
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(ask(f"HTTPS://{R2_HOST}{address}"))
        assert receive(sock, 3000)[1] == blob.read(0, 3000)


def test_an_old_client_that_names_no_host(proxy: Proxy) -> None:
    """HTTP/1.0 needs no Host; the server behind does."""
    with trusting(proxy).wrap_socket(tunnel(proxy, f"{R2_HOST}:443"), server_hostname=R2_HOST) as sock:
        sock.sendall(b"GET /unknown HTTP/1.0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 40")


def test_a_client_that_waits_and_leaves(origin: Origin, proxy: Proxy) -> None:
    """It is noticed while no byte comes, and the others go on."""
    blob = unique(5 * MB)
    model = add_model(origin, blob)
    address = canonical(proxy, model)
    origin.faults.append(Fault(Mode.STALL, digest=model.layer, times=1, after=MB))
    connection = to_cdn(proxy)
    response = connection.request("GET", address, [])
    assert len(response.read(1000)) == 1000
    connection.close()
    proxy.wait_for_line("short: client disconnected")


def test_the_end_of_the_cache_is_not_held_up(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Clients that take nothing, that wait for bytes, and that are idle: all are let go at once."""
    proxy = start_proxy()
    blob = unique(60 * MB)
    address = canonical(proxy, add_model(origin, blob))
    clients = [to_cdn(proxy) for _ in range(8)]
    for connection in clients[:6]:
        assert len(connection.request("GET", address, []).read(1)) == 1
    began = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - began < 10
    for connection in clients:
        connection.close()


def test_many_at_once(origin: Origin, proxy: Proxy) -> None:
    """Two hundred connections in the same moment: all are answered, with the right bytes."""
    blob = unique(200 * 1000)
    address = canonical(proxy, add_model(origin, blob))
    go, wrong = threading.Event(), []

    def run(number: int) -> None:
        go.wait()
        try:
            with to_cdn(proxy) as connection:
                first = number * 1000
                body = get(connection, address, Range=f"bytes={first}-{first + 999}")[2]
                if body != blob.read(first, first + 1000):
                    wrong.append(f"{number}: other bytes")
        except Exception as error:
            wrong.append(f"{number}: {error!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_without_taking(
    origin: Origin, start_proxy: Callable[..., Proxy], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where a connection cannot be taken, the bytes leave through mitmproxy, and the log says so."""

    script = tmp_path_factory.mktemp("patched") / "patched.py"
    patch = "from mitmproxy.proxy import server\ndel server.SimpleConnectionHandler"
    script.write_text(f"{patch}\nimport sys\nsys.path.insert(0, {str(ADDON.parent)!r})\n{ADDON.read_text()}")
    proxy = start_proxy(program=(PROGRAM[0], "-s", script))
    proxy.wait_for_line("connections cannot be taken here")
    blob = unique(5 * MB)
    address = canonical(proxy, add_model(origin, blob))
    with to_cdn(proxy) as connection:
        for start in (0, 1_234_567):
            assert get(connection, address, Range=f"bytes={start}-")[::2] == (206, blob.read(start, 5 * MB))
        assert get(connection, address, Range=f"bytes={5 * MB}-")[0] == 416
        assert connection.request("HEAD", address, []).status == 200
        with closing(to_cdn(proxy)) as leaving:
            leaving.request("GET", address, [])
    proxy.wait_for_line("-> 206, 5000000 bytes")
