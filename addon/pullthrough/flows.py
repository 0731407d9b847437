"""Flows turned into requests, and answers into responses; what is not ours to answer is passed through.

Invariant: a request that we may answer is held until it is complete, any other body flows; what fails here is an empty
response, never upstream's bytes by accident. Knows how mitmproxy works and nothing of how a request is answered.
"""

import logging
import time
from typing import Final

from mitmproxy import ctx, http

from pullthrough.cachestatus import CacheStatus, Outcome
from pullthrough.errors import AddressRefused, CacheError, LoopDetected, Misdirected, Offline
from pullthrough.exchange import Answer, failure
from pullthrough.gate import Gate, normal, refuse
from pullthrough.loopguard import CDN_LOOP, LoopGuard
from pullthrough.messages import has_body, request_of, response_of
from pullthrough.reader import Reader
from pullthrough.registry import Registry
from pullthrough.requestlog import RequestLog
from pullthrough.settings import Settings
from pullthrough.streamlayer import Mouth, Transfer, Transfers

_log = logging.getLogger(__name__)

ANSWERED: Final = "ollama_cache_status"
"""Where a flow's metadata say how we have answered it."""


class Flows:
    """The part of the addon that sees requests. Answers none before `open`."""

    name = "ollama_cache_flows"

    def __init__(self, gate: Gate, transfers: Transfers) -> None:
        self._gate = gate
        self._transfers = transfers
        self._mouth = Mouth(lambda client: ctx.master.addons.get("proxyserver").connections.get(client))
        self._settings: Settings | None = None
        self._registry: Registry | None = None
        self._loop = LoopGuard("")
        self._requests = RequestLog()

    def open(
        self,
        settings: Settings,
        registry: Registry,
        loop: LoopGuard,
        requests: RequestLog,
    ) -> None:
        """From now on requests are answered by the registry's core; `requests` is told how each request ended."""
        self._requests = requests
        self._settings = settings
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
            if self._may_answer(flow):
                return
            self._check_way(flow)
            if not self._gate.is_ours(flow.request.host):
                self._gate.check_plain(flow)
            self._reroute(flow)
            flow.request.stream = True
        except (AddressRefused, Misdirected, Offline) as error:
            self._refuse(flow, error.status_hint, str(error))
        except Exception:
            _log.exception("request policy failed; refused")
            self._refuse(flow, 502, "request refused")

    def _refuse(self, flow: http.HTTPFlow, status: int, message: str) -> None:
        """Answer with a refusal, or end the connection of a client that is about to send a body."""
        if has_body(flow.request):
            _log.warning("%s", message)
            flow.kill()
        else:
            refuse(flow, status, message)

    async def request(self, flow: http.HTTPFlow) -> None:
        if flow.response is not None or flow.error is not None or flow.request.stream:
            return
        try:
            if self._registry is None:
                raise CacheError("the cache is not open")
            answer = await self._registry.answer(request_of(flow, normal(flow.request.host)))
            if answer is None:
                self._check_way(flow)
                self._reroute(flow)
            else:
                self._apply(flow, answer)
        except Offline as error:
            self._apply(flow, failure(error))
        except Exception:
            # Never upstream's bytes by accident, never text that ends in a model file.
            _log.exception("answering %s failed", flow.request.path.partition("?")[0])
            self._apply(flow, Answer(502, CacheStatus(Outcome.MISS)))

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
        # A body behind the head that answers a HEAD would be taken for the next response.
        body = answer.body if isinstance(answer.body, bytes) and flow.request.method != "HEAD" else b""
        headers = [*answer.headers, ("Cache-Status", str(answer.cache))]
        flow.response = response_of(answer.status, headers, body, answer.length)
        flow.metadata[ANSWERED] = answer.cache
        if isinstance(answer.body, Reader):
            self._transfers[flow.id] = Transfer(flow, answer.body, held=answer.held)

    def _finish(self, flow: http.HTTPFlow) -> None:
        transfer = self._transfers.pop(flow.id, None)
        if transfer is not None:
            transfer.close()
        if flow.response is None:
            return
        client, request, status = flow.client_conn.peername[0], flow.request, flow.response.status_code
        # What nobody here has answered was passed through, or refused.
        cache = flow.metadata.get(ANSWERED, CacheStatus(Outcome.BYPASS))
        if transfer is None:
            self._requests.answer(client, request.method, request.path, status, cache)
            return
        self._requests.transfer(
            client,
            request.method,
            request.path,
            status,
            cache,
            sent=transfer.sent,
            seconds=time.monotonic() - transfer.began,
            problem=flow.error.msg if flow.error else "",
        )

    def _may_answer(self, flow: http.HTTPFlow) -> bool:
        return (
            self._gate.is_ours(flow.request.host)
            and flow.request.method in ("GET", "HEAD")
            and not has_body(flow.request)
        )

    def _check_way(self, flow: http.HTTPFlow) -> None:
        """LoopDetected if a request that is to be passed through has been here before; Offline if it may not leave."""
        if self._loop.is_own(flow.request.headers.get(CDN_LOOP)):
            raise LoopDetected(f"expected another way to {flow.request.host}, got one that leads back here")
        if self._gate.is_ours(flow.request.host) and self._settings is not None and self._settings.offline:
            raise Offline(f"offline: {flow.request.method} {flow.request.path.partition('?')[0]} is the registry's")

    def _reroute(self, flow: http.HTTPFlow) -> None:
        """Let a request through to its host."""
        # No signature breaks: Ollama's and R2's cover the method, the address and named fields, of which this is none.
        flow.request.headers[CDN_LOOP] = self._loop.extend(flow.request.headers.get(CDN_LOOP))
        # What it takes to use this proxy is nobody's business behind it (RFC 9110 section 11.7.2).
        flow.request.headers.pop("Proxy-Authorization", None)
        self._gate.pass_on(flow)
