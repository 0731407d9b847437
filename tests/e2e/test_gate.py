"""Who gets in, what is intercepted, and where the proxy connects to."""

import re
import socket
import ssl
from collections.abc import Callable
from contextlib import closing

import pytest
from cryptography import x509

from tests.e2e.conftest import REGISTRY, get, to_registry
from tests.support.http1 import ClosedBeforeResponse, ConnectRefused, connect
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import Proxy


def tunnel(proxy: Proxy, authority: str) -> socket.socket:
    """The raw socket behind a CONNECT that was granted."""
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    sock.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
    head = sock.recv(4096)
    assert head.startswith(b"HTTP/1.1 200"), head
    return sock


def handshake(sock: socket.socket, name: str) -> x509.Certificate:
    """The certificate that the other side shows for `name`, unverified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(sock, server_hostname=name) as wrapped:
        certificate = wrapped.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate)


def test_intercepted_hosts_show_our_leaf(proxy: Proxy) -> None:
    """The registry and the blob host verify against our CA alone, with HTTP/1.1 selected."""
    for host in (REGISTRY, R2_HOST):
        with connect(proxy.url, host, 443, proxy.ca_file) as connection:
            leaf = x509.load_der_x509_certificate(connection.peer_certificate)
            assert connection.alpn in (None, "http/1.1")
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [host]


def ask(sock: socket.socket, method: str, target: str, host: str) -> bytes:
    """The status line of the answer to a request without a body; the answer must be a small one."""
    sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
    length = int((re.search(rb"(?i)content-length: (\d+)", head) or [b"", b"0"])[1])
    while len(body) < length and (more := sock.recv(65536)):
        body += more
    return head.partition(b"\r\n")[0]


@pytest.mark.parametrize("method", ["CONNECT", "GET", "DELETE"])
def test_what_upstream_names_is_for_the_cache(origin: Origin, proxy: Proxy, method: str) -> None:
    """Clients reach the place of a registry by the registry's name only, whatever they have asked for before."""
    there = f"localhost:{origin.registry_port}"
    model = f"http://{REGISTRY}/v2/library/x/manifests/latest"
    for before in ((), ("DELETE",)):
        with closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=20)) as sock:
            for other in before:
                assert ask(sock, other, model, REGISTRY).startswith(b"HTTP/1.1 404")
            counted = len(origin.counters.requests)
            status = ask(sock, method, there if method == "CONNECT" else f"http://{there}/v2/", there)
            assert status.startswith(b"HTTP/1.1 403" if method == "CONNECT" else b"HTTP/1.1 502")
        assert len(origin.counters.requests) == counted
        proxy.wait_for_line("refused" if method == "CONNECT" else "is for the cache's own requests")
        proxy.forget_lines()


def test_an_unlisted_name_fails_closed(proxy: Proxy) -> None:
    """A connection to our host that asks for another name in SNI gets no certificate our CA has signed."""
    with closing(tunnel(proxy, f"{REGISTRY}:443")) as sock:
        certificate = handshake(sock, "ollama.com")
    ours = x509.load_pem_x509_certificate(proxy.ca_file.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert certificate.issuer != ours.subject or names.get_values_for_type(x509.DNSName) == [REGISTRY]


@pytest.mark.parametrize(
    "authority",
    ["127.0.0.1:443", "localhost:443", "[::1]:443", "10.0.0.1:443", "169.254.169.254:443", "[::ffff:127.0.0.1]:443"],
)
def test_no_door_into_the_network(proxy: Proxy, authority: str) -> None:
    """A tunnel to an address that is not public ends without a byte."""
    sock = tunnel(proxy, authority)
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert sock.recv(100) == b""
    sock.close()
    proxy.wait_for_line("refused connection")


@pytest.mark.parametrize("authority", ["example.com:22", "example.com:80", f"{REGISTRY}:8443", "1.1.1.1:25"])
def test_tunnels_lead_to_443_only(proxy: Proxy, authority: str) -> None:
    """CONNECT to another port is refused at once."""
    host, _, port = authority.rpartition(":")
    with pytest.raises(ConnectRefused, match="403"):
        connect(proxy.url, host, int(port), proxy.ca_file)


def test_a_name_that_does_not_resolve(proxy: Proxy) -> None:
    """The system's words, to the log, without its number."""
    with socket.create_connection(("127.0.0.1", proxy.port), 20) as sock:
        sock.sendall(b"GET http://absent.invalid/ HTTP/1.1\r\nHost: absent.invalid\r\n\r\n")
        assert b" 502 " in sock.recv(64)
    assert "Errno" not in proxy.wait_for_line("refused connection to absent.invalid: ")


def test_tunnels_can_be_switched_off(start_proxy: Callable[..., Proxy]) -> None:
    """With tunnel=none only the intercepted hosts are served."""
    proxy = start_proxy(ollama_cache_tunnel="none")
    with pytest.raises(ConnectRefused, match="403"):
        connect(proxy.url, "example.com", 443, proxy.ca_file)
    with to_registry(proxy) as connection:
        assert get(connection, "/v2/library/absent/manifests/latest")[0] == 404


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/"]
)
def test_plain_requests_are_judged_too(proxy: Proxy, target: str) -> None:
    """An absolute-form request is no way round."""
    host = target.split("/")[2]
    with connect(proxy.url, host, 80, None) as connection:
        response = connection.request("GET", target.partition(host)[2], [("Host", host)])
        assert response.status == 502
        response.read()
    proxy.wait_for_line("refused connection")


def test_names_must_agree(origin: Origin, proxy: Proxy) -> None:
    """CONNECT to the registry with another Host inside is 421, and nothing goes upstream."""
    with to_registry(proxy) as connection:
        response = connection.request("GET", "/v2/library/x/manifests/latest", [("Host", R2_HOST)])
        assert response.status == 421
        response.read()
    with connect(proxy.url, REGISTRY, 80, None) as connection:
        response = connection.request("GET", "/v2/library/x/manifests/latest", [("Host", "example.com")])
        assert response.status == 421
        response.read()
    assert not origin.counters.requests


def test_clients_outside_the_list_are_not_served(start_proxy: Callable[..., Proxy]) -> None:
    """`clients` admits whom it names."""
    proxy = start_proxy(ollama_cache_clients="192.0.2.0/24")
    with pytest.raises((ClosedBeforeResponse, ConnectionError)):
        connect(proxy.url, REGISTRY, 443, proxy.ca_file)
    proxy.wait_for_line("refused client 127.0.0.1")


def test_tls_to_the_proxy_itself(proxy: Proxy) -> None:
    """A client with HTTPS_PROXY=https://… gets no handshake, and the log says what to write."""
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    with closing(sock), pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(sock, "cache.lan")
    proxy.wait_for_line("refused client 127.0.0.1: it speaks TLS to the proxy: HTTPS_PROXY begins with http:// here")


def test_a_client_without_the_ca_is_named(origin: Origin, proxy: Proxy) -> None:
    """The log says which client does not trust the CA."""
    with pytest.raises(ssl.SSLError):
        connect(proxy.url, REGISTRY, 443, origin.ca_file)
    proxy.wait_for_line("does it trust the CA?")
