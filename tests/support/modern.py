"""A strict emulator of Ollama since v0.35.0: parts by the redirect client, manifest lists, the folder of v0.40.

Invariant: manifest, HEAD, probe and token are those of a2; a part's address is judged before the first part, without
retries, and at every redirect (server/download.go with transfer/redirect.go); since v0.40.0 a list is taken, and the
child that is chosen comes by transfer, as do all layers of a model with tensors. Departures beside those of a2: the
redirect client lives for one pull, and preferences are those of a machine that is not Apple's.
Knows nothing of what answers.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

from tests.support.a2 import MANIFEST_ACCEPT, A2Client, Generation
from tests.support.goclient import (
    GO_USER_AGENT,
    NETWORK,
    Cancellation,
    DigestMismatch,
    Fields,
    Layer,
    ModelName,
    PullError,
    Reply,
    Transport,
)
from tests.support.origin import LIST_TYPE
from tests.support.redirects import Dns, NotAllowed, Redirects
from tests.support.transfer import ERAS, TENSOR_TYPE, Transfers

LIST_ACCEPT: Final = f"{LIST_TYPE}, {MANIFEST_ACCEPT}"
"""One field, in this order."""
_PREFERENCES: Final = ("llamacpp", "ggml", "mlx")
_IDLE_PER_HOST: Final = 100
_UPDATE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Modern(Generation):
    """What a server can tell of the releases since v0.35.0."""

    asks_proxies: bool = False
    """Parts and transfers go by HTTPS_PROXY; not before some release after v0.40.2."""
    era: str = "0.40.2"
    """Of transfer."""

    @property
    def takes_lists(self) -> bool:
        """It knows manifest lists and has the models folder for them; since v0.40.0."""
        return self.accept == LIST_ACCEPT


_M1: Final = Modern("0.35.1", "go1.27")
_M2: Final = replace(_M1, number="0.40.2", accept=LIST_ACCEPT)
_M3: Final = replace(_M2, number="0.40.3", asks_proxies=True, era="0.40.3")
GENERATIONS: Final = MappingProxyType(
    {
        "0.35.1": _M1,
        "0.40.2": _M2,
        "0.40.3": _M3,
        "0.41.0 bypassing": replace(_M2, number="0.41.0"),
        "0.41.0 proxying": replace(_M3, number="0.41.0"),
        "current": _M3,
    }
)
"""By the last release that behaves so; 0.40.3 stands for the first that asks proxies, and 0.41.0 is anybody's guess."""


@dataclass(frozen=True, slots=True)
class Update:
    """What the update probe has learnt."""

    is_list: bool
    """Content-Type is the list type, and nothing else counts."""
    status: int
    digest: str
    """`ollama-content-digest`, empty when absent."""
    length: int | None
    """Content-Length."""


class ModernClient(A2Client, Transfers):
    """One `ollama serve`; `pull` may be called again, also after an abort."""

    generations: ClassVar[Mapping[str, Generation]] = GENERATIONS

    def __init__(
        self,
        proxy_url: str | None,
        cafile: Path,
        directory: Path,
        *,
        version: str = "current",
        dns: Dns | None = None,
        no_proxy: Sequence[str] = (),
        transfer: Mapping[str, Any] | None = None,
        update_s: float = _UPDATE_S,
        **options: Any,
    ) -> None:
        """`dns` is which addresses a name has for the client itself; a name that is not there does not exist.

        What is dialled directly is an address of `dns`, and `resolve` says where (address, port) leads. `no_proxy`
        are hosts. `transfer` scales transfer as TransferClient's arguments do, and `era` in it replaces the
        generation's. Others as A2Client.
        """
        self._no_proxy = no_proxy
        scale = dict(transfer or {})
        super().__init__(proxy_url, cafile, directory, version=version, **options)
        generation = self.generations[version]
        assert isinstance(generation, Modern)
        self.modern = generation
        self.update_s = update_s
        self._prepare(ERAS[scale.pop("era", generation.era)], dns, **scale)
        self._child = b""
        """The manifest with the layers of the present pull."""

    # --- the folder

    def manifest_path(self, model: str) -> Path:
        """Where a manifest is kept; since v0.40.0 a link to a blob."""
        if not self.modern.takes_lists:
            return super().manifest_path(model)
        name = ModelName.parse(model)
        host = "ollama.com" if name.host == "registry.ollama.ai" else name.host.replace(":", "%3A")
        return self.directory / "manifests-v2" / host / name.repository / name.tag

    def _save_manifest(self, model: str, manifest: bytes) -> None:
        if not self.modern.takes_lists:
            super()._save_manifest(model, manifest)
            return
        blob = self.blob_path(f"sha256:{hashlib.sha256(manifest).hexdigest()}")
        blob.write_bytes(manifest)
        path = self.manifest_path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
        self._save_anchor(model, manifest)

    def _save_anchor(self, model: str, manifest: bytes) -> None:
        """Keep an older daemon from pruning the documents: a manifest that has them as layers, in the old folder."""
        anchor = json.loads(self._child)
        for document in dict.fromkeys((manifest, self._child)):
            media_type = LIST_TYPE if _is_list(document) else MANIFEST_ACCEPT
            digest = f"sha256:{hashlib.sha256(document).hexdigest()}"
            anchor["layers"].append({"mediaType": media_type, "digest": digest, "size": len(document)})
        path = super().manifest_path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(anchor, separators=(",", ":")))

    # --- the pull

    def _pull(self, model: str) -> tuple[bytes, list[str]]:
        name = ModelName.parse(model, insecure=self.insecure)
        # No http name is pulled without --insecure, which lifts the check of addresses.
        is_insecure = name.scheme == "http"
        self._part_redirects = Redirects(
            f"{name.scheme}://{name.host}",
            self.dns,
            allow_private=is_insecure,
            uses_proxy=self._transport.uses_proxy if self.modern.asks_proxies else None,
        )
        self._part_transport: Transport = self._new_transport(
            self._proxy_url if self.modern.asks_proxies else None,
            _IDLE_PER_HOST,
            None if is_insecure else self._part_redirects.pin,
        )
        return super()._pull(model)

    def _fetch(self, name: ModelName, layers: list[Layer]) -> list[str]:
        if all(layer.media_type != TENSOR_TYPE for layer in layers):
            return super()._fetch(name, layers)
        downloaded = self._transfer(name, layers)
        self._tally.transferred = time.monotonic()
        return downloaded

    def _direct_url(self, reply: Reply) -> str:
        url = super()._direct_url(reply)
        try:
            self._part_redirects.check_scheme(url)
            self._part_redirects.check_target(url)
        except NotAllowed as error:
            # A FailedRequest would be asked again.
            raise PullError(str(error)) from None
        return url

    def _open_part(self, url: str, fields: Fields, scope: Cancellation, deadline: float) -> Reply:
        return self._do(
            "GET",
            url,
            [("User-Agent", GO_USER_AGENT), *fields],
            redirects=self._part_redirects.policy,
            scope=scope,
            deadline=deadline,
            transport=self._part_transport,
        )

    # --- lists

    def _runnable(self, name: ModelName, manifest: bytes) -> tuple[bytes, list[str]]:
        self._child = manifest
        downloaded: list[str] = []
        if self.modern.takes_lists and _is_list(manifest):
            child = _chosen(json.loads(manifest)["manifests"])
            if "digest" in child:
                self._child, downloaded = self._fetch_child(name, child["digest"])
            else:
                # A manifest in place, of which only the encoding is the client's own.
                self._child = json.dumps(child, separators=(",", ":")).encode()
            if _is_list(self._child):
                raise PullError("manifest list contains a manifest list")
        return self._child, downloaded

    def _fetch_child(self, name: ModelName, digest: str) -> tuple[bytes, list[str]]:
        with self._registry("HEAD", name.url("blobs", digest), []) as reply:
            size = reply.response.content_length
        if not size:
            raise PullError(f"invalid content length of manifest {digest}: {size}")
        downloaded = self._transfer(name, [Layer(digest, size)])
        child = self.blob_path(digest).read_bytes()
        actual = f"sha256:{hashlib.sha256(child).hexdigest()}"
        if actual != digest:
            raise DigestMismatch(digest, actual)
        return child, downloaded

    def probe_update(self, model: str) -> Update:
        """Ask whether a tag has become a list, as the daemon does by its default client: no version, 2 s.

        Raises PullError when there is no answer in time.
        """
        name = ModelName.parse(model)
        self._context = Cancellation()
        fields = [("User-Agent", GO_USER_AGENT), ("Accept", LIST_ACCEPT)]
        url = name.url("manifests", name.tag)
        try:
            with self._do("HEAD", url, fields, deadline=time.monotonic() + self.update_s) as reply:
                media_type = reply.header("Content-Type").partition(";")[0].strip().lower()
                return Update(
                    reply.status == 200 and media_type == LIST_TYPE,
                    reply.status,
                    reply.header("ollama-content-digest"),
                    reply.response.content_length,
                )
        except TimeoutError as error:
            raise PullError("context deadline exceeded") from error
        except NETWORK as error:
            raise PullError(f'Head "{url}": {error}') from error
        finally:
            self._transport.close()


def _is_list(document: bytes) -> bool:
    """Told by the document itself; Content-Type is not looked at. ValueError when it is no JSON object."""
    parsed = json.loads(document)
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, got {document[:100]!r}")
    return parsed.get("mediaType") == LIST_TYPE


def _chosen(children: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The child of the first runner in the order of preference that the list names."""
    for runner in _PREFERENCES:
        for child in children:
            if str(child.get("runner", "")).strip().lower() == runner:
                return child
    raise PullError("no manifest of the list has a runner for this machine")
