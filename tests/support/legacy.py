"""Strict emulators of Ollama's pull clients before the direct URL: A0 (to v0.1.1) and A1 (v0.1.2 to v0.3.0).

Invariant: each asks and refuses as its sources do, server/download.go and server/images.go of the version named.
Departures beside those of goclient and a2: the manifest is saved as it came, where the real ones encode it anew,
and A1 up to v0.1.25 closes the connections that the real one leaves behind, one for each request.
Knows nothing of what answers.
"""

import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final

from tests.support.a2 import GENERATIONS, MANIFEST_ACCEPT, A2Client, Generation, LayerByLayer, Release
from tests.support.goclient import (
    GO_USER_AGENT,
    NETWORK,
    Cancellation,
    FailedRequest,
    Fields,
    ModelName,
    PullError,
    Reply,
    follow,
)
from tests.support.http1 import Resolve

# --- A0: one stream


@dataclass(frozen=True, slots=True)
class Stream(Release):
    """What a server can tell of the releases up to v0.1.1."""

    retries: int = 3
    """maxRetry, at once and without a pause; since v0.0.15."""
    chunk: int = 1 << 20
    """A resume goes back to a multiple of this; since v0.0.14."""
    has_name: bool = True
    """It says ollama/<version>; since v0.0.16."""
    accepts: Container[int] = range(400)
    """Statuses whose body is taken; only 200 and 206 before v0.0.17."""


_LAST_STREAM: Final = Stream("0.1.1", "go1.20", follow)
STREAMS: Final = MappingProxyType(
    {
        "0.1.1": _LAST_STREAM,
        "0.0.11": replace(
            _LAST_STREAM, number="0.0.11", retries=0, chunk=1, has_name=False, accepts=frozenset({200, 206})
        ),
    }
)


class A0Client(LayerByLayer):
    """v0.0.x to v0.1.1: each blob is one GET with `Range: bytes=N-`, redirects followed, appended to `-partial`.

    There is no HEAD, no token (a 401 is an error like others) and no stall watch. A 200 with the whole blob in
    answer to the rest is appended like a 206, and a body without Content-Length counts as empty.
    """

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "0.1.1",
        chunk: int | None = None,
        patience_s: float = 60.0,
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`chunk` is the bytes a resume goes back to a multiple of; None is as in the version. Others as A2Client."""
        self.generation = STREAMS[version]
        super().__init__(
            self.generation,
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
        )
        self.chunk = chunk or self.generation.chunk

    @property
    def _agent(self) -> tuple[str, str]:
        return "User-Agent", self.generation.user_agent if self.generation.has_name else GO_USER_AGENT

    def _manifest(self, name: ModelName) -> bytes:
        url = name.url("manifests", name.tag)
        with self._request("GET", url, [self._agent, ("Accept", MANIFEST_ACCEPT)]) as reply:
            if reply.status == 404:
                raise PullError("model not found")
            if reply.status >= 400:
                raise PullError(f"on pull registry responded with code {reply.status}: {reply.read()!r}")
            return reply.read()

    def _download(self, name: ModelName, digest: str, path: Path) -> None:
        for attempt in range(self.generation.retries + 1):
            try:
                self._stream(name.url("blobs", digest), path)
                return
            except (FailedRequest, *NETWORK) as error:
                self._context.check()
                problem = error
                if attempt < self.generation.retries:
                    self._tally.retry()
        raise PullError(f"download failed: {problem}") from problem

    def _stream(self, url: str, path: Path) -> None:
        """doDownload."""
        partial = path.with_name(f"{path.name}-partial")
        have = 0
        if partial.exists():
            have = partial.stat().st_size
            have -= have % self.chunk
            os.truncate(partial, have)
        with self._request("GET", url, [self._agent, ("Range", f"bytes={have}-")]) as reply:
            if reply.status not in self.generation.accepts:
                raise FailedRequest(f"on download registry responded with code {reply.status}: {reply.read()!r}")
            with partial.open("ab") as file:
                # strconv.ParseInt with the error ignored: without a length there is nothing to wait for.
                for piece in self._pieces(reply, reply.response.content_length or 0):
                    file.write(piece)
        partial.rename(path)


# --- A1: parallel parts, each redirected

_EXACT: Final = replace(GENERATIONS["0.3.6"], number="0.3.0", go="go1.22.0")
_TO_THE_END: Final = replace(_EXACT, number="0.1.30", copies_exactly=False)
_FIRST: Final = replace(
    _TO_THE_END,
    number="0.1.10",
    go="go1.20",
    stall_s=None,
    min_part=32_000_000,
    max_part=256_000_000,
    max_retries=3,
    backs_off=False,
    tries=3,
    idle_per_host=0,
)


class A1Client(A2Client):
    """v0.1.2 to v0.3.0: as A2 without the probe; each part asks the registry and follows its redirect.

    An answer of 400 or more is refused before anything is copied. A 200 with the whole blob is not noticed: until
    v0.1.38 all of it is written from the part's offset on, later its first bytes; both fail at the digest.
    """

    generations: ClassVar[Mapping[str, Generation]] = MappingProxyType(
        {each.number: each for each in (_EXACT, _TO_THE_END, _FIRST)} | {"current": _EXACT}
    )

    def _source(self, url: str) -> str:
        return url

    def _open_part(self, url: str, fields: Fields, scope: Cancellation, deadline: float) -> Reply:
        return self._registry("GET", url, fields, scope=scope, deadline=deadline)
