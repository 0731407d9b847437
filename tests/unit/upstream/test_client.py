"""client: our client against two servers on loopback that say, byte for byte, what each test tells them to."""

import asyncio
import functools
import gzip
import itertools
import re
import socket
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    AddressRefused,
    LengthContradicted,
    LoopDetected,
    Offline,
    SourceExpired,
    UnexpectedResponse,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    ValidatorChanged,
)
from pullthrough.upstream import client as module
from pullthrough.upstream.client import (
    CONNECTIONS_PER_HOST,
    MAX_CONTROL_BODY,
    MAX_HOPS,
    DataStream,
    Source,
    Upstream,
)
from tests.support.origin import Origin

HOST = "registry.ollama.ai"
REPOSITORY = "library/tiny"
BLOB = b"0123456789abcdef"
DIGEST = Digest("ab" * 32)
BLOB_TARGET = f"/v2/{REPOSITORY}/blobs/{DIGEST}"
MANIFEST_TARGET = f"/v2/{REPOSITORY}/manifests/latest"

# A signature as R2 makes them: encoded characters that another spelling would break.
QUERY = "X-Amz-Credential=k%2Fauto%2Fs3&X-Amz-SignedHeaders=host&X-Amz-Signature=c0ffee+%7E%20"
DATA_TARGET = f"/ollama/docker/registry/v2/blobs/sha256/ab/{DIGEST.hex}/data?{QUERY}"
SIGNED = f"https://{R2_HOST}{DATA_TARGET}"


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test on a loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **options: Any) -> None:
        asyncio.run(test(*arguments, **options))

    return run


# --- the servers


def reply(status: int, body: bytes = b"", *fields: tuple[str, str], length: int | None = -1) -> bytes:
    """A response; Content-Length is the body's unless another is given, None leaves it out."""
    lines = [f"HTTP/1.1 {status} Because", *(f"{name}: {value}" for name, value in fields)]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body: bytes, *fields: tuple[str, str]) -> bytes:
    """A 200 that does not tell its length."""
    return reply(200, b"", ("Transfer-Encoding", "chunked"), *fields, length=None) + b"%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )


def part(start: int, stop: int, *fields: tuple[str, str], blob: bytes = BLOB) -> bytes:
    """A 206 with those bytes of the blob."""
    return reply(206, blob[start:stop], ("Content-Range", f"bytes {start}-{stop - 1}/{len(blob)}"), *fields)


def moved(location: str, status: int = 307) -> bytes:
    return reply(status, b"elsewhere", ("Location", location))


REFUSAL = b'{"errors": [{"code": "UNKNOWN", "message": "unknown"}]}'
JSON = ("Content-Type", "application/json")

NOTHING = b""
WAIT = b"<wait>"
CLOSE = b"<close>"


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    connection: int
    method: str
    target: str
    headers: dict[str, str]


@dataclass
class Server:
    """Answers each target with the bytes prepared for it; a list is used up, its last entry stays.

    At `WAIT` it waits for `released`, at `CLOSE` it closes; after an incomplete answer it says no more.
    """

    answers: dict[str, bytes | list[bytes]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """A client has closed a connection."""
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> "Server":
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def targets(self) -> list[str]:
        return [seen.target for seen in self.seen]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with closing(writer):
                await self._converse(reader, writer, self.connections)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            fields = dict(line.split(": ", 1) for line in head[1:] if line)
            self.seen.append(Seen(number, method, target, {name.lower(): value for name, value in fields.items()}))
            answer = self.answers.get(target, reply(404, b"no such thing"))
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if method == "HEAD":
                answer = answer[: answer.index(b"\r\n\r\n") + 4]
            first, *others = answer.removesuffix(CLOSE).split(WAIT)
            writer.write(first)
            for piece in others:
                await self.released.wait()
                writer.write(piece)
            await writer.drain()
            if answer.endswith(CLOSE):
                return


@dataclass
class World:
    registry: Server
    cdn: Server
    upstream: Upstream

    async def ask(self, method: str = "GET", *, timeout_s: float = 20.0, **headers: str) -> module.Response:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.upstream.ask(method, HOST, MANIFEST_TARGET, fields, timeout_s=timeout_s)

    async def obtain(self, **headers: str) -> tuple[Source, DataStream | None]:
        return await self.upstream.obtain(HOST, REPOSITORY, DIGEST, headers, timeout_s=20.0)

    async def open(
        self,
        start: int = 4,
        stop: int = 8,
        *,
        source: Source | str = SIGNED,
        length: int | None = 16,
        validator: str | None = None,
    ) -> DataStream:
        source = source if isinstance(source, Source) else Source(source)
        return await self.upstream.open_range(source, start, stop, expected_length=length, validator=validator)


@asynccontextmanager
async def open_client(
    *,
    verify: bool = False,
    trusted_ca: str | None = None,
    own: Collection[str] = (),
    own_ports: Collection[int] = (),
    **options: str,
) -> AsyncIterator[Upstream]:
    """Our client. To load certifi's roots takes longer than most tests here, and only those that `verify` need any."""
    settings = parse_settings(options, dir=Path("/d"), certs=Path("/c"))
    with pytest.MonkeyPatch.context() as patch:
        if not verify:
            patch.setattr(ssl, "create_default_context", lambda cafile: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        client = Upstream(settings, trusted_ca=trusted_ca, own_addresses=lambda: own, own_ports=lambda: own_ports)
    await client.open()
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def world(**options: Any) -> AsyncIterator[World]:
    """A registry, a CDN, and our client, which finds them under their real names."""
    async with Server() as registry, Server() as cdn:
        upstream = f"{HOST}=http://127.0.0.1:{registry.port},{R2_HOST}=http://127.0.0.1:{cdn.port}"
        async with open_client(upstream=upstream, **options) as client:
            yield World(registry, cdn, client)


@contextmanager
def refused(kind: type[UpstreamError], message: str | None = None) -> Iterator[None]:
    """Exactly this error, whose message does not tell what only the holder of a signed address may know."""
    with pytest.raises(UpstreamError, match=message) as caught:
        yield
    assert type(caught.value) is kind
    error: BaseException | None = caught.value
    while error is not None:
        # All that a traceback would show.
        assert not re.search(r"\?|X-Amz|c0ffee|Bearer|secret", str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


async def read(stream: DataStream) -> bytes:
    with closing(stream):
        return b"".join([batch async for batch in stream.batches()])


# --- control plane


@on_loop
async def test_an_answer_is_handed_on() -> None:
    """Status, fields in any case, and body; a redirect within the registry too, which is for the caller to judge."""
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(307, b"{}", ("Location", "/elsewhere"), ("X-Name", "value"))
        response = await at.ask()
        assert (response.status, response.body) == (307, b"{}")
        assert (response.headers["location"], response.headers["x-NAME"]) == ("/elsewhere", "value")
        assert at.cdn.seen == []


@on_loop
async def test_nothing_is_said_that_was_not_given() -> None:
    """The caller's fields and no compression; no User-Agent or Accept of the library, no cookies."""
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(200, b"{}", ("Set-Cookie", "session=secret"))
        await at.ask()
        await at.ask("HEAD", user_agent="ollama/0.9", accept="text/plain", authorization="Bearer t")
        first, second = at.registry.seen
        assert (first.method, second.method) == ("GET", "HEAD")
        host = {
            "host": f"127.0.0.1:{at.registry.port}",
            "accept-encoding": "identity",
            "cdn-loop": at.upstream.loop.identifier,
        }
        assert first.headers == host
        assert second.headers == {
            **host,
            "user-agent": "ollama/0.9",
            "accept": "text/plain",
            "authorization": "Bearer t",
        }
        assert first.connection == second.connection


@on_loop
async def test_a_loop_is_left_to_be_seen() -> None:
    """CDN-Loop of the request behind ours is extended; a cache's 508 is not asked for again."""
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(508, b"{}")
        response = await at.ask(CDN_Loop="a; b=c")
        assert response.status == 508
        assert [seen.headers["cdn-loop"] for seen in at.registry.seen] == [f"a; b=c, {at.upstream.loop.identifier}"]


BODY = b'{"layers": []}'


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        pytest.param(None, BODY, id="none"),
        pytest.param("identity", BODY, id="identity"),
        pytest.param("gzip", gzip.compress(BODY), id="gzip"),
        pytest.param("GZIP", gzip.compress(BODY), id="in capitals"),
        pytest.param("x-gzip", gzip.compress(BODY), id="its old name"),
    ],
)
@on_loop
async def test_codings_of_a_manifest(coding: str | None, body: bytes) -> None:
    """A middlebox compresses though we asked for identity: the bytes are the registry's again."""
    async with world() as at:
        fields = [("Content-Encoding", coding)] if coding else []
        at.registry.answers[MANIFEST_TARGET] = reply(200, body, *fields)
        assert (await at.ask()).body == BODY


@pytest.mark.parametrize(
    ("coding", "body", "message"),
    [
        pytest.param("br", BODY, "expected content coding identity or gzip, got 'br'", id="br"),
        pytest.param("gzip, gzip", gzip.compress(gzip.compress(BODY)), "got 'gzip, gzip'", id="gzip twice"),
        pytest.param("gzip", BODY, "expected gzip, got", id="not gzip at all"),
        pytest.param("gzip", zlib.compress(BODY), "expected gzip, got", id="deflate under the name of gzip"),
        pytest.param("gzip", gzip.compress(BODY)[:-3], "expected a whole gzip stream, got its first", id="cut"),
        pytest.param("gzip", gzip.compress(BODY)[:-5] + b"\0" * 5, "expected gzip, got", id="wrong check sum"),
    ],
)
@on_loop
async def test_other_codings(coding: str, body: bytes, message: str) -> None:
    """What cannot be decoded is no manifest: its bytes would hash to something else."""
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(200, body, ("Content-Encoding", coding))
        with refused(UnexpectedResponse, message):
            await at.ask()


@on_loop
async def test_a_gzip_bomb() -> None:
    """64 MiB from 64 KiB: refused at the limit, in little more memory than the limit."""
    async with world() as at:
        bomb = gzip.compress(bytes(8 * MAX_CONTROL_BODY), 1)
        at.registry.answers[MANIFEST_TARGET] = reply(200, bomb, ("Content-Encoding", "gzip"))
        tracemalloc.start()
        try:
            with refused(UnexpectedResponse, f"expected a gzip stream of at most {MAX_CONTROL_BODY} bytes, got more"):
                await at.ask()
            assert tracemalloc.get_traced_memory()[1] < 3 * MAX_CONTROL_BODY
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("form", [lambda body: reply(200, body), chunked], ids=["length told", "chunked"])
@on_loop
async def test_a_body_that_is_too_long(form: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself passes; one byte more ends the exchange and its connection."""
    monkeypatch.setattr(module, "MAX_CONTROL_BODY", 1000)
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = [form(bytes(1000)), form(bytes(1001)), reply(200)]
        assert len((await at.ask()).body) == 1000
        with refused(UnexpectedResponse, "expected at most 1000 bytes, got more"):
            await at.ask()


@on_loop
async def test_an_endless_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up at the limit, not at its end; the connection is closed."""
    monkeypatch.setattr(module, "MAX_CONTROL_BODY", 1000)
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(200, bytes(1001), length=1 << 40)
        with refused(UnexpectedResponse, "expected at most 1000 bytes, got more"):
            await at.ask()
        await asyncio.wait_for(at.registry.gone.wait(), 10)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(NOTHING, id="no byte"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-", id="half a head"),
        pytest.param(reply(200, BODY, length=99), id="half a body"),
    ],
)
@on_loop
async def test_no_answer_in_time(answer: bytes) -> None:
    """The caller's own limit holds to the last byte, and ends the connection."""
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = answer
        with refused(UpstreamTimeout, "^no answer in time$"):
            await at.ask(timeout_s=0.05)
        await asyncio.wait_for(at.registry.gone.wait(), 10)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(CLOSE, id="closed at once"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-" + CLOSE, id="closed in the head"),
        pytest.param(reply(200, BODY, length=16) + CLOSE, id="closed in the body"),
        pytest.param(b"220 smtp.example ESMTP\r\n" + CLOSE, id="no HTTP"),
        pytest.param(reply(200, BLOB, ("Content-Length", "x")) + CLOSE, id="a length that is none"),
        pytest.param(reply(200, BLOB, ("Content-Length", "99")) + CLOSE, id="two lengths"),
        pytest.param(reply(200, BLOB, ("Transfer-Encoding", "chunked")) + CLOSE, id="a length and chunks"),
    ],
)
@on_loop
async def test_no_answer_at_all(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went wrong, without the address."""
    monkeypatch.setattr(module, "PAUSES_S", (0, 0))
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = answer
        with refused(UpstreamUnreachable):
            await at.ask()
        at.cdn.answers[DATA_TARGET] = answer
        with refused(UpstreamUnreachable):
            await read(await at.open())
        at.registry.answers[BLOB_TARGET] = answer
        with refused(UpstreamUnreachable):
            _, stream = await at.obtain()
            assert stream is not None
            await read(stream)


@on_loop
async def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and port are named, and what the system said."""
    monkeypatch.setattr(module, "PAUSES_S", (0, 0))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with open_client(upstream=f"{HOST}=http://127.0.0.1:{port},{R2_HOST}=http://127.0.0.1:{port}") as client:
        with refused(UpstreamUnreachable, rf"^127\.0\.0\.1:{port}: Connection refused$"):
            await client.ask("GET", HOST, f"/v2/?{QUERY}", {}, timeout_s=20)
        with refused(UpstreamUnreachable, rf"^127\.0\.0\.1:{port}: "):
            await client.open_range(Source(SIGNED), 0, 4, expected_length=None, validator=None)
        with refused(UpstreamUnreachable, rf"^127\.0\.0\.1:{port}: "):
            await client.obtain(HOST, REPOSITORY, DIGEST, {}, timeout_s=20)


@on_loop
async def test_offline_and_closed() -> None:
    """No connection is made then."""
    async with world(offline="true") as at:
        for attempt in (at.ask, at.obtain, at.open):
            with refused(Offline, "^offline: upstream is not asked$"):
                await attempt()
        assert (at.registry.connections, at.cdn.connections) == (0, 0)
    async with world() as at:
        await at.upstream.close()
        await at.upstream.close()
        with refused(UpstreamUnreachable, "expected an open client, got a closed one"):
            await at.ask()


@on_loop
async def test_upstream_counts_as_down_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer of a registry makes it count as up again, even a bad one; silence does not, nor does the CDN."""
    monkeypatch.setattr(module, "PAUSES_S", ())
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000.0)
    async with world() as at:
        assert at.upstream.down_until(HOST) == 0
        for status in (200, 404, 500):
            at.registry.answers[MANIFEST_TARGET] = [reply(status, REFUSAL, JSON), CLOSE]
            at.upstream.mark_down(HOST, 30)
            assert at.upstream.down_until(HOST) == 1030
            await at.ask()
            assert at.upstream.down_until(HOST) == 0
        at.upstream.mark_down(HOST, 30)
        with refused(UpstreamUnreachable):
            await at.ask()
        at.cdn.answers[DATA_TARGET] = part(4, 8)
        assert await read(await at.open()) == b"4567"
        assert at.upstream.down_until(HOST) == 1030
        at.registry.answers[BLOB_TARGET] = moved(SIGNED)
        await at.obtain()
        assert at.upstream.down_until(HOST) == 0


@on_loop
async def test_who_answers_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer and each failure is noted of whoever gave it: the registry, the blob host, and no stranger."""
    monkeypatch.setattr(module, "PAUSES_S", ())
    async with world() as at:

        def known(name: str) -> tuple[str, str]:
            service = at.upstream.reachability.find(name)
            assert service is not None
            return str(service.state), service.why

        for answer, said in (
            (reply(200, b"{}"), ("up", "")),
            (reply(500, REFUSAL, JSON), ("down", "it answers 500")),
            (reply(404, REFUSAL, JSON), ("up", "")),
            (reply(200, b"hello", ("Content-Type", "text/html")),
             ("down", "something else answers in its place: 200 text/html")),
            (reply(401, b"", ("WWW-Authenticate", "Bearer")), ("up", "")),
        ):  # fmt: skip
            at.registry.answers[MANIFEST_TARGET] = answer
            with suppress(UpstreamError):
                await at.ask()
            assert known(HOST) == said
        at.registry.answers[BLOB_TARGET] = CLOSE
        with refused(UpstreamUnreachable):
            await at.obtain()
        assert known(HOST)[0] == "down"
        at.registry.answers[BLOB_TARGET] = moved(SIGNED)
        await at.obtain()
        assert known(HOST) == ("up", "")
        assert known(R2_HOST)[0] == "not asked"
        at.cdn.answers[DATA_TARGET] = [reply(503), part(4, 8), CLOSE]
        with refused(UpstreamRefused):
            await at.open()
        assert known(R2_HOST) == ("down", "it answers 503")
        (await at.open()).close()
        assert known(R2_HOST) == ("up", "")
        with refused(UpstreamUnreachable):
            await at.open()
        assert known(R2_HOST)[0] == "down"
        await at.upstream.knock(R2_HOST)
        assert known(R2_HOST) == ("up", "")
        asked = len(at.cdn.seen)
    with refused(UpstreamUnreachable):
        await at.upstream.knock(R2_HOST)
    assert known(R2_HOST)[0] == "down" and len(at.cdn.seen) == asked


# --- the source of a blob


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        pytest.param(SIGNED, SIGNED, id="absolute, spelt as it was signed"),
        pytest.param(f"/v2/other/data?{QUERY}", f"https://{HOST}/v2/other/data?{QUERY}", id="a path"),
        pytest.param("data", f"https://{HOST}/v2/{REPOSITORY}/blobs/data", id="beside the blob"),
        pytest.param("../data", f"https://{HOST}/v2/{REPOSITORY}/data", id="above the blob"),
        pytest.param(f"?{QUERY}", f"https://{HOST}{BLOB_TARGET}?{QUERY}", id="a query"),
        pytest.param(f"//{R2_HOST}{DATA_TARGET}", SIGNED, id="another host, the same scheme"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@on_loop
async def test_where_a_blob_is(status: int, location: str, expected: str) -> None:
    """Relative to the registry's public name, not to where it is really reached; nothing is asked there yet.

    The token goes on to where the same registry sends us, and to no other host.
    """
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = moved(location, status)
        source, stream = await at.obtain(authorization="Bearer t", user_agent="ollama/0.9")
        token = {"authorization": "Bearer t"} if expected.startswith(f"https://{HOST}/") else {}
        assert (source.url, source.headers, stream) == (expected, token, None)
        assert at.registry.seen[0].headers["authorization"] == "Bearer t"
        assert (at.registry.targets, at.cdn.targets) == ([BLOB_TARGET], [])


@on_loop
async def test_a_registry_that_has_the_bytes() -> None:
    """A 200 is the first stream, and the registry the source, which has to be asked with the same credentials."""
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = [reply(200, BLOB, ("ETag", '"v"')), part(4, 8, ("ETag", '"v"'))]
        source, stream = await at.obtain(**{"Authorization": "Bearer t", "User-Agent": "ollama/0.9"})
        assert stream is not None
        assert (stream.start, stream.stop, stream.length, stream.whole) == (0, 16, 16, True)
        assert stream.validator == '"v"'
        assert await read(stream) == BLOB
        again = await at.open(source=source, validator='"v"')
        assert await read(again) == b"4567"
        assert [seen.headers.get("authorization") for seen in at.registry.seen] == ["Bearer t", "Bearer t"]
        assert "user-agent" not in at.registry.seen[1].headers


@pytest.mark.parametrize(
    ("answer", "extent"),
    [
        pytest.param(part(0, 1), (0, 1, 16), id="a registry that knows Range"),
        pytest.param(reply(200, BLOB), (0, 16, 16), id="one that does not"),
        pytest.param(reply(416, b"", ("Content-Range", "bytes */0")), (0, 0, 0), id="an empty blob"),
        pytest.param(
            reply(416, b"<Error/>", ("Content-Range", "bytes */0")), (0, 0, 0), id="an empty blob, with a text"
        ),
    ],
)
@on_loop
async def test_a_registry_that_has_the_bytes_is_asked_for_few(answer: bytes, extent: tuple[int, int, int]) -> None:
    """Where only the source is wanted, one byte is asked for in case the registry itself is the source."""
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = answer
        source, stream = await at.upstream.obtain(HOST, REPOSITORY, DIGEST, {}, asked=(0, 1), timeout_s=20.0)
        assert stream is not None
        assert (stream.start, stream.stop, stream.length) == extent
        assert await read(stream) == BLOB[: extent[1]]
        assert source.url == f"https://{HOST}{BLOB_TARGET}"
        assert [seen.headers["range"] for seen in at.registry.seen] == ["bytes=0-0"]


@pytest.mark.parametrize("bad", [CLOSE, reply(500), reply(503, b"busy")], ids=["closed", "500", "503"])
@on_loop
async def test_a_registry_that_stumbles(bad: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice is absorbed, for clients do not try a HEAD or a manifest again."""
    monkeypatch.setattr(module, "PAUSES_S", (0, 0))
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = [bad, bad, reply(200, BODY)]
        assert (await at.ask()).body == BODY
        at.registry.answers[BLOB_TARGET] = [bad, bad, moved(SIGNED)]
        assert (await at.obtain())[0].url == SIGNED
        assert len(at.registry.seen) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 429, 500, 503])
@on_loop
async def test_a_registry_that_says_no(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own status and what the client needs to do better."""
    monkeypatch.setattr(module, "PAUSES_S", ())
    async with world() as at:
        fields = (("WWW-Authenticate", "Bearer realm=x"), ("Set-Cookie", "a=secret"))
        at.registry.answers[BLOB_TARGET] = [reply(status, b"no", *fields), reply(200, b"")]
        with pytest.raises(UpstreamRefused, match=f"^upstream answered {status}$") as caught:
            await at.obtain()
        assert caught.value.status_hint == status
        assert caught.value.headers == (("WWW-Authenticate", "Bearer realm=x"),)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(chunked(BLOB), "expected a Content-Length, got ''", id="no length"),
        pytest.param(
            reply(200, BLOB, ("Content-Encoding", "gzip")), "expected no content coding, got gzip", id="encoded"
        ),
    ],
)
@on_loop
async def test_a_registry_that_makes_no_sense(answer: bytes, message: str) -> None:
    """Bytes that cannot be taken for the blob's; nobody will read the rest of them."""
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = answer[:-1]
        with refused(UnexpectedResponse, message):
            await at.obtain()
        await asyncio.wait_for(at.registry.gone.wait(), 10)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(307, b"no"), id="redirect to nowhere"),
        pytest.param(reply(201, b"no", ("Location", SIGNED)), id="created"),
        pytest.param(part(0, 16), id="part"),
    ],
)
@on_loop
async def test_a_registry_that_answers_something_else(answer: bytes) -> None:
    """Neither the bytes, nor where they are, nor a refusal."""
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = answer[:-1]
        with pytest.raises(UpstreamError, match=r"^[^?]*$"):
            await at.obtain()
        await asyncio.wait_for(at.registry.gone.wait(), 10)


@on_loop
async def test_a_registry_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own limit."""
    async with world() as at:
        at.registry.answers[BLOB_TARGET] = NOTHING
        with refused(UpstreamTimeout, "^no answer in time$"):
            await at.upstream.obtain(HOST, REPOSITORY, DIGEST, {}, timeout_s=0.05)


def test_a_source_is_not_shown() -> None:
    """Its address is a key: no representation has it, nor the credentials that go with it."""
    source = Source(SIGNED, {"Authorization": "Bearer secret"})
    assert repr(source) == str(source) == "Source()"
    assert source.host == R2_HOST


@on_loop
async def test_sources_of_one_host_share_their_connections() -> None:
    """However many blobs are recorded, the host sees no more than so many at once."""
    async with open_client() as client:
        urls = (SIGNED, f"{SIGNED}&more", "https://cdn.example/")
        first, second, other = (client.slot(Source(url)) for url in urls)
        assert first is second
        assert first is not other
        for _ in range(CONNECTIONS_PER_HOST):
            assert not first.locked()
            await first.acquire()
        assert first.locked()
        assert not other.locked()


# --- bytes


@on_loop
async def test_a_part_is_asked_for_exactly() -> None:
    """Range is inclusive on the wire, the signed target is spelt as it was given, and nothing compresses."""
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = part(4, 8, ("ETag", '"v"'))
        stream = await at.open()
        assert (stream.start, stream.stop, stream.length, stream.validator) == (4, 8, 16, '"v"')
        assert not stream.whole
        assert await read(stream) == b"4567"
        (seen,) = at.cdn.seen
        assert (seen.method, seen.target) == ("GET", DATA_TARGET)
        host = f"127.0.0.1:{at.cdn.port}"
        assert seen.headers == {
            "host": host,
            "accept-encoding": "identity",
            "range": "bytes=4-7",
            "cdn-loop": at.upstream.loop.identifier,
        }


@on_loop
async def test_a_source_that_ignores_range() -> None:
    """A 200 is the whole blob from byte 0, and says so."""
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = reply(200, BLOB)
        stream = await at.open()
        assert (stream.start, stream.stop, stream.length, stream.whole) == (0, 16, 16, True)
        assert stream.validator is None
        assert await read(stream) == BLOB


@on_loop
async def test_an_empty_blob() -> None:
    """No range of it can be satisfied: 416 says so, and there is nothing to read. Another blob is never empty.

    The text that comes with a 416 is nobody's, not even that of the next answer.
    """
    async with world() as at:
        refusal = reply(416, b"<Error/>", ("Content-Range", "bytes */0"))
        at.cdn.answers[DATA_TARGET] = [refusal, part(4, 8), refusal]
        stream = await at.open(0, 8, source=Source(SIGNED, sizes=frozenset({0})), length=None)
        assert (stream.start, stream.stop, stream.length) == (0, 0, 0)
        assert await read(stream) == b""
        assert await read(await at.open()) == b"4567"
        with refused(LengthContradicted, "got 0$"):
            await at.open(0, 8, length=None)


@on_loop
async def test_a_stream_read_to_its_end_gives_its_connection_back() -> None:
    """The next slice uses it; one that was left unread cannot."""
    async with world() as at:
        blob = bytes(range(256)) * 4096
        at.cdn.answers[DATA_TARGET] = [part(0, len(blob), blob=blob), part(4, 8)[:-1], part(4, 8)]
        assert await read(await at.open(0, len(blob), length=len(blob))) == blob
        (await at.open()).close()
        assert await read(await at.open()) == b"4567"
        assert [seen.connection for seen in at.cdn.seen] == [1, 1, 2]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        pytest.param(reply(401, b"no"), SourceExpired, "the source answered 401", id="401"),
        pytest.param(reply(403, b"<Error>Expired</Error>"), SourceExpired, "the source answered 403", id="403"),
        pytest.param(reply(404, b"no"), SourceExpired, "the source answered 404", id="404"),
        pytest.param(reply(410, b"no"), SourceExpired, "the source answered 410", id="410"),
        pytest.param(reply(429, b"no"), UpstreamRefused, "upstream answered 429", id="429"),
        pytest.param(reply(503, b"no"), UpstreamRefused, "upstream answered 503", id="503"),
        pytest.param(reply(201, b"no"), UnexpectedResponse, "expected 206 or 200, got 201", id="201"),
        pytest.param(reply(302, b"no"), UnexpectedResponse, "expected 206 or 200, got 302", id="redirect to nowhere"),
        pytest.param(part(5, 9), UnexpectedResponse, "expected bytes 4-7, got 5-8/16", id="other bytes"),
        pytest.param(
            part(4, 8, blob=BLOB + b"g"), LengthContradicted, "expected a complete length of 16, got 17", id="longer"
        ),
        pytest.param(
            part(4, 8, ("Content-Encoding", "gzip")),
            UnexpectedResponse,
            "expected no content coding, got gzip",
            id="encoded",
        ),
        pytest.param(
            part(4, 8, ("ETag", '"other"')), ValidatorChanged, 'expected the validator "v", got "other"', id="changed"
        ),
        pytest.param(part(4, 8), ValidatorChanged, 'expected the validator "v", got None', id="no validator"),
        pytest.param(
            reply(200, BLOB, ("ETag", 'W/"v"')), ValidatorChanged, 'expected the validator "v", got W/"v"', id="weak"
        ),
    ],
)
@on_loop
async def test_a_source_that_says_something_else(
    answer: bytes, kind: type[UpstreamError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error each, before the body is there; the connection is closed, for nobody will read the rest.

    Where the text of a refusal tells whose it is, it is waited for, but not for ever.
    """
    monkeypatch.setattr(module, "STALL_TIMEOUT_S", 0.4)
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = [answer[:-1], part(4, 8, ("ETag", '"v"'))]
        with refused(kind, f"^{re.escape(message)}$"):
            await at.open(validator='"v"')
        await asyncio.wait_for(at.cdn.gone.wait(), 10)
        assert await read(await at.open(validator='"v"')) == b"4567"


@on_loop
async def test_an_address_that_expires() -> None:
    """Good for one slice and not for the next."""
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = [part(4, 8), reply(403)]
        assert await read(await at.open()) == b"4567"
        with refused(SourceExpired):
            await at.open()


@on_loop
async def test_a_body_that_ends_early() -> None:
    """What came is handed on first."""
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = part(4, 8)[:-2] + WAIT + CLOSE
        got = b""
        with refused(UpstreamUnreachable), closing(await at.open()) as stream:
            async for batch in stream.batches():
                got += batch
                at.cdn.released.set()
        assert got == b"45"


@on_loop
async def test_a_body_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came is handed on first; the wait for more is bounded."""
    monkeypatch.setattr(module, "STALL_TIMEOUT_S", 0.4)
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = part(4, 8)[:-2]
        got = b""
        with refused(UpstreamTimeout, "^no answer in time$"), closing(await at.open()) as stream:
            async for batch in stream.batches():
                got += batch
        assert got == b"45"
        await asyncio.wait_for(at.cdn.gone.wait(), 10)


@pytest.mark.parametrize("answer", [NOTHING, b"HTTP/1.1 206 P"], ids=["no byte", "half a head"])
@on_loop
async def test_a_source_that_does_not_answer(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting and the head have one limit together."""
    async with world() as at:
        monkeypatch.setattr(module, "CONNECT_S", 0.02)
        monkeypatch.setattr(module, "STALL_TIMEOUT_S", 0.03)
        at.cdn.answers[DATA_TARGET] = answer
        with refused(UpstreamTimeout, "^no answer in time$"):
            await asyncio.wait_for(at.open(), 5)
        await asyncio.wait_for(at.cdn.gone.wait(), 10)


class Poured:
    """What a thread was given of a body."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.pieces.append((offset, bytes(data)))

    @property
    def joined(self) -> bytes:
        """The bytes, each of which came where the last ones ended."""
        for (here, data), (there, _) in itertools.pairwise(self.pieces):
            assert here + len(data) == there
        return b"".join(data for _, data in self.pieces)


async def opened(at: World, stop: int = 8) -> DataStream:
    return await at.open(4, stop, length=None)


@on_loop
async def test_a_body_is_poured_by_a_thread() -> None:
    """In pieces of bounded size, each where it belongs; the connection is used again."""
    blob = bytes(range(256)) * 1000
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = [part(4, len(blob), blob=blob)] * 2
        for _ in range(2):
            poured = Poured()
            await (await opened(at, len(blob))).pour(poured.write, 100_000)
            assert poured.joined == blob[4:]
            assert poured.pieces[0][0] == 4
            assert max(len(data) for _, data in poured.pieces) <= 100_000
        assert at.cdn.connections == 1


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        pytest.param(WAIT + CLOSE, UpstreamUnreachable, id="it ends"),
        pytest.param(NOTHING, UpstreamTimeout, id="it stalls"),
    ],
)
@on_loop
async def test_what_came_of_a_body_is_poured(
    end: bytes, kind: type[UpstreamError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the failure is told, which is counted once."""
    monkeypatch.setattr(module, "STALL_TIMEOUT_S", 0.4)
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = part(4, 8)[:-2] + end
        poured = Poured()
        at.cdn.released.set()
        with refused(kind), closing(await opened(at)) as stream:
            await stream.pour(poured.write)
        assert poured.joined == b"45"
        assert at.upstream.errors == {kind: 1}


@on_loop
async def test_pouring_ends_with_its_caller() -> None:
    """At once, though the source is silent: when it has ended no thread writes any more."""
    async with world() as at:
        at.cdn.answers[DATA_TARGET] = part(4, 8)[:-2]
        poured, begun = Poured(), threading.Event()

        def write(offset: int, data: memoryview) -> None:
            poured.write(offset, data)
            begun.set()

        stream = await opened(at)
        task = asyncio.get_running_loop().create_task(stream.pour(write))
        assert await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        async with asyncio.timeout(module.STALL_TIMEOUT_S / 2):
            with pytest.raises(asyncio.CancelledError):
                await task
        stream.close()
        assert poured.joined == b"45"


@on_loop
async def test_batches_of_a_slow_line() -> None:
    """Small pieces that arrive one after the other are the same bytes."""
    async with world() as at:
        blob = bytes(range(256)) * 300
        whole = part(0, len(blob), blob=blob)
        pieces = [
            whole[:-70_000],
            *(whole[start : start + 7_000] for start in range(len(whole) - 70_000, len(whole), 7_000)),
        ]
        at.cdn.answers[DATA_TARGET] = WAIT.join(pieces)
        stream = await at.open(0, len(blob), length=len(blob))
        batches = []
        async for batch in stream.batches():
            batches.append(batch)
            at.cdn.released.set()
        assert b"".join(batches) == blob
        assert len(batches) > 1


@on_loop
async def test_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, wherever they are met; a refusal that a client is meant to see is none."""
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0))
    async with world() as at:
        at.registry.answers[MANIFEST_TARGET] = reply(404, REFUSAL, JSON)
        await at.ask()
        assert at.upstream.errors == {}
        at.registry.answers[MANIFEST_TARGET] = reply(503)
        await at.ask()
        at.registry.answers[MANIFEST_TARGET] = CLOSE
        with refused(UpstreamUnreachable):
            await at.ask()
        at.cdn.answers[DATA_TARGET] = reply(403)
        with refused(SourceExpired):
            await at.open()
        at.cdn.answers[DATA_TARGET] = part(4, 8)[:-2] + CLOSE
        with refused(UpstreamUnreachable):
            await read(await at.open())
        assert at.upstream.errors == {UpstreamRefused: 1, UpstreamUnreachable: 2, SourceExpired: 1}


# --- redirects of a source


@on_loop
async def test_a_source_that_moves_on() -> None:
    """Redirects are followed with the same range, relative ones from where they were met; nobody reads their text."""
    async with world() as at:
        at.cdn.answers |= {
            DATA_TARGET: moved(f"/second?{QUERY}")[:-1],
            f"/second?{QUERY}": moved(f"third?{QUERY}", 302),
            f"/third?{QUERY}": moved(f"https://{HOST}/fourth?{QUERY}", 308),
        }
        at.registry.answers[f"/fourth?{QUERY}"] = part(4, 8)
        assert await read(await at.open()) == b"4567"
        await asyncio.wait_for(at.cdn.gone.wait(), 10)
        assert at.cdn.targets == [DATA_TARGET, f"/second?{QUERY}", f"/third?{QUERY}"]
        assert at.registry.targets == [f"/fourth?{QUERY}"]
        assert {seen.headers["range"] for seen in at.cdn.seen + at.registry.seen} == {"bytes=4-7"}


@on_loop
async def test_a_parent_cache_that_redirects_to_its_own_address() -> None:
    """Named in `upstream`, it may call itself by the address that the name led to; by no other port or address."""
    async with Server() as parent, open_client(upstream=f"{HOST}=http://localhost:{parent.port}") as upstream:
        parent.answers |= {
            BLOB_TARGET: [
                moved(f"http://127.0.0.1:{parent.port}/data?{QUERY}"),
                moved(f"http://127.0.0.1:{parent.port + 1}/data?{QUERY}"),
            ],
            f"/data?{QUERY}": part(4, 8),
        }
        at = World(parent, parent, upstream)
        source, _ = await at.obtain()
        assert await read(await at.open(source=source)) == b"4567"
        source, _ = await at.obtain()
        with refused(AddressRefused):
            await at.open(source=source)


@on_loop
async def test_redirects_have_an_end() -> None:
    """Some are followed, a loop is not."""
    async with world() as at:
        targets = [DATA_TARGET, *(f"/{n}?{QUERY}" for n in range(1, MAX_HOPS))]
        at.cdn.answers |= {here: moved(there) for here, there in itertools.pairwise(targets)}
        at.cdn.answers[targets[-1]] = part(4, 8)
        assert await read(await at.open()) == b"4567"
        assert at.cdn.targets == targets
        at.cdn.seen.clear()
        at.cdn.answers[targets[-1]] = moved(DATA_TARGET)
        with refused(UnexpectedResponse, f"^expected at most {MAX_HOPS} redirects, got more$"):
            await at.open()
        assert len(at.cdn.seen) <= MAX_HOPS + 1


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
@on_loop
async def test_credentials_stay_where_they_belong(name: str) -> None:
    """They follow within one origin, are dropped at the first other one, and do not come back."""
    async with world() as at:
        own = f"http://127.0.0.1:{at.registry.port}"
        at.registry.answers |= {
            "/first": moved("/second"),
            "/second": moved(f"https://{R2_HOST}/third"),
            "/fourth": part(4, 8),
        }
        at.cdn.answers["/third"] = moved(f"{own}/fourth")
        source = Source(f"{own}/first", {name: "Bearer t"})
        assert await read(await at.open(source=source)) == b"4567"
        assert at.registry.targets == ["/first", "/second", "/fourth"]
        assert [seen.headers.get("authorization") for seen in at.registry.seen] == ["Bearer t", "Bearer t", None]
        assert [seen.headers.get("authorization") for seen in at.cdn.seen] == [None]
        assert source.headers == {name: "Bearer t"}


@pytest.mark.parametrize(
    "elsewhere",
    [
        pytest.param("http://127.0.0.1:{cdn}", id="another port"),
        pytest.param("https://registry.ollama.ai", id="another scheme and name, though the same server"),
    ],
)
@on_loop
async def test_another_origin_is_any_that_is_not_the_same(elsewhere: str) -> None:
    """Scheme, host and port, as RFC 6454 has it."""
    async with world() as at:
        own = f"http://127.0.0.1:{at.registry.port}"
        at.registry.answers |= {
            "/first": moved(f"{elsewhere.format(cdn=at.cdn.port)}/second"),
            "/second": part(4, 8),
        }
        at.cdn.answers["/second"] = part(4, 8)
        assert await read(await at.open(source=Source(f"{own}/first", {"Authorization": "Bearer t"}))) == b"4567"
        (second,) = [seen for seen in at.registry.seen + at.cdn.seen if seen.target == "/second"]
        assert "authorization" not in second.headers


# --- where it connects to


BAD_ADDRESSES = [
    pytest.param(f"http://cdn.example/x?{QUERY}", "expected an https address, got http://cdn.example", id="plain"),
    pytest.param(f"http://8.8.8.8/x?{QUERY}", "expected an https address, got http://8.8.8.8", id="plain, public"),
    pytest.param(f"ftp://cdn.example/x?{QUERY}", "expected an https address, got ftp://cdn.example", id="ftp"),
    pytest.param("file:///etc/passwd", "expected an https address, got file://", id="file"),
    pytest.param(f"https://10.0.0.1/x?{QUERY}", "expected a public address, got 10.0.0.1", id="private"),
    pytest.param(f"https://127.0.0.1/x?{QUERY}", "expected a public address, got 127.0.0.1", id="loopback"),
    pytest.param(f"https://[::1]/x?{QUERY}", "expected a public address, got ::1", id="loopback v6"),
    pytest.param(
        f"https://[::ffff:169.254.169.254]/x?{QUERY}", "expected a public address, got ::ffff:", id="mapped metadata"
    ),
    pytest.param(f"https://192.168.0.1:8443/x?{QUERY}", "expected a public address, got 192.168.0.1", id="any port"),
    pytest.param(f"https://1.2.3.4/x?{QUERY}", "expected an address of another machine, got our own 1.2.3.4", id="own"),
]


@pytest.mark.parametrize(("address", "message"), BAD_ADDRESSES)
@pytest.mark.parametrize("way", ["source", "redirect"])
@on_loop
async def test_addresses_that_are_refused(
    way: str, address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No plain HTTP, nothing inside the network: as a source, and where a source redirects to."""

    def no_connection(*arguments: object, **options: object) -> None:
        raise AssertionError("expected no connection")

    async with world(own={"1.2.3.4"}) as at:
        at.cdn.answers[DATA_TARGET] = moved(address)
        source = SIGNED
        if way == "source":
            monkeypatch.setattr(socket, "getaddrinfo", no_connection)
            source = address
        with refused(AddressRefused, f"^{re.escape(message)}"):
            await at.open(source=source)
        assert (at.registry.connections, at.cdn.connections) == (0, 1 if way == "redirect" else 0)


@pytest.mark.parametrize(
    "host",
    ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "127.0.0.1.", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"],
)
@on_loop
async def test_other_spellings_of_loopback(host: str) -> None:
    """What the system would take for an address, too."""
    async with world() as at:
        with pytest.raises(UpstreamError, match=r"^[^?]*$"):
            await at.open(source=f"https://{host}/x?{QUERY}")
        at.cdn.answers[DATA_TARGET] = moved(f"https://{host}:{at.registry.port}/x?{QUERY}")
        with pytest.raises(UpstreamError, match=r"^[^?]*$"):
            await at.open()
        assert (at.registry.connections, at.cdn.connections) == (0, 1)


def look_up(monkeypatch: pytest.MonkeyPatch, find: Callable[[], Collection[str]]) -> None:
    """Let names have these addresses for threads; addresses are their own."""
    usual = socket.getaddrinfo

    def found(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host.replace(".", "").isdigit():
            return usual(host, port, *arguments, **options)
        families = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in find()]
        return [(family, socket.SOCK_STREAM, 0, "", (address, port)) for family, address in families]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what every name resolves to."""

    def set_addresses(*addresses: str) -> None:
        look_up(monkeypatch, lambda: addresses)

    return set_addresses


Resolve = Callable[..., None]


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        pytest.param(["127.0.0.1"], "expected a public address, got 127.0.0.1", id="loopback"),
        pytest.param(["::1"], "expected a public address, got ::1", id="loopback v6"),
        pytest.param(["10.0.0.1"], "expected a public address, got 10.0.0.1", id="private"),
        pytest.param(["1.1.1.1", "10.0.0.1"], "expected a public address, got 10.0.0.1", id="one of two is private"),
        pytest.param(["169.254.169.254"], "expected a public address, got 169.254.169.254", id="cloud metadata"),
        pytest.param(["fe80::1%eth0"], "expected a public address, got fe80::1%eth0", id="link-local"),
        pytest.param(["1.2.3.4"], "expected an address of another machine, got our own 1.2.3.4", id="own"),
        pytest.param([], "expected at least one address, got none", id="none"),
    ],
)
@on_loop
async def test_names_that_lead_inside_are_refused(resolve: Resolve, addresses: list[str], message: str) -> None:
    """Whatever the name; before a connection is made, as a source and where a registry redirects to."""
    resolve(*addresses)
    async with world(own={"1.2.3.4"}) as at:
        url = f"https://cdn.example:{at.cdn.port}/x?{QUERY}"
        with refused(AddressRefused, f"^{re.escape(message)}$"):
            await at.open(source=url)
        at.cdn.answers[DATA_TARGET] = moved(url)
        with refused(AddressRefused, f"^{re.escape(message)}$"):
            await at.open()
        assert at.cdn.connections == 1


@on_loop
async def test_a_public_name_is_connected_to(resolve: Resolve) -> None:
    """At the very address that was checked; the guard of the suite stops it there."""
    resolve("1.1.1.1")
    async with world() as at:
        with pytest.raises(AssertionError, match=r"expected a loopback address, got \('1\.1\.1\.1', 443\)"):
            await at.open(source=f"https://cdn.example/x?{QUERY}")


@on_loop
async def test_a_configured_name_may_lead_anywhere(resolve: Resolve) -> None:
    """A mirror in one's own network is what `upstream` is for; only at its own port."""
    resolve("127.0.0.1")
    async with Server() as mirror, Server() as neighbour:
        async with open_client(upstream=f"{HOST}=http://mirror.lan:{mirror.port}") as client:
            mirror.answers |= {MANIFEST_TARGET: reply(200, BODY), "/data": part(4, 8)}
            response = await client.ask("GET", HOST, MANIFEST_TARGET, {}, timeout_s=20)
            assert response.body == BODY
            source = Source(f"http://mirror.lan:{mirror.port}/data")
            stream = await client.open_range(source, 4, 8, expected_length=16, validator=None)
            assert await read(stream) == b"4567"
            for url in (f"https://mirror.lan:{neighbour.port}/", f"https://x.mirror.lan:{mirror.port}/"):
                with refused(AddressRefused, "expected a public address, got 127.0.0.1"):
                    await client.open_range(Source(url), 4, 8, expected_length=16, validator=None)
        assert neighbour.connections == 0


@on_loop
async def test_a_registry_that_is_ourselves(resolve: Resolve) -> None:
    """A hosts entry that belongs on clients only: an error that says so, instead of a loop."""
    resolve("1.2.3.4")
    async with open_client(own={"1.2.3.4"}, own_ports={443}) as client:
        with refused(LoopDetected, "expected registry.ollama.ai on another machine, got our own 1.2.3.4"):
            await client.ask("GET", "registry.ollama.ai", "/v2/", {}, timeout_s=20)


@on_loop
async def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and the system's words."""

    def no_such_host() -> Collection[str]:
        raise OSError(None, "no such host")

    look_up(monkeypatch, no_such_host)
    async with world() as at:
        with refused(UpstreamUnreachable, "^cdn.example: name resolution failed: .*no such host"):
            await at.open(source=f"https://cdn.example/x?{QUERY}")


def test_exempt_hosts() -> None:
    """What the configuration names: the intercepted names at the two web ports, their upstreams at theirs."""
    options = {
        "registries": "registry.ollama.ai,hub.example",
        "blob_host": "blobs.example",
        "upstream": "hub.example=http://[::1]:5000,blobs.example=https://mirror.lan",
    }
    assert parse_settings(options, dir=Path("/d"), certs=Path("/c")).named_hosts == {
        *((host, port) for host in ("registry.ollama.ai", "hub.example", "blobs.example") for port in (80, 443)),
        ("::1", 5000),
        ("mirror.lan", 443),
    }


# --- TLS


@on_loop
async def test_the_server_is_verified(tmp_path: Path) -> None:
    """A CA of one's own replaces certifi's; without it the server is not talked to, and the reason is told."""
    with Origin(tmp_path) as origin:
        digest = origin.add_blob(BLOB)
        origin.add_model(REPOSITORY, "latest", layers=[("application/x", digest)], config=digest)
        option, ca = origin.upstream_option, str(origin.ca_file)
        async with open_client(upstream=option, verify=True, trusted_ca=ca) as client:
            source, _ = await client.obtain(HOST, REPOSITORY, Digest.parse(digest), {}, timeout_s=20)
            stream = await client.open_range(source, 4, 8, expected_length=16, validator=None)
            assert await read(stream) == b"4567"
            origin.expire_signatures()
            with refused(SourceExpired, "^the source answered 403$"):
                await client.open_range(source, 8, 12, expected_length=16, validator=stream.validator)
        requests = len(origin.counters.requests)
        async with open_client(upstream=option, verify=True) as client:
            with refused(UpstreamUnreachable, f"^localhost:{origin.cdn_port}: .*its certificate is not accepted"):
                await client.open_range(source, 4, 8, expected_length=16, validator=None)
        assert len(origin.counters.requests) == requests
