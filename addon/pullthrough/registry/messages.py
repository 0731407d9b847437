"""A client's request and the answer to it, as values.

Invariant: an answer's `length` is its Content-Length, also where no body is sent. `failure` is the one place that
turns an error into a blob route's answer.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.cdn_loop import CDN_LOOP
from pullthrough.core.digest import Digest
from pullthrough.core.errors import CacheError, UpstreamRefused
from pullthrough.core.manifest_json import takes_lists
from pullthrough.core.records import BYPASSING, Version, version_of
from pullthrough.net.client_table import Way
from pullthrough.recording.reader import WAIT_S, Reader

_log = logging.getLogger(__name__)

_TRANSFER_AGENT: Final = "ollama-transfer/"

LAST_PROXYING: Final = (0, 34, 4)
"""Up to this Ollama a blob's parts take HTTPS_PROXY and follow any redirect (server/download.go). From 0.35.0 on they
have a client of their own (transfer/redirect.go), which may know no proxy and refuses plain or private targets."""


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a client's request that decide the answer; header names in lower case."""

    method: str
    scheme: str
    host: str
    target: str
    headers: Mapping[str, str]
    blobs: str | None = None
    """The origin of this client's canonical addresses; "" for the one it asked, None for the blob host."""
    inline: bool = False
    """The registry's own blob address must give the bytes itself, as no redirect could lead to another host name."""
    client: str = ""
    """The client's address."""
    tunnelled: bool = False
    """It came through CONNECT: the client uses us as its proxy, and may still fetch a blob's parts past us."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def agent(self) -> str:
        """User-Agent; "" where there is none that could be forwarded."""
        return self._sendable("user-agent")

    @property
    def is_transfer(self) -> bool:
        """Whether the client is x/transfer, which pulls and pushes tensor models (v0.14.0 to today)."""
        return self.agent.startswith(_TRANSFER_AGENT)

    @property
    def version(self) -> Version | None:
        """The client's Ollama version; None as `version_of` says."""
        return version_of(self.agent)

    @property
    def takes_lists(self) -> bool:
        """Whether the client accepts manifest lists, as Ollama does since 0.40."""
        return takes_lists(self.headers.get("accept"))

    @property
    def follows_any_redirect(self) -> bool:
        """Whether the client is an Ollama known to fetch parts the way it asks, wherever it is redirected."""
        return self.version is not None and self.version <= LAST_PROXYING

    @property
    def may_bypass(self) -> bool:
        """Whether the client may fetch what the answer leads to past this proxy.

        Unknown clients count as new. x/transfer uses one HTTP client for both hops, so both go past the proxy or both
        come here.
        """
        return self.tunnelled and not self.is_transfer and not self.follows_any_redirect

    @property
    def is_known_to_bypass(self) -> bool:
        """Whether the client is known to do so: for messages to the client and the operator, never for decisions."""
        first, last = BYPASSING
        return self.may_bypass and self.version is not None and first <= self.version <= last

    @property
    def way(self) -> Way:
        """How the client reaches the cache."""
        if self.blobs is not None and self.scheme == "http":
            return Way.PLAIN
        return Way.PROXY if self.tunnelled else Way.GATEWAY

    @property
    def trail(self) -> str:
        """CDN-Loop: the caches that the request has been through; "" where there is none that could be forwarded."""
        return self._sendable("cdn-loop")

    @property
    def forwarded(self) -> dict[str, str]:
        """What upstream may learn about the client: its version (some models require one), and its path to us."""
        fields = {"User-Agent": self.agent, CDN_LOOP: self.trail}
        return {name: value for name, value in fields.items() if value}

    def _sendable(self, name: str) -> str:
        """Return the field's value if it can be forwarded (RFC 9110 section 5.5), else ""."""
        value = self.headers.get(name, "")
        return value if value.replace("\t", " ").isprintable() else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; `length` is its Content-Length, also where no body is sent."""

    status: int
    cache: CacheStatus
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Reader = b""
    length: int = 0
    held: bool = False
    """Whether the head is held back until the reader can give all bytes at once."""


def failure(error: CacheError, digest: Digest | None = None) -> Answer:
    """Return a status without a body: an Ollama client writes any body into the model file."""
    headers = error.headers if isinstance(error, UpstreamRefused) else ()
    kept = tuple((name, value) for name, value in headers if name.lower() != "content-type")
    forwarded = error.status_hint if isinstance(error, UpstreamRefused) else None
    _log.info("%s: %s", digest.short if digest else "request", error)
    return Answer(error.status_hint, CacheStatus(Outcome.MISS, forward_status=forwarded), kept)


def explained(status: int, code: str, message: str, cache: CacheStatus) -> Answer:
    """Return a failure in the registry's own shape (OCI distribution-spec, "Error codes"); not for a blob route."""
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    _log.warning("%s", message)
    return Answer(status, cache, (("Content-Type", "application/json"),), body, len(body))


async def gathered(answer: Answer, is_gone: Callable[[], bool]) -> Answer:
    """Return a held answer once all its bytes are here or the client has gone; any other answer at once."""
    if not answer.held or not isinstance(answer.body, Reader):
        return answer
    reader = answer.body
    try:
        while not await reader.whole(WAIT_S) and not is_gone():
            pass
    except CacheError as error:
        reader.close()
        return failure(error)
    except BaseException:
        reader.close()
        raise
    return answer
