"""data_client: connections that are kept and those that are not, against a server that says what it is told to."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from pullthrough.config.settings import Endpoint
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from pullthrough.net.address_policy import AddressPolicy
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.upstream import data_client as module
from pullthrough.upstream.data_client import Ask, DataClient, DataResponse
from pullthrough.upstream.dialer import Caller, Dialer
from pullthrough.upstream.resolver import AddressRules, Named

WAIT_S = 20.0
BODY = b"0123456789"
CLOSE = b"<close>"
SILENCE = b"<silence>"


def reply(body: bytes = BODY, *fields: str, version: str = "1.1", length: int | None = None) -> bytes:
    """A 206; the length is the body's unless another is given."""
    lines = [f"HTTP/{version} 206 Partial", f"Content-Length: {len(body) if length is None else length}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Server:
    """Answers each request with the next of `answers`, over whatever connection it comes."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.heads: list[bytes] = []
        self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.connections += 1
                self._open.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (data := sock.recv(4096)):
                        return
                    head += data
                self.heads.append(head)
                answer = self.answers.pop(0)
                sock.sendall(answer.replace(CLOSE, b"").replace(SILENCE, b""))
                if answer.endswith(CLOSE):
                    return

    def close(self) -> None:
        for sock in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


class World:
    """A server and a client."""

    def __init__(self, *answers: bytes) -> None:
        self.server = Server(*answers)
        here = ("127.0.0.1", self.server.port)
        rules = AddressRules(AddressPolicy(frozenset({here}), tunnels=True), (), frozenset, frozenset, Named(set()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.client = DataClient(Dialer(context, rules, ParentProxies(), LoopGuard("ollama-cache-test")))

    def get(
        self,
        target: str = "/blob",
        caller: Caller | None = None,
        silent_s: float = WAIT_S,
        *,
        method: str = "GET",
        **fields: str,
    ) -> DataResponse:
        endpoint = Endpoint("http", "127.0.0.1", self.server.port)
        ask = Ask(endpoint, target, fields or {"Range": "bytes=0-9"}, silent_s, method)
        return self.client.get(ask, caller or Caller())


@contextlib.contextmanager
def world(*answers: bytes) -> Iterator[World]:
    at = World(*answers)
    try:
        yield at
    finally:
        at.client.close()
        at.server.close()


def read(response: DataResponse, size: int = len(BODY)) -> bytes:
    """So many bytes of the body, whose connection is then free."""
    buffer = memoryview(bytearray(size))
    filled = 0
    while filled < size:
        count = response.take(buffer[filled:])
        if count is None:
            assert response.wait()
        else:
            assert count
            filled += count
    response.finish()
    return bytes(buffer)


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        (Endpoint("https", "a.example", 443), "a.example"),
        (Endpoint("http", "a.example", 443), "a.example:443"),
        (Endpoint("https", "::1", 443), "[::1]"),
        (Endpoint("https", "::1", 8443), "[::1]:8443"),
    ],
)
def test_the_host_field(endpoint: Endpoint, host: str) -> None:
    """What is signed is the name as an address has it."""
    assert Ask(endpoint, "/", {}, 1.0).host == host


CHUNKED = b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nAccess\r\n7\r\nDenied.\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        pytest.param(b"HTTP/1.1 403 No\r\nContent-Length: 13\r\n\r\nAccessDenied.", b"AccessDenied.", id="a length"),
        pytest.param(CHUNKED, b"AccessDenied.", id="chunks"),
        pytest.param(b"HTTP/1.1 403 No\r\n\r\nAccessDenied." + CLOSE, b"AccessDenied.", id="to the end"),
        pytest.param(b"HTTP/1.1 403 No\r\nContent-Length: 99\r\n\r\n" + b"x" * 99, None, id="too long"),
    ],
)
def test_the_text_of_a_refusal(answer: bytes, text: bytes | None) -> None:
    """However it is framed, and no more of it than is wanted."""
    with world(answer) as at, contextlib.closing(at.get()) as response:
        assert response.text(50) == text


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        pytest.param(reply(BODY), 1, id="a length"),
        pytest.param(CHUNKED, 1, id="chunks"),
        pytest.param(reply(BODY + b"x", length=10), 2, id="more than the body"),
        pytest.param(b"HTTP/1.1 403 No\r\nContent-Length: 99\r\n\r\n" + b"x" * 99, 2, id="longer than is wanted"),
    ],
)
def test_a_text_gives_its_connection_back(answer: bytes, connections: int) -> None:
    """Once all of it, and nothing more, was read."""
    with world(answer, reply()) as at:
        with contextlib.closing(at.get()) as response:
            response.text(50)
        assert read(at.get()) == BODY
        assert at.server.connections == connections


def test_a_head_has_no_body() -> None:
    """Whatever length it tells; the connection is good for more."""
    head = reply(b"", length=10)
    with world(head, reply()) as at:
        assert at.get(method="HEAD").text(50) == b""
        assert read(at.get()) == BODY
        assert (at.server.connections, at.server.heads[0].split(b" ")[0]) == (1, b"HEAD")


def test_fields_go_over_the_wire_as_they_came() -> None:
    """Those of clients need not be ASCII, nor any text at all."""
    with world(reply()) as at:
        read(at.get(name=b"caf\xc3\xa9 \xff".decode("utf-8", "surrogateescape")))
        assert b"name: caf\xc3\xa9 \xff\r\n" in at.server.heads[0]


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\x00", "\ud800"])
def test_fields_that_cannot_be_sent(value: str) -> None:
    """No request is split, and no value is quoted."""
    with world(reply()) as at:
        with pytest.raises(UnexpectedResponse, match=r"^[\x20-\x7e]*$") as caught:
            at.get(name=value)
        assert value not in str(caught.value)
        assert at.server.heads == []


def test_a_refusal_that_breaks_off() -> None:
    """It proves nothing."""
    answer = b"HTTP/1.1 403 No\r\nContent-Length: 99\r\n\r\nAccess" + CLOSE
    with world(answer) as at, contextlib.closing(at.get()) as response, pytest.raises(UpstreamUnreachable):
        response.text(500)


def test_a_connection_is_used_again() -> None:
    """For as long as the server lets it; what was asked goes over the wire as it is."""
    with world(*[reply()] * 3) as at:
        for _ in range(3):
            response = at.get("/a%2Fb?X-Amz-Signature=c0ffee+%7E%20")
            assert (response.status, response.headers["content-length"]) == (206, "10")
            assert read(response) == BODY
        assert at.server.connections == 1
        lines = at.server.heads[0].split(b"\r\n")
        assert lines[0] == b"GET /a%2Fb?X-Amz-Signature=c0ffee+%7E%20 HTTP/1.1"
        assert sorted(lines[1:-2]) == [b"Host: 127.0.0.1:%d" % at.server.port, b"Range: bytes=0-9"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(BODY, "Connection: close"), id="the server says so"),
        pytest.param(reply(BODY, "Connection: x, Close"), id="among others"),
        pytest.param(reply(version="1.0"), id="HTTP/1.0"),
    ],
)
def test_a_connection_that_does_not_last(answer: bytes) -> None:
    """It is closed, and the next request opens another."""
    with world(answer, reply()) as at:
        assert read(at.get()) == read(at.get()) == BODY
        assert at.server.connections == 2


def test_a_body_that_was_not_read_ends_its_connection() -> None:
    """Its rest would be taken for the next answer."""
    with world(reply(), reply()) as at:
        at.get().close()
        assert read(at.get()) == BODY
        assert at.server.connections == 2


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        pytest.param(reply(b""), 1, id="no body"),
        pytest.param(reply(BODY), 1, id="all of it is here"),
        pytest.param(b"HTTP/1.1 307 Go\r\nTransfer-Encoding: chunked\r\n\r\n2\r\ngo\r\n0\r\n\r\n", 1, id="in chunks"),
        pytest.param(reply(BODY, length=11), 2, id="some of it is to come"),
        pytest.param(reply(BODY + b"x", length=10), 2, id="more than that"),
        pytest.param(reply(BODY, "Connection: close"), 2, id="the server says so"),
    ],
)
def test_a_body_that_is_skipped(answer: bytes, connections: int) -> None:
    """It ends its connection only where it is not here already: a redirect's is a line, or nothing."""
    with world(answer, reply()) as at:
        at.get().skip()
        assert read(at.get()) == BODY
        assert at.server.connections == connections


def test_more_than_the_body_is_no_answer() -> None:
    """And its connection is of no use any more."""
    with world(reply(BODY + b"x", length=10), reply()) as at:
        with pytest.raises(UnexpectedResponse, match="got more"):
            read(at.get())
        assert read(at.get()) == BODY
        assert at.server.connections == 2


def test_a_kept_connection_that_has_ended_is_replaced() -> None:
    """Whether that was seen before it was asked, or only then."""
    with world(reply() + CLOSE, reply(), CLOSE, reply()) as at:
        assert [read(at.get()) for _ in range(3)] == [BODY] * 3
        assert at.server.connections == 3
        assert len(at.server.heads) == 4


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(CLOSE, id="nothing"),
        pytest.param(b"HTTP/1.1 206 Pa" + CLOSE, id="half a head"),
        pytest.param(b"SSH-2.0-secret\r\n\r\n" + CLOSE, id="no HTTP"),
        pytest.param(b"HTTP/1.1 206 Partial\r\nX: " + b"y" * 200_000 + CLOSE, id="an endless head"),
        pytest.param(reply(BODY, "Content-Length: 11"), id="two lengths"),
        pytest.param(reply(BODY, "Transfer-Encoding: chunked"), id="a length and chunks"),
    ],
)
def test_no_answer(answer: bytes) -> None:
    """On a new connection it is tried no more; nothing of it is quoted."""
    with world(answer, reply()) as at:
        with pytest.raises(UpstreamUnreachable) as caught:
            at.get()
        assert "secret" not in str(caught.value)
        assert at.server.connections == 1


def test_half_an_answer_on_a_kept_connection_is_a_failure() -> None:
    """Whoever has begun to answer has got the request."""
    with world(reply(), b"HTTP/1.1 206 Pa" + CLOSE, reply()) as at:
        assert read(at.get()) == BODY
        with pytest.raises(UpstreamUnreachable):
            at.get()


def test_interim_answers_are_passed_over() -> None:
    """They are not the answer (RFC 9110 section 15.2)."""
    with world(b"HTTP/1.1 103 Early Hints\r\n\r\n" + reply()) as at:
        assert read(at.get()) == BODY


def test_no_head_in_time() -> None:
    """Silence is bounded."""
    with world(SILENCE) as at, pytest.raises(UpstreamTimeout):
        at.get(silent_s=0.05)


def test_a_caller_that_goes() -> None:
    """It is freed from another thread, and no second connection is opened for it."""
    with world(reply(), SILENCE, reply()) as at:
        assert read(at.get()) == BODY
        caller, problems = Caller(), list[UpstreamError]()

        def run() -> None:
            try:
                at.get(caller=caller)
            except UpstreamError as error:
                problems.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while len(at.server.heads) < 2:
            thread.join(0.01)
        caller.stop()
        thread.join(WAIT_S)
        assert len(problems) == 1
        assert at.server.connections == 1


def test_what_cannot_be_asked_for() -> None:
    """The address is not quoted."""
    with world() as at, pytest.raises(UnexpectedResponse) as caught:
        at.get("/secret\r\nX: y")
    assert "secret" not in str(caught.value)


def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and all of them at the end."""
    with world(*[reply()] * 3) as at:
        read(at.get())
        monkeypatch.setattr(module, "KEPT_S", 0.0)
        at.client.expire()
        monkeypatch.undo()
        first, second = at.get(), at.get()
        assert at.server.connections == 3
        read(first)
        at.client.close()
        read(second)
        assert not at.client._kept
