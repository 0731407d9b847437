"""The core of the cache in this process, before a registry that lies about one model at a time.

Invariant: what is not lied about is answered as Ollama's registry and its blob host would. Everything is plain HTTP on
loopback, on one loop, so that a thousand scenes take minutes. Knows the core's parts, and no proxy.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST, Endpoint
from pullthrough.core.digest import Digest
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.routes import canonical_path
from pullthrough.library.eviction import Evictor
from pullthrough.recording import recording, retry_policy
from pullthrough.recording.plan import Line
from pullthrough.recording.rate_limit import RateLimit
from pullthrough.recording.reader import FileSpan, Memory, Reader
from pullthrough.recording.recorder import Recorder
from pullthrough.registry import grants
from pullthrough.registry.factory import build_registry
from pullthrough.registry.grants import Grants
from pullthrough.registry.messages import Answer, Request
from pullthrough.registry.service import Registry
from pullthrough.runtime import platform
from pullthrough.runtime.executors import Threads
from pullthrough.store.store import Store
from pullthrough.upstream import client
from pullthrough.upstream.client import Upstream
from tests.lies import MARK, Lie

HOST: Final = "registry.ollama.ai"
GOOD: Final = "Bearer good"
SIZE: Final = 20_000
CHALLENGE: Final = f'Bearer realm="https://{HOST}/token",service="registry",scope="pull"'

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Model:
    """One blob in one repository."""

    repository: str
    blob: bytes
    private: bool
    lie: Lie | None = None

    @cached_property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(self.blob).hexdigest())

    @cached_property
    def manifest(self) -> bytes:
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": str(self.digest), "size": len(self.blob)}
        return json.dumps({"schemaVersion": 2, "mediaType": DOCKER_TYPE, "layers": [layer]}).encode()


@dataclass
class Origin:
    """Registry and blob host on one port."""

    models: dict[str, Model] = field(default_factory=dict)
    port: int = 0

    def add(self, number: int, *, private: bool, size: int = SIZE) -> Model:
        """A model of its own."""
        model = Model(f"library/m{number}", random.Random(number).randbytes(size), private)
        self.models[model.repository] = self.models[model.digest] = model
        return model

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split(" ")
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
                answer, closes = self._answer(method, target, fields)
                writer.write(answer)
                await writer.drain()
                if closes:
                    return

    def _answer(self, method: str, target: str, fields: dict[str, str]) -> tuple[bytes, bool]:
        head = method == "HEAD"
        if target.startswith("/portal"):
            return _say(200, b"<html>" + MARK, "Content-Type: text/html", head=head), False
        match = re.fullmatch(r"/v2/(library/m\d+)/(manifests|blobs|chunksums)/(\S+)", target)
        model = self.models.get(match[1]) if match else None
        if model is None:
            digest = re.search(r"sha256[:/](?:../)?([0-9a-f]{64})", target)
            model = self.models.get(f"sha256:{digest[1]}") if digest else None
            place = "source" if target.startswith("/elsewhere") else "store"
        else:
            assert match is not None
            place = {"manifests": "manifest", "chunksums": "sums"}.get(match[2], "head" if head else "blob")
        if model is None:
            return _say(404, b"404 page not found\n", "Content-Type: text/plain"), False
        found = _RANGE.fullmatch(fields.get("range", ""))
        asked = (int(found[1]), int(found[2]) + 1) if found else None
        if model.lie is not None and model.lie.place == place:
            return model.lie.answer(model.blob, asked, head=head), model.lie.closes
        if place in ("source", "store"):
            return _content(model.blob, asked), False
        if model.private and fields.get("authorization") != GOOD:
            error = b'{"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}'
            return _say(
                401, error, "Content-Type: application/json", f"WWW-Authenticate: {CHALLENGE}", head=head
            ), False
        if place == "manifest":
            told = f"ollama-content-digest: {hashlib.sha256(model.manifest).hexdigest()}" if head else "X: y"
            return _say(200, model.manifest, f"Content-Type: {DOCKER_TYPE}", told, head=head), False
        if place == "head":
            return _say(200, model.blob, "Content-Type: application/octet-stream", head=True), False
        elsewhere = model.lie is not None and model.lie.place == "source"
        location = f"https://{R2_HOST}{canonical_path(model.digest)}?{SIGNED}"
        location = f"https://{HOST}/elsewhere/{model.digest}" if elsewhere else location
        if place == "sums":
            sums = f"{model.digest} 0-{len(model.blob) - 1}\n".encode()
            return _say(200, sums, "Content-Type: text/plain", f"Content-Location: {location}"), False
        return _say(307, b"", f"Location: {location}"), False


SIGNED: Final = "X-Amz-Date=20990101T000000Z&X-Amz-Expires=86400&X-Amz-Signature=00"


def _say(status: int, body: bytes, *lines: str, head: bool = False) -> bytes:
    text = "\r\n".join([f"HTTP/1.1 {status} Well", *lines, f"Content-Length: {len(body)}", "", ""])
    return text.encode() + (b"" if head else body)


def _content(blob: bytes, asked: tuple[int, int] | None) -> bytes:
    if asked is None:
        return _say(200, blob, "Content-Type: application/octet-stream")
    start, stop = asked[0], min(asked[1], len(blob))
    told = f"Content-Range: bytes {start}-{stop - 1}/{len(blob)}"
    return _say(206, blob[start:stop], "Content-Type: application/octet-stream", told)


@dataclass
class Cache:
    """The core, its store and what it asks."""

    origin: Origin
    store: Store
    upstream: Upstream
    recorder: Recorder
    core: Registry
    grants: Grants

    async def ask(self, method: str, target: str, *, authorization: str | None = None, new: bool = False) -> Answer:
        """The answer to a client: one that asks the plain port, or a `new` Ollama that has us for its proxy."""
        headers = {"user-agent": "ollama/0.41.0 (amd64 linux) Go/go1.27" if new else "curl/8"}
        if authorization is not None:
            headers["authorization"] = authorization
        scheme = "https" if new else "http"
        request = Request(method, scheme, HOST, target, headers, inline=not new, client="10.0.0.2", tunnelled=new)
        answer = await self.core.answer(request)
        assert answer is not None
        return answer

    async def body(self, answer: Answer) -> bytes:
        """All bytes that a client would get."""
        if isinstance(answer.body, bytes):
            return answer.body
        return await read(answer.body)

    async def pull(self, model: Model, authorization: str | None) -> bytes:
        """The blob, as a client that tries again pulls it: manifest first. What was down meanwhile is up again."""
        problem = ""
        for _ in range(6):
            self.upstream._down_until.clear()
            await self.ask("GET", f"/v2/{model.repository}/manifests/latest", authorization=authorization)
            answer = await self.ask("GET", f"/v2/{model.repository}/blobs/{model.digest}", authorization=authorization)
            try:
                body = await self.body(answer)
            except Exception as error:
                problem = f"{answer.status}: {error!r}"
                continue
            if answer.status == 200 and hashlib.sha256(body).hexdigest() == model.digest.hex:
                return body
            problem = str(answer.status)
            recording = self.recorder.find(model.digest)
            if recording is not None and recording.size == recording.present:
                # All of it is here, and about to be found wrong; a client's next try comes later than that.
                await recording.over.wait()
        raise AssertionError(f"expected {model.repository} to be pullable, got {problem}")


async def read(reader: Reader) -> bytes:
    """All bytes of a reader, which is closed. Raises as the reader does."""
    found = b""
    try:
        while not reader.done:
            match await reader.next(1 << 20, 0.5):
                case FileSpan() as span:
                    found += platform.read_at(span.descriptor, span.start, span.stop - span.start)
                case Memory(data):
                    found += data
    finally:
        reader.close()
    return found


@contextlib.asynccontextmanager
async def cache(folder: Path) -> AsyncIterator[Cache]:
    """A cache and its origin; what it waits for between tries is next to nothing."""
    origin, threads = Origin(), Threads()
    server = await asyncio.start_server(origin.serve, "127.0.0.1", 0)
    origin.port = server.sockets[0].getsockname()[1]
    there = f"http://127.0.0.1:{origin.port}"
    options = {
        "upstream": f"{HOST}={there},{R2_HOST}={there}",
        "prefetch": "false",
        "manifest_lifetime": "0",
        "min_free": "0",
    }
    settings = parse_settings(options, dir=folder, certs=folder)
    login = Endpoint("http", "127.0.0.1", origin.port)
    settings = replace(settings, upstream={**settings.upstream, "login.example": login})
    store = Store.open(folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", lambda cafile: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        for module, name, value in (
            (grants, "PAUSES_S", ()),
            (client, "PAUSES_S", ()),
            (retry_policy, "MAX_LIES", 0),
            (retry_policy, "FIRST_S", 0.05),
            (retry_policy, "MAX_UNEXPECTED", 4),
            (retry_policy, "BACKOFF_S", 0.001),
            (retry_policy, "BACKOFF_LIMIT_S", 0.01),
            (retry_policy, "GIVE_UP_S", 0.2),
            (recording, "IDLE_S", 0.05),
            (recording, "LINGER_S", 0.0),
        ):
            patch.setattr(module, name, value)
        upstream = Upstream(settings)
        await upstream.open()
        evictor = Evictor(store, threads, max_size=None, min_free=0)
        recorder = Recorder(store, evictor, upstream, threads, Line(4, RateLimit(None)), settings.finish)
        side = build_registry(settings, store, upstream, recorder)
        try:
            yield Cache(origin, store, upstream, recorder, side.registry, side.grants)
        finally:
            await side.redirects.close()
            await side.prefetcher.close()
            await recorder.close()
            await upstream.close()
            server.close()
            threads.close()
            store.close()
