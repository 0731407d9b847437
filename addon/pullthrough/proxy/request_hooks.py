"""Flows turned into requests, and answers into responses; what is not ours to answer is passed through.

Invariant: a request that we may answer is held until it is complete, any other body is streamed; a failure here gives
an empty response, never upstream's bytes by accident.
"""

import logging
import time
from dataclasses import replace
from typing import Final

from mitmproxy import http

from pullthrough.config.settings import Settings
from pullthrough.core.access_log import RequestLog
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.cdn_loop import CDN_LOOP, LoopGuard
from pullthrough.core.errors import AddressRefused, CacheError, LoopDetected, Misdirected, Offline
from pullthrough.delivery.byte_sender import Sending
from pullthrough.delivery.loopback import Loopback
from pullthrough.proxy.connection_hooks import ConnectionHooks, normal, own_ports, refuse
from pullthrough.proxy.front_page import front_page, guidance
from pullthrough.proxy.messages import has_body, is_to_proxy, request_of, response_of
from pullthrough.recording.reader import Reader
from pullthrough.registry.messages import Answer, failure, gathered
from pullthrough.registry.service import Registry

_log = logging.getLogger(__name__)

ANSWERED: Final = "ollama_cache_status"
"""The key in a flow's metadata for how we answered it."""
REPOINTED: Final = "ollama_cache_answer"
"""The key in a flow's metadata for an answer whose body comes from our own listener."""


class RequestHooks:
    """The part of the addon that handles requests. Answers none before `open`."""

    name = "ollama_cache_flows"

    def __init__(self, connection_hooks: ConnectionHooks) -> None:
        self._connection_hooks = connection_hooks
        self._loopback: Loopback | None = None
        self._settings: Settings | None = None
        self._registry: Registry | None = None
        self._loop = LoopGuard("")
        self._requests = RequestLog()

    def open(
        self, settings: Settings, registry: Registry, loop: LoopGuard, requests: RequestLog, loopback: Loopback
    ) -> None:
        """Let `registry` answer requests from now on; `requests` is told how each one ended.

        The bodies come from `loopback`.
        """
        self._loopback = loopback
        self._requests = requests
        self._settings = settings
        self._registry = registry
        self._loop = loop

    def close(self) -> None:
        """Stop answering; bodies under way go on."""
        self._registry = None

    # --- hooks

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Stream bodies: only requests that we may answer are held until they are complete."""
        try:
            # If we answered, the whole body would be held in memory: a request with one is treated like any other.
            settings = self._settings if not has_body(flow.request) else None
            if settings is not None and (page := front_page(flow.request, settings, own_ports)):
                flow.response = http.Response.make(307, b"", {"Location": page, "Cache-Control": "no-store"})
                return
            if self._connection_hooks.is_ours(flow.request.host):
                self._connection_hooks.check_names(flow)
            elif settings is not None and is_to_proxy(flow) and (told := guidance(flow.request, settings, own_ports)):
                flow.response = told
                return
            if self._may_answer(flow):
                return
            self._check_way(flow)
            if not self._connection_hooks.is_ours(flow.request.host):
                self._connection_hooks.check_plain(flow)
            self._reroute(flow)
            flow.request.stream = True
        except (AddressRefused, Misdirected, Offline) as error:
            self._refuse(flow, error.status_hint, str(error))
        except Exception:
            _log.exception("request policy failed; refused")
            self._refuse(flow, 502, "request refused")

    def _refuse(self, flow: http.HTTPFlow, status: int, message: str) -> None:
        """Answer with a refusal; if the client is about to send a body, end its connection instead."""
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
                self._apply(flow, await gathered(answer, lambda: not flow.client_conn.connected))
        except Offline as error:
            self._apply(flow, failure(error))
        except Exception:
            # Never upstream's bytes by accident, never text that ends in a model file.
            _log.exception("answering %s failed", flow.request.path.partition("?")[0])
            self._apply(flow, Answer(502, CacheStatus(Outcome.MISS)))

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None:
            return
        if answer := flow.metadata.get(REPOINTED):
            head = _response(answer, flow.request.method)
            flow.response.status_code, flow.response.reason = head.status_code, head.reason
            flow.response.headers = head.headers
        flow.response.stream = True

    def response(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        self._finish(flow)

    def _apply(self, flow: http.HTTPFlow, answer: Answer) -> None:
        flow.metadata[ANSWERED] = answer.cache
        if isinstance(answer.body, Reader):
            self._repoint(flow, replace(answer, body=b""), answer.body)
        else:
            flow.response = _response(answer, flow.request.method)

    def _repoint(self, flow: http.HTTPFlow, answer: Answer, reader: Reader) -> None:
        """Have mitmproxy stream the body from our own listener, under the answer's head."""
        assert self._loopback is not None
        line = (flow.client_conn.peername[0], flow.request.method, flow.request.path, answer.status, answer.cache)
        began = time.monotonic()

        def note(sending: Sending) -> None:
            seconds = time.monotonic() - began
            self._requests.transfer(*line, sent=sending.sent, seconds=seconds, problem=sending.problem)

        path = self._loopback.offer(reader, note)
        flow.metadata[REPOINTED] = answer
        self._connection_hooks.repoint(flow)
        flow.request.path = path
        flow.request.headers = http.Headers(Host=self._loopback.address[0])

    def _finish(self, flow: http.HTTPFlow) -> None:
        if flow.response is None or REPOINTED in flow.metadata:
            return
        client, request, status = flow.client_conn.peername[0], flow.request, flow.response.status_code
        # A request that we did not answer was passed through or refused.
        cache = flow.metadata.get(ANSWERED, CacheStatus(Outcome.BYPASS))
        self._requests.answer(client, request.method, request.path, status, cache)

    def _may_answer(self, flow: http.HTTPFlow) -> bool:
        return (
            self._connection_hooks.is_ours(flow.request.host)
            and flow.request.method in ("GET", "HEAD")
            and not has_body(flow.request)
        )

    def _check_way(self, flow: http.HTTPFlow) -> None:
        """Raise LoopDetected if a request to be passed through has been here before, Offline if it may not leave."""
        if self._loop.is_own(flow.request.headers.get(CDN_LOOP)):
            raise LoopDetected(f"expected another way to {flow.request.host}, got one that leads back here")
        if self._connection_hooks.is_ours(flow.request.host) and self._settings is not None and self._settings.offline:
            raise Offline(f"offline: {flow.request.method} {flow.request.path.partition('?')[0]} is the registry's")

    def _reroute(self, flow: http.HTTPFlow) -> None:
        """Let a request through to its host."""
        # CDN-Loop breaks no signature: Ollama's and R2's cover the method, the address and named fields, but not this.
        flow.request.headers[CDN_LOOP] = self._loop.extend(flow.request.headers.get(CDN_LOOP))
        # Credentials for this proxy must not reach the servers behind it (RFC 9110 section 11.7.2).
        flow.request.headers.pop("Proxy-Authorization", None)
        self._connection_hooks.pass_on(flow)


def _response(answer: Answer, method: str) -> http.Response:
    # A body after the answer to a HEAD would be taken for the next response.
    body = answer.body if isinstance(answer.body, bytes) and method != "HEAD" else b""
    return response_of(answer.status, [*answer.headers, ("Cache-Status", str(answer.cache))], body, answer.length)
