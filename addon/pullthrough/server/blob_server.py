"""The blob server: models by plain HTTP for those who ask this machine itself, and not through the proxy.

A port that `front` names speaks for a registry (manifests, blobs, chunk sums), and every port has the blobs at their
canonical address. Ollama wants another host name behind a blob's redirect (server/download.go, v0.3.1 and later): who
asked by name is sent to this server's address, and who asked by address gets the bytes at once.

Invariant: nothing is forwarded, and only what an anonymous caller may have is given: Authorization is dropped before
a request is looked at. An address that is handed out is made from the connection's own local address, never from what
the client says.
"""

import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from pullthrough.config.parsers import is_address
from pullthrough.config.settings import PREFIX, Endpoint, Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CACHE_NAME, CacheStatus, Outcome
from pullthrough.core.errors import CannotListen
from pullthrough.core.routes import ManifestRoute, parse_canonical_target, parse_registry_target
from pullthrough.delivery.accept_policy import AcceptPolicy
from pullthrough.delivery.aiohttp_body import send
from pullthrough.delivery.byte_sender import Sending
from pullthrough.delivery.byte_threads import ByteThreads
from pullthrough.net.browser_requests import asks_for_page
from pullthrough.net.connection_limits import ConnectionLimits
from pullthrough.recording.reader import Reader
from pullthrough.registry.messages import Answer, Request, gathered
from pullthrough.registry.service import Registry
from pullthrough.runtime import platform
from pullthrough.runtime.ports import BACKLOG, listening, reason, shown_address
from pullthrough.server.incomplete import begin_body, end_body, notices_short_bodies
from pullthrough.server.pages import Pages

_log = logging.getLogger(__name__)

AT_ONCE: Final = 32
"""Connections that are accepted before any of them is looked at: each takes a descriptor."""
IDLE_S: Final = 120.0
"""How long a connection may wait for a request: longer than Go keeps its end idle (net/http, 90 s)."""
SHUTDOWN_S: Final = 0.5
"""How long bodies may go on when the cache ends; aiohttp waits twice that."""

_SECRETS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})


class BlobServer:
    """Listens from its making; answers between `open` and `close`."""

    def __init__(self, settings: Settings) -> None:
        """Raise CannotListen where the settings' addresses cannot be listened on."""
        self._front = settings.fronts
        self._blob_host = settings.blob_host
        self._advertise = settings.advertise
        self._enclosed = settings.advertise is None and platform.in_container()
        self._registry: Registry | None = None
        self.pages = Pages(settings.advertise)
        """What this port gives besides models."""
        self._requests = RequestLog()
        self._threads: ByteThreads
        self._runner: web.ServerRunner | None = None
        self._sockets: list[socket.socket] = []
        try:
            for host, port in settings.listeners:
                self._sockets += listening(host, port)
        except OSError as error:
            self.release()
            where = shown_address(host, port)
            raise CannotListen(
                f"option {PREFIX}listen: expected a free address of this machine, got {where}: {reason(error, port)}"
            ) from error
        self._names = [
            shown_address(host, port) + (f" ({settings.fronts[port]})" if port in settings.fronts else "")
            for host, port in settings.listeners
        ]

    def __str__(self) -> str:
        """For people: where it listens, and for whom it speaks."""
        return ", ".join(self._names) or "off"

    def address_for(self, address: str) -> str | None:
        """Return where another cache that has reached `address` of this machine by another port may find this server.

        None where it has no way that we know of: nothing listens on that address, or it may be one of a container's
        own, which means nothing outside.
        """
        if not self._sockets:
            return None
        if self._advertise is not None:
            port = self._advertise.port or self._sockets[0].getsockname()[1]
            return replace(self._advertise, port=port).origin
        if self._enclosed:
            return None
        local = ipaddress.ip_address(address)
        for sock in self._sockets:
            host, port = sock.getsockname()[:2]
            bound = ipaddress.ip_address(host)
            if bound.version == local.version and (bound.is_unspecified or bound == local):
                return blob_origin(address, port) or None
        return None

    async def open(
        self,
        registry: Registry,
        admits: Callable[[str], bool],
        limits: ConnectionLimits,
        requests: RequestLog,
        threads: ByteThreads,
    ) -> None:
        """Serve from now on those whose address `admits`; `requests` is told of each answer, `threads` send bodies."""
        self._requests = requests
        self._threads = threads
        self._registry = registry
        listener = AcceptPolicy(self._handle, admits, limits, access_log=None, keepalive_timeout=IDLE_S)
        self._runner = web.ServerRunner(listener, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        for sock in self._sockets:
            await web.SockSite(self._runner, sock, backlog=AT_ONCE).start()
            sock.listen(BACKLOG)  # asyncio takes one number for both

    async def close(self) -> None:
        """Close the ports and end running requests. May be called twice, and without `open`."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.release()

    def release(self) -> None:
        """Close the ports only. May be called twice."""
        while self._sockets:
            self._sockets.pop().close()

    # --- requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.monotonic()
        try:
            if (page := await self.pages.answer(request)) is not None:
                page.headers["Server"] = CACHE_NAME
                return page
            answer = await gathered(
                await self._answer(request), lambda: request.transport is None or request.transport.is_closing()
            )
        except Exception:
            _log.exception("answering %s failed", request.raw_path.partition("?")[0])
            answer = Answer(502, CacheStatus(Outcome.MISS))
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers:
            # No credentials are taken here; a challenge would make Ollama send a token in clear text.
            if name.lower() != "www-authenticate":
                response.headers.add(name, value)
        response.headers["Cache-Status"] = str(answer.cache)
        response.headers["Server"] = CACHE_NAME
        response.content_length = answer.length
        line = (request.remote or "", request.method, request.raw_path, answer.status, answer.cache)
        if not isinstance(answer.body, Reader):
            await response.prepare(request)
            if answer.body and request.method != "HEAD":
                await response.write(answer.body)
            self._requests.answer(*line)
            return response
        sending = Sending(problem="cut off")
        careful = not notices_short_bodies(request.headers.get("User-Agent", ""))
        sock = request.transport.get_extra_info("socket") if careful and request.transport is not None else None
        try:
            if sock is not None:
                begin_body(sock)
            await response.prepare(request)
            await send(request, response, answer.body, sending, self._threads)
            if sock is not None and not sending.problem:
                end_body(sock)
        finally:
            answer.body.sent = sending.sent
            answer.body.close()
            seconds = time.monotonic() - began
            self._requests.transfer(*line, sent=sending.sent, seconds=seconds, problem=sending.problem)
        if sending.problem:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "this cache is read-only; push to the registry itself", ("Allow", "GET, HEAD"))
        assert self._registry is not None and request.transport is not None
        address, port = request.transport.get_extra_info("sockname")[:2]
        canonical = parse_canonical_target(request.raw_path) is not None
        host = self._blob_host if canonical else self._front.get(port, "")
        headers = {name.lower(): ", ".join(request.headers.getall(name)) for name in request.headers}
        asked = {name: value for name, value in headers.items() if name not in _SECRETS}
        if asks_for_page(asked):
            if canonical:
                return Answer(403, CacheStatus(Outcome.BYPASS))
            return _refusal(403, "web pages may not load models from here; use Ollama, or curl")
        origin = blob_origin(address, port)
        answer = await self._registry.answer(
            Request(
                request.method,
                "http",
                host,
                request.raw_path,
                asked,
                blobs=origin,
                inline="range" in asked or not origin or not is_name(asked.get("host", "")),
                client=request.remote or "",
            )
        )
        if answer is not None:
            return _in_words(answer, request.raw_path, host)
        if canonical:
            return Answer(403, CacheStatus(Outcome.BYPASS))
        return _refusal(404, f"nothing is served at this address but the models of {host or 'a named registry'}")


def _in_words(answer: Answer, target: str, host: str) -> Answer:
    """Return the answer, but a refusal in words instead of a challenge, which no client can meet here.

    To 401 without a challenge Ollama says `realm host "" does not match`; the text behind another status it shows.
    """
    if answer.status != 401:
        return answer
    route = parse_registry_target(target)
    if not isinstance(route, ManifestRoute):
        return replace(answer, status=403, headers=(), body=b"", length=0)
    model = f"{host}/{route.repository}"
    message = (
        f"{model} is private, or there is no such model: this port of the cache gives public models only. Pull it by "
        "HTTPS_PROXY through the cache's proxy, or from the registry itself."
    )
    return _refusal(403, message, code="DENIED")


def blob_origin(address: str, port: int) -> str:
    """Return the origin under which a client finds this server by its `address`, the local end of a connection of
    theirs.

    "" for an address that means something on one link only, of which a client would need its own name.
    """
    if ipaddress.ip_address(address).is_link_local and ":" in address:
        return ""
    return Endpoint("http", address, port).origin


def is_name(authority: str) -> bool:
    """Return whether a Host field names the server, and does not merely give its address."""
    try:
        host = urlsplit(f"//{authority}").hostname
    except ValueError:
        return False
    return bool(host) and not is_address(host or "")


def _refusal(status: int, message: str, *headers: tuple[str, str], code: str = "UNSUPPORTED") -> Answer:
    """In the registry's own shape (OCI distribution-spec, "Error codes")."""
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    fields = (("Content-Type", "application/json"), *headers)
    return Answer(status, CacheStatus(Outcome.BYPASS), fields, body, len(body))
