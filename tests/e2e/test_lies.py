"""Lies of the table in tests/lies.py through a real mitmdump: by HTTPS_PROXY, as Ollama asks, and at the plain port.

tests/unit/registry/test_lies.py walks all of them through the core; here what stands between the core and a client is
in the way.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import pytest

from tests.e2e.conftest import get, to_cdn, to_registry
from tests.lies import LIES, LOGIN, MARK, Lie
from tests.support.http1 import ClosedBeforeResponse, Connection, ProtocolError, connect
from tests.support.liar import GOOD, HOST, Model, Origin
from tests.support.origin import R2_HOST
from tests.support.proxy import Proxy, patched

SHARE: Final = 10
"""How many lies are walked by default."""
DOORS: Final = ("proxy", "plain")
NUMBERS: Final = count()

IMPATIENT: Final = """
import socket
from pullthrough.recording import retry_policy, recording
from pullthrough.registry import freshness, grants
from pullthrough.upstream import client
freshness.DOWN_S = 0.0
grants.PAUSES_S = client.PAUSES_S = ()
retry_policy.MAX_LIES = 0
retry_policy.FIRST_S = 0.05
retry_policy.MAX_UNEXPECTED = 4
retry_policy.BACKOFF_S = 0.001
retry_policy.BACKOFF_LIMIT_S = 0.01
retry_policy.GIVE_UP_S = 0.2
recording.IDLE_S = 0.05
recording.LINGER_S = 0.0
real = socket.getaddrinfo

def here_only(host, *arguments, **options):
    if str(host) not in ("127.0.0.1", "localhost", "::1"):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return real(host, *arguments, **options)

socket.getaddrinfo = here_only
"""
"""What waits for better times in earnest gives up at once, and no name leads off this machine."""


@dataclass
class Scene:
    """A cache in front of an origin that lies."""

    origin: Origin
    proxy: Proxy

    def add(self, *, private: bool) -> Model:
        return self.origin.add(next(NUMBERS), private=private)

    def to(self, door: str) -> Connection:
        """To the registry: through the proxy, or at the plain port."""
        if door == "proxy":
            return to_registry(self.proxy)
        return connect(None, "127.0.0.1", self.proxy.front_port, None)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("lies")
    origin, started, stop = Origin(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(origin.serve, "127.0.0.1", 0, limit=1 << 20)
        origin.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, name="liar")
    thread.start()
    assert started.wait(20)
    there = f"http://127.0.0.1:{origin.port}"
    options = {
        "ollama_cache_upstream": f"{HOST}={there},{R2_HOST}={there}",
        "ollama_cache_prefetch": False,
        "ollama_cache_manifest_lifetime": "0",
    }
    try:
        with Proxy(folder, program=patched(folder, IMPATIENT), front=True, **options) as proxy:
            yield Scene(origin, proxy)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


def shares(state: str) -> list[object]:
    """The lies in portions of SHARE, each spread over the table; the first one is walked by default."""
    step = -(-len(LIES) // SHARE)
    portions = [LIES[(number + (state == "cold")) % step :: step] for number in range(step)]
    marks = [pytest.mark.long, pytest.mark.timeout(300)]
    return [
        pytest.param(state, portion, id=f"{state}-{number}", marks=marks if number else [])
        for number, portion in enumerate(portions)
    ]


@pytest.mark.parametrize(("state", "portion"), [*shares("held"), *shares("cold")])
def test_lies(scene: Scene, state: str, portion: Sequence[Lie]) -> None:
    """No page in a file, no leak, nothing that stays unpullable, and nothing in the log that was not foreseen."""
    scene.proxy.forget_lines()
    since, found = len(scene.proxy.output), []
    for number, lie in enumerate(portion):
        private = number % 2 == 1
        model = scene.add(private=private)
        owner = GOOD if private else None
        if state == "held":
            assert pull(scene, model, owner) == model.blob
        model.lie = lie
        found += [f"{lie}: {what}" for caller in {None, owner} for what in tell(scene, model, caller)]
        model.lie = None
        if pull(scene, model, owner) != model.blob:
            found.append(f"{lie}: a page in a file")
        if private:
            found += [f"{lie}: leak, {what}" for what in leaks(scene, model)]
    assert found == []
    assert [line for line in scene.proxy.output[since:] if "Traceback" in line or " failed; refused" in line] == []


def ask(connection: Connection, method: str, target: str, caller: str | None) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own; no answer is status 0. A short body is given as far as it came."""
    fields = [("User-Agent", "ollama/0.34.4 (amd64 linux) Go/go1.26")]
    if caller is not None:
        fields.append(("Authorization", caller))
    with connection:
        try:
            response = connection.request(method, target, fields)
            body = response.read()
        except (ClosedBeforeResponse, ConnectionError):
            return 0, {}, b""
        except ProtocolError as error:
            return 0, {}, f"no HTTP: {error}".encode()
        short = response.ended != "complete"
        headers = {name.lower(): value for name, value in response.headers}
        return response.status, headers | ({"short": "yes"} if short else {}), body


def tell(scene: Scene, model: Model, caller: str | None) -> Iterator[str]:
    """What a client is told while the lie goes on, and should not be."""
    manifest, blob = (f"/v2/{model.repository}/{kind}" for kind in ("manifests/latest", f"blobs/{model.digest}"))
    may = caller is not None or not model.private
    for door in DOORS:
        for method in ("GET", "HEAD"):
            status, headers, body = ask(scene.to(door), method, manifest, caller)
            if status == 200 and body not in (b"", model.manifest) and not body.startswith(b"{"):
                yield f"{door}: {method} manifest: {body[:40]!r}"
            if (status >= 400 and MARK in body) or strange(headers):
                yield f"{door}: {method} manifest: {status} {headers} {body[:40]!r}"
        for method in ("HEAD", "GET"):
            status, headers, body = ask(scene.to(door), method, blob, caller)
            if status == 307:
                location = headers["location"]
                if location.startswith(f"https://{R2_HOST}/"):
                    place = to_cdn(scene.proxy)
                else:
                    place = connect(None, "127.0.0.1", scene.proxy.front_port, None)
                status, headers, body = ask(place, method, f"/{location.split('/', 3)[3]}", None)
            whole = status == 200 and "short" not in headers
            if MARK in body or strange(headers) or (whole and method == "GET" and body != model.blob):
                yield f"{door}: {method} blob: {status} {headers} {body[:40]!r}"
            if (status >= 400 or status == 0) and body:
                yield f"{door}: {method} blob: {status} with a text {body[:40]!r}"
            if not may and whole and body:
                yield f"{door}: leak: {status}"


def strange(headers: dict[str, str]) -> bool:
    return any(LOGIN in value or not value.isascii() or not value.isprintable() for value in headers.values())


def pull(scene: Scene, model: Model, owner: str | None) -> bytes:
    """The blob, by a client that asks for the manifest first and tries again; private ones come through the proxy."""
    seen = []
    for _ in range(8):
        ask(to_registry(scene.proxy), "GET", f"/v2/{model.repository}/manifests/latest", owner)
        target = f"/v2/{model.repository}/blobs/{model.digest}"
        status, headers, body = ask(to_registry(scene.proxy), "GET", target, owner)
        if status == 307:
            place = headers["location"].removeprefix(f"https://{R2_HOST}")
            status, headers, body = ask(to_cdn(scene.proxy), "GET", place, None)
        if status == 200 and "short" not in headers:
            return body
        seen.append(status)
    raise AssertionError(f"expected {model.repository} to be pullable, got {seen}")


def leaks(scene: Scene, model: Model) -> Iterator[str]:
    """What nobody in particular gets of a private model, once its owner has it."""
    for door in DOORS:
        for kind in ("manifests/latest", f"blobs/{model.digest}"):
            with scene.to(door) as connection:
                status, _, _ = get(connection, f"/v2/{model.repository}/{kind}")
            if status not in (401, 403):
                yield f"{door} {kind}: {status}"
