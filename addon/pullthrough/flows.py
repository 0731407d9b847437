"""Flows turned into requests, and answers into responses; what is not ours to answer is passed through.

Invariant: a request that we may answer is held until it is complete, any other body flows; what fails here is an empty
response, never upstream's bytes by accident. Knows how mitmproxy works and nothing of how a request is answered.
"""

import logging
import time
from collections.abc import Callable

from mitmproxy import ctx, http

from pullthrough.blobserver import BlobServer
from pullthrough.errors import AddressRefused, CacheError, LoopDetected, Misdirected, Offline
from pullthrough.exchange import Answer, Request, failure
from pullthrough.gate import Gate, normal, refuse
from pullthrough.loopguard import CDN_LOOP, LoopGuard
from pullthrough.messages import has_body, is_reverse, request_of, response_of
from pullthrough.reader import Reader
from pullthrough.registry import Registry
from pullthrough.requestlog import log_answer, log_transfer
from pullthrough.settings import Settings
from pullthrough.streamlayer import Mouth, Transfer, Transfers

_log = logging.getLogger(__name__)


class Flows:
    """The part of the addon that sees requests. Answers none before `open`."""

    name = "ollama_cache_flows"

    def __init__(self, gate: Gate, transfers: Transfers) -> None:
        self._gate = gate
        self._transfers = transfers
        self._mouth = Mouth(lambda client: ctx.master.addons.get("proxyserver").connections.get(client))
        self._settings: Settings | None = None
        self._registry: Registry | None = None
        self._blob_server: BlobServer | None = None
        self._loop = LoopGuard("")
        self._served: Callable[[int], None] = lambda _: None

    def open(
        self,
        settings: Settings,
        registry: Registry,
        blob_server: BlobServer,
        loop: LoopGuard,
        served: Callable[[int], None] = lambda _: None,
    ) -> None:
        """From now on requests are answered by the registry's core, and large parts sent on to the blob server.

        `served` is told the bytes of each blob's body.
        """
        self._served = served
        self._settings = settings
        self._blob_server = blob_server
        self._registry = registry
        self._loop = loop

    def close(self) -> None:
        """Answer nothing any more; bodies under way go on."""
        self._registry = None

    def release(self) -> None:
        """End all bodies."""
        for transfer in list(self._transfers.values()):
            transfer.close()

    # --- hooks

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Let bodies flow: only requests that we may answer are held until they are complete."""
        try:
            if self._gate.is_ours(flow.request.host):
                self._gate.check_names(flow)
            if not self._may_answer(flow):
                self._check_way(flow)
                if not self._gate.is_ours(flow.request.host):
                    self._gate.check_plain(flow)
        except (AddressRefused, Misdirected, Offline) as error:
            _log.warning("%s", error)
            if has_body(flow.request):
                flow.kill()
            else:
                refuse(flow, error.status_hint, str(error))
            return
        if not self._may_answer(flow):
            self._reroute(flow)
            flow.request.stream = True

    async def request(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None or flow.error is not None or flow.request.stream:
            return
        try:
            if self._registry is None:
                raise CacheError("the cache is not open")
            answer = await self._registry.answer(self._request(flow))
            if answer is None:
                self._check_way(flow)
        except Offline as error:
            answer = failure(error)
        except Exception:
            # Never upstream's bytes by accident, never text that ends in a model file.
            _log.exception("answering %s failed", flow.request.path.partition("?")[0])
            flow.response = response_of(502, [], b"", 0)
            return
        if answer is None:
            self._reroute(flow)
        else:
            self._apply(flow, answer)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None and flow.id not in self._transfers:
            flow.response.stream = True

    def response(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    async def ollama_cache_piece(self, transfer: Transfer) -> None:
        """The stream layer wants the next piece of a body."""
        await self._mouth.fill(transfer)

    def _apply(self, flow: http.HTTPFlow, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else b""
        headers = [*answer.headers, ("Cache-Status", str(answer.cache))]
        flow.response = response_of(answer.status, headers, body, answer.length)
        if isinstance(answer.body, Reader):
            self._transfers[flow.id] = Transfer(flow, answer.body, held=answer.held)
        else:
            log_answer(
                flow.client_conn.peername[0], flow.request.method, flow.request.path, answer.status, str(answer.cache)
            )

    def _finish(self, flow: http.HTTPFlow) -> None:
        transfer = self._transfers.pop(flow.id, None)
        if transfer is None:
            return
        transfer.close()
        self._served(transfer.sent)
        assert flow.response
        log_transfer(
            flow.client_conn.peername[0],
            flow.request.method,
            flow.request.path,
            flow.response.status_code,
            flow.response.headers.get("Cache-Status", ""),
            sent=transfer.sent,
            seconds=time.monotonic() - transfer.began,
            problem=flow.error.msg if flow.error else "",
        )

    def _may_answer(self, flow: http.HTTPFlow) -> bool:
        return (
            (self._gate.is_ours(flow.request.host) or self._was_sent_on(flow.request))
            and flow.request.method in ("GET", "HEAD")
            and not has_body(flow.request)
        )

    def _was_sent_on(self, request: http.Request) -> bool:
        """Whether a client that has us for HTTP_PROXY too asks for what it was to ask our other port for."""
        return request.scheme == "http" and self._registry is not None and self._registry.director.is_ours(request.path)

    def _request(self, flow: http.HTTPFlow) -> Request:
        assert self._settings and self._blob_server
        if not self._gate.is_ours(flow.request.host):
            return request_of(flow, self._settings.blob_host)
        # What comes by http:// has come through HTTP_PROXY, and would come back here.
        leaves = flow.request.scheme == "https" and not is_reverse(flow)
        direct = self._blob_server.origin(flow.client_conn.sockname[0]) if leaves else None
        return request_of(flow, normal(flow.request.host), direct)

    def _check_way(self, flow: http.HTTPFlow) -> None:
        """LoopDetected if a request that is to be passed through has been here before; Offline if it may not leave."""
        if self._loop.is_own(flow.request.headers.get(CDN_LOOP)):
            raise LoopDetected(f"expected another way to {flow.request.host}, got one that leads back here")
        if self._gate.is_ours(flow.request.host) and self._settings is not None and self._settings.offline:
            raise Offline(f"offline: {flow.request.method} {flow.request.path.partition('?')[0]} is the registry's")

    def _reroute(self, flow: http.HTTPFlow) -> None:
        """Send a passed-through request where `upstream` says that its host is."""
        assert self._settings
        # No signature breaks: Ollama's and R2's cover the method, the address and named fields, of which this is none.
        flow.request.headers[CDN_LOOP] = self._loop.extend(flow.request.headers.get(CDN_LOOP))
        endpoint = self._settings.upstream.get(normal(flow.request.host))
        if endpoint is not None:
            flow.request.scheme, flow.request.host, flow.request.port = endpoint.scheme, endpoint.host, endpoint.port
        self._gate.parent.lead(flow.request, flow.server_conn)
