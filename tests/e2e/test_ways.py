"""Ways in and out of a machine whose networks change or do not work; each scenario is played in a `World`."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography import x509

from tests.e2e.test_bounds import flood
from tests.e2e.test_gate import handshake
from tests.support.origin import REGISTRY_HOST
from tests.support.world import CACHE, CDN, CLIENT, OTHER, Missing, World, play

PORT = 8088
PROXY = f"regular@0.0.0.0:{PORT}"
NEW, NEW_CACHE, NEW_CLIENT = "203.0.113.0/24", "203.0.113.1", "203.0.113.2"
SHARED_CLIENT = "100.64.7.2"
SILENT = "8.8.8.8"
"""A public address at which nobody answers."""
SILENT_IPV6 = "2606:4700::6810:1"


def run(world: World, machine: str, line: str) -> None:
    """A command on a machine."""
    with world.at(machine):  # type: ignore[arg-type]
        done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"this system does not let us: {line}: {done.stderr.strip()}")


def connected(authority: str, source: str = CLIENT, cache: str = CACHE) -> tuple[socket.socket, bytes]:
    """A connection to the proxy, and what it says to a CONNECT; b"" where it says nothing."""
    sock = socket.create_connection((cache, PORT), timeout=20, source_address=(source, 0))
    said = b""
    with contextlib.suppress(ConnectionError):
        sock.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        said = sock.recv(4096)
    return sock, said


def is_admitted(source: str, cache: str = CACHE) -> bool:
    sock, said = connected(f"{REGISTRY_HOST}:443", source, cache)
    sock.close()
    return said.startswith(b"HTTP/1.1 200")


def unread(world: World) -> None:
    with world.cache(PROXY, hosts={"other.example": CDN}) as proxy:
        sock, said = connected("other.example:443")
        assert said.startswith(b"HTTP/1.1 200")
        theirs = x509.load_pem_x509_certificate(world.origin.ca_file.read_bytes())
        assert handshake(sock, "localhost").issuer == theirs.subject, proxy.dump()


def test_other_hosts_are_tunnelled_unread(tmp_path: Path) -> None:
    """A host that is not ours shows its own certificate through the proxy: nothing was decrypted."""
    play(unread, tmp_path)


def networks(world: World) -> None:
    run(world, "client", f"ip addr add {NEW_CLIENT}/24 dev eth0")
    run(world, "client", f"ip addr add {SHARED_CLIENT}/32 dev eth0")
    with world.cache(PROXY, ollama_cache_clients="local") as proxy:
        run(world, "cache", f"ip route add {SHARED_CLIENT}/32 dev lan")
        assert is_admitted(CLIENT)
        assert not is_admitted(SHARED_CLIENT)
        proxy.wait_for_line("to admit them add 100.64.0.0/10")

        run(world, "cache", f"ip addr add {NEW_CACHE}/24 dev lan")
        deadline = time.monotonic() + 3
        while not is_admitted(NEW_CLIENT, NEW_CACHE):
            assert time.monotonic() < deadline, proxy.dump()
        assert is_admitted(NEW_CLIENT)

        run(world, "cache", f"ip addr del {NEW_CACHE}/24 dev lan")
        run(world, "cache", f"ip route add {NEW} dev lan")
        deadline = time.monotonic() + 12
        while is_admitted(NEW_CLIENT):
            assert time.monotonic() < deadline, proxy.dump()
            time.sleep(0.2)
        proxy.wait_for_line(f"refused client {NEW_CLIENT}: not in ollama_cache_clients")
        assert is_admitted(CLIENT)


@pytest.mark.long
def test_networks_come_and_go(tmp_path: Path) -> None:
    """Clients of a network that is new are served within seconds, those of one that is gone are not any more."""
    play(networks, tmp_path)


@contextlib.contextmanager
def greeting(world: World) -> Iterator[None]:
    """A server at the public address OTHER, port 443, that says `hi` to whoever has sent something."""
    with world.at("internet"):
        listener = socket.create_server((OTHER, 443))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                if sock.recv(100):
                    sock.sendall(b"hi")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def black_hole(world: World) -> None:
    run(world, "cache", "ip addr add 2001:470:1::1/64 dev wan nodad")
    run(world, "cache", "ip -6 route add default via 2001:470:1::2 dev wan")
    run(world, "internet", "ip addr add 2001:470:1::2/64 dev eth0 nodad")
    # Two addresses of one name; the IPv6 one is preferred, and leads nowhere.
    names = {"other.example": f"{SILENT_IPV6} other.example\n{OTHER}"}
    with greeting(world), world.cache(PROXY, hosts=names) as proxy:
        for limit_s in (1.0, 0.5):
            sock, said = connected("other.example:443")
            assert said.startswith(b"HTTP/1.1 200")
            with closing(sock):
                began = time.monotonic()
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hi", proxy.dump()
                assert time.monotonic() - began < limit_s, "expected the second address within a second"


def test_an_ipv6_that_leads_nowhere(tmp_path: Path) -> None:
    """A tunnel is led to the address that answers, and the next one at once."""
    play(black_hole, tmp_path)


def waiting_tunnel(world: World) -> None:
    with world.cache(PROXY) as proxy:
        before = proxy.rss_mib()
        sock, said = connected(f"{SILENT}:443")
        assert said.startswith(b"HTTP/1.1 200")
        with closing(sock):
            assert flood(sock)
        assert proxy.rss_mib() - before < 20


def test_a_flood_into_a_tunnel_that_waits(tmp_path: Path) -> None:
    """What is sent into a tunnel before its other end answers waits where it is."""
    play(waiting_tunnel, tmp_path)
