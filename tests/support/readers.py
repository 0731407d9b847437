"""Two clients that are no Ollama: one that reads only the heads of blobs, and one that trusts no redirect.

Invariant: each asks for the manifest once, as a docker manifest, and for blobs in the manifest's order; nothing is
tried twice. Know nothing of what answers.
"""

import functools
import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

from tests.support.a2 import MANIFEST_ACCEPT
from tests.support.goclient import (
    DigestMismatch,
    FailedRequest,
    Fields,
    Group,
    Layer,
    ModelName,
    PullClient,
    PullError,
    UnexpectedEOF,
    keep,
    layers_of,
)
from tests.support.http1 import Resolve
from tests.support.origin import R2_HOST, REGISTRY_HOST

_AGENT: Final = ("User-Agent", "reader/1.0")
_HOPS: Final = 2
_TRUSTED: Final = {f"{host}{port}" for host in (REGISTRY_HOST, R2_HOST) for port in ("", ":443")}


class Reader(PullClient):
    """A client of its own kind; `pull` is what it does with a model."""

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "current",
        patience_s: float = 60.0,
        resolve: Resolve | None = None,
        abort_after: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """As A2Client; there is one version."""
        assert version == "current", version
        super().__init__(
            proxy_url,
            cafile,
            directory,
            patience_s=patience_s,
            resolve=resolve,
            abort_after=abort_after,
            on_progress=on_progress,
        )

    def _pull(self, model: str) -> tuple[bytes, list[str]]:
        name = ModelName.parse(model)
        fields = [_AGENT, ("Accept", MANIFEST_ACCEPT)]
        with self._do("GET", name.url("manifests", name.tag), fields) as reply:
            manifest = reply.read()
        if reply.status != 200:
            raise FailedRequest(f"{reply.status}: {manifest!r}")
        layers = layers_of(manifest)
        self._read(name, layers)
        self._tally.transferred = time.monotonic()
        return manifest, [layer.digest for layer in layers]

    @abstractmethod
    def _read(self, name: ModelName, layers: list[Layer]) -> None:
        """Read what it wants of the blobs."""


class HeadReader(Reader):
    """A reader of the first bytes of each blob, which leaves then: it wants a GGUF's metadata, and no model."""

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        stops: Sequence[int] = (4 << 20,),
        open_ended: bool = False,
        streams: int = 1,
        patience_s: float = 60.0,
        resolve: Resolve | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Each request of a blob goes on where the one before ended, up to the next of `stops`, in bytes.

        With `open_ended` a Range names no end, and the reader leaves in the middle of the body. `streams` blobs are
        read at once.
        """
        super().__init__(proxy_url, cafile, directory, patience_s=patience_s, resolve=resolve, on_progress=on_progress)
        self.stops = stops
        self.open_ended = open_ended
        self.streams = streams

    def _read(self, name: ModelName, layers: list[Layer]) -> None:
        group = Group(self._context)
        group.run((functools.partial(self._head, group, name, layer) for layer in layers), limit=self.streams)

    def _head(self, group: Group, name: ModelName, layer: Layer) -> None:
        path = self.blob_path(layer.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for stop in sorted({min(stop, layer.size) for stop in self.stops}):
                start = file.tell()
                end = "" if self.open_ended else stop - 1
                fields: Fields = [_AGENT, ("Range", f"bytes={start}-{end}")]
                with self._do("GET", name.url("blobs", layer.digest), fields, scope=group) as reply:
                    if (reply.status, reply.header("Content-Range").partition("-")[0]) != (206, f"bytes {start}"):
                        raise FailedRequest(f"expected 206 from {start}, got {reply.response}")
                    for piece in self._pieces(reply, stop - start):
                        file.write(piece)
                    if file.tell() < stop:
                        raise UnexpectedEOF


class StrictReader(Reader):
    """A downloader that follows a redirect only by https, to port 443 of the registry or R2, and twice at most."""

    def _read(self, name: ModelName, layers: list[Layer]) -> None:
        for layer in layers:
            path = self.blob_path(layer.digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._blob(name.url("blobs", layer.digest), layer))

    def _blob(self, url: str, layer: Layer) -> bytes:
        hops = 0
        while True:
            with self._do("GET", url, [_AGENT], redirects=keep) as reply:
                if reply.status == 200:
                    data = b"".join(self._pieces(reply))
                    actual = f"sha256:{hashlib.sha256(data).hexdigest()}"
                    if (len(data), actual) != (layer.size, layer.digest):
                        raise DigestMismatch(layer.digest, actual)
                    return data
            if reply.status not in (301, 302, 307, 308):
                raise FailedRequest(f"status {reply.status}")
            url, hops = urljoin(url, reply.header("Location")), hops + 1
            split = urlsplit(url)
            if hops > _HOPS:
                raise PullError(f"more than {_HOPS} redirects")
            if split.scheme != "https" or split.netloc not in _TRUSTED:
                raise PullError(f"refused redirect to {url}")
