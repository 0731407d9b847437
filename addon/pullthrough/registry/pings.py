"""Answer the requests by which clients check that a registry is there: `GET` and `HEAD` of `/` and `/v2/`.

While the registry is unreachable they get its last answer to an anonymous request, so that a client whose models are
all here does not give up at the first step (OCI distribution-spec, "Determining Support").

Invariant: only an answer in a registry's shape is given or remembered: an ordinary status, no page, a small body, and
fields that mean the same to everybody. Remembered in memory only, one answer for each registry, target and method.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.errors import UnexpectedResponse, UpstreamError, UpstreamTimeout
from pullthrough.registry.freshness import DOWN_S, REVALIDATE_TIMEOUT_S
from pullthrough.registry.messages import Answer, Request, explained
from pullthrough.upstream.client import DEADLINE_S, Upstream
from pullthrough.upstream.impostors import Response
from pullthrough.upstream.refusals import is_page
from pullthrough.upstream.response_checks import relayable

_log = logging.getLogger(__name__)

TARGETS: Final = frozenset({"/", "/v2/"})
ORDINARY: Final = frozenset({200, 401, 404})
"""A registry's statuses when all is well. Ollama's has no `/v2/` and answers 404; others ask for a token."""
LONGEST_BODY: Final = 64 << 10
_NOT_NOW: Final = 429


@dataclass(frozen=True, slots=True)
class Greeting:
    """A registry's own answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: int
    """Its Content-Length, even if there was no body."""

    @classmethod
    def of(cls, response: Response) -> "Greeting | None":
        """Return the part that may be given to anyone who asks the same; None if this is not a registry's ordinary
        answer."""
        fields = response.headers
        if response.status not in ORDINARY or is_page(fields) or len(response.body) > LONGEST_BODY:
            return None
        told = fields.get("Content-Length", "")
        length = int(told) if not response.body and told.isascii() and told.isdecimal() else len(response.body)
        return cls(response.status, tuple(relayable(fields)), response.body, length)


class LastGreetings:
    """Each registry's last answers."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, str], Greeting] = {}

    def remember(self, host: str, target: str, method: str, greeting: Greeting) -> None:
        """Remember this answer until the registry gives another one."""
        self._last[host, target, method] = greeting

    def find(self, host: str, target: str, method: str) -> Greeting | None:
        """Return the last answer; the answer to a GET will do for a HEAD."""
        return self._last.get((host, target, method)) or (
            self._last.get((host, target, "GET")) if method == "HEAD" else None
        )


class Pings:
    """The answers of all registries to clients that check whether they are there."""

    def __init__(self, settings: Settings, upstream: Upstream) -> None:
        self._settings = settings
        self._upstream = upstream
        self._last = LastGreetings()

    async def answer(self, request: Request) -> Answer | None:
        """Return the answer; None if the request must be passed through, as upstream's answer is of another kind.

        Unencrypted requests are passed through too: a registry answers them with a redirect, if at all.
        """
        host, target, method = request.host, request.target, request.method
        if target not in TARGETS or request.scheme != "https" or host not in self._settings.registries:
            return None
        known = self._last.find(host, target, method)
        if known is not None and not self._upstream.is_up(host):
            return _given(request, known, CacheStatus(Outcome.HIT, detail="stale"))
        headers = request.forwarded
        if request.authorization is not None:
            headers["Authorization"] = request.authorization
        timeout_s = DEADLINE_S if known is None else REVALIDATE_TIMEOUT_S
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._upstream.converse(method, host, target, headers, timeout_s=timeout_s)
        except UnexpectedResponse:
            # Too long, or in a content coding that we do not decode.
            return None
        except UpstreamError as error:
            return self._away(request, known, error)
        except TimeoutError:
            return self._away(request, known, UpstreamTimeout("no answer in time"))
        greeting = Greeting.of(response)
        if greeting is not None:
            if request.authorization is None:
                self._last.remember(host, target, method, greeting)
            return _given(request, greeting, CacheStatus(Outcome.MISS, forward_status=response.status))
        if known is not None and (response.status >= 500 or response.status == _NOT_NOW or is_page(response.headers)):
            _log.warning("%s answered %s with %d; giving its last answer instead", host, target, response.status)
            return _given(request, known, CacheStatus(Outcome.HIT, detail="stale", forward_status=response.status))
        return None

    def _away(self, request: Request, known: Greeting | None, error: UpstreamError) -> Answer:
        self._upstream.mark_down(request.host, DOWN_S)
        if known is not None:
            _log.warning("%s: %s; giving its last answer to %s instead", request.host, error, request.target)
            return _given(request, known, CacheStatus(Outcome.HIT, detail="upstream-failed"))
        message = f"{request.host} cannot be asked, and has not been heard since the cache was started: {error}"
        return explained(504, "UNAVAILABLE", message, CacheStatus(Outcome.MISS, detail="upstream-failed"))


def _given(request: Request, greeting: Greeting, cache: CacheStatus) -> Answer:
    body = greeting.body if request.method == "GET" else b""
    return Answer(greeting.status, cache, greeting.headers, body, greeting.length)
