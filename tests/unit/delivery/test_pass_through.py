"""pass_through: a request that is not ours reaches its server as it was sent, and the answer comes back as it is."""

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import pytest

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.errors import LoopDetected, Offline, UpstreamUnreachable
from pullthrough.delivery import pass_through
from pullthrough.delivery.pass_through import PassThrough, PassThroughBroken, Way
from pullthrough.delivery.socket_polling import readable
from pullthrough.upstream.dialer import Dialed
from pullthrough.upstream.layers import Plain

HOST = "blobs.example"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Odd: Kept\r\n\r\nhi"


class Out:
    """A client's connection without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def readable(self, timeout_s: float) -> bool:
        return readable(self.sock, timeout_s)

    def read(self) -> bytes:
        return self.sock.recv(65536)

    def put(self, data: bytes) -> None:
        self.sock.sendall(data)


class Scene:
    """A client whose requests are passed through to a server that plays `parts`, one for each connection."""

    def __init__(self, *parts: Callable[[socket.socket], None]) -> None:
        self.client, ours = socket.socketpair()
        self.client.settimeout(10)
        self.parts, self.dialled, self.threads = list(parts), 0, list[threading.Thread]()
        self.ours, self.made = ours, list[PassThrough]()
        self.offline, self.endpoint = False, Endpoint("https", HOST, 443)

    def dial(self, _endpoint: Endpoint) -> Dialed:
        self.dialled += 1
        near, far = socket.socketpair()
        near.setblocking(False)
        far.settimeout(10)

        def play() -> None:
            with far:
                self.parts.pop(0)(far)

        self.threads.append(threading.Thread(target=play))
        self.threads[-1].start()
        return Dialed(near, Plain(near), None)

    def passing(self) -> PassThrough:
        way = Way(HOST, self.endpoint, self, LoopGuard("our-cache"), self.offline)  # type: ignore[arg-type]
        self.made.append(PassThrough(way, Out(self.ours)))  # type: ignore[arg-type]
        return self.made[-1]

    def exchange(self, passing: PassThrough, head: bytes, body: bytes = b"") -> int:
        """What BlobConnection does with a request that is not ours."""
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(head + body)
        request = connection.next_event()
        assert isinstance(request, h11.Request)
        return passing.exchange(connection, request)

    def close(self) -> None:
        for passing in self.made:
            passing.close()
        for sock in (self.client, self.ours):
            sock.close()
        for thread in self.threads:
            thread.join(10)


@pytest.fixture
def scene() -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(*parts: Callable[[socket.socket], None]) -> Scene:
        made.append(Scene(*parts))
        return made[-1]

    yield make
    for each in made:
        each.close()


def serve(answer: bytes, heads: list[bytes], *, times: int = 1, until: bytes = b"\r\n\r\n") -> Callable[[Any], None]:
    """Read what is sent up to `until`, and answer; then wait for the end."""

    def part(sock: socket.socket) -> None:
        for _ in range(times):
            read = b""
            while until not in read:
                data = sock.recv(65536)
                if not data:
                    return
                read += data
            heads.append(read)
            sock.sendall(answer)
        sock.recv(1)

    return part


GET = b"GET /x?y=1 HTTP/1.1\r\nHost: blobs.example\r\nX-Case: Kept\r\nProxy-Authorization: Basic c2VjcmV0\r\n\r\n"


def test_a_request_and_its_answer(scene: Callable[..., Scene]) -> None:
    """Fields as they were spelt, but for our mark and what was for the proxy; one connection for two requests."""
    heads: list[bytes] = []
    here = scene(serve(OK, heads, times=2))
    passing = here.passing()
    for _ in range(2):
        assert here.exchange(passing, GET) == 200
        assert here.client.recv(65536) == OK
    assert here.dialled == 1
    assert heads[0] == b"GET /x?y=1 HTTP/1.1\r\nHost: blobs.example\r\nX-Case: Kept\r\nCDN-Loop: our-cache\r\n\r\n"


def test_a_server_under_another_name(scene: Callable[..., Scene]) -> None:
    """Where `upstream` says that the host is elsewhere, Host is that place's."""
    heads: list[bytes] = []
    here = scene(serve(OK, heads))
    here.endpoint = Endpoint("http", "127.0.0.1", 8000)
    assert here.exchange(here.passing(), GET) == 200
    assert b"Host: 127.0.0.1:8000\r\n" in heads[0]


def test_a_body_comes_while_it_is_passed_on(scene: Callable[..., Scene]) -> None:
    """100 is said here, and what the client sends then follows the head."""
    heads: list[bytes] = []
    here = scene(serve(OK, heads, until=b"-end"))
    head = b"PUT /up HTTP/1.1\r\nHost: blobs.example\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"

    def send() -> None:
        assert here.client.recv(65536).startswith(b"HTTP/1.1 100 ")
        for piece in (b"begin", b"-end"):
            here.client.sendall(piece)

    sender = threading.Thread(target=send)
    sender.start()
    assert here.exchange(here.passing(), head) == 200
    sender.join(10)
    assert heads[0].endswith(b"\r\n\r\nbegin-end") and b"Expect" not in heads[0]


def test_an_answer_before_the_end_of_the_body(scene: Callable[..., Scene]) -> None:
    """It is passed back at once, and the connection to the server is not used again."""
    refused = b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    here = scene(serve(refused, []), serve(OK, []))
    passing = here.passing()
    head = b"PUT /up HTTP/1.1\r\nHost: blobs.example\r\nContent-Length: 1000000\r\n\r\n"
    assert here.exchange(passing, head, b"some") == 403
    assert here.client.recv(65536) == refused
    assert here.exchange(passing, GET) == 200
    assert here.dialled == 2


def test_a_connection_that_has_ended_meanwhile(scene: Callable[..., Scene]) -> None:
    """It is not used for the next request."""

    def ends(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(OK)

    here = scene(ends, serve(OK, []))
    passing = here.passing()
    assert here.exchange(passing, GET) == 200
    here.threads[0].join(10)
    assert here.exchange(passing, GET) == 200
    assert here.dialled == 2


def test_a_client_that_sends_no_more(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is given up after a while, or at once when it has gone."""
    monkeypatch.setattr(pass_through, "CLIENT_SILENT_S", 0.05)
    head = b"PUT /up HTTP/1.1\r\nHost: blobs.example\r\nContent-Length: 9\r\n\r\n"
    silent = scene(serve(OK, [], until=b"never"))
    with pytest.raises(UpstreamUnreachable, match="the client sent nothing more"):
        silent.exchange(silent.passing(), head, b"beg")
    gone = scene(serve(OK, [], until=b"never"))
    gone.client.close()
    with pytest.raises(h11.RemoteProtocolError):
        gone.exchange(gone.passing(), head, b"beg")


@pytest.mark.parametrize(
    ("answer", "raised", "sent"),
    [
        (b"", UpstreamUnreachable, b""),
        (b"no HTTP at all\r\n\r\n", UpstreamUnreachable, b""),
        (OK[:-1], PassThroughBroken, OK[:-1]),
    ],
    ids=["nothing", "no HTTP", "half"],
)
def test_a_server_that_breaks_off(
    scene: Callable[..., Scene], answer: bytes, raised: type[Exception], sent: bytes
) -> None:
    """Nothing is made up: without a head there is an error, behind one the body stays short."""

    def breaks(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(answer)

    here = scene(breaks)
    with pytest.raises(raised) as caught:
        here.exchange(here.passing(), GET)
    here.ours.close()
    assert here.client.recv(65536) == sent
    assert not isinstance(caught.value, PassThroughBroken) or caught.value.status == 200


def test_interim_answers_are_left_out(scene: Callable[..., Scene]) -> None:
    """The final one is what counts."""
    here = scene(serve(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, []))
    assert here.exchange(here.passing(), GET) == 200
    assert here.client.recv(65536) == OK


def test_nothing_leaves_that_must_not(scene: Callable[..., Scene]) -> None:
    """A request that has been here before, and any while the cache is offline: nobody is dialled."""
    here = scene()
    looped = GET.replace(b"X-Case: Kept", b"CDN-Loop: other, our-cache")
    with pytest.raises(LoopDetected):
        here.exchange(here.passing(), looped)
    here.offline = True
    with pytest.raises(Offline, match=r"^offline: GET /x is the registry's$"):
        here.exchange(here.passing(), GET)
    assert here.dialled == 0
