"""The JSON of manifests and manifest lists, parsed without trusting it.

A manifest has `layers` and perhaps a `config`. A list, which Ollama accepts since 0.40, has `manifests`: each child
is a reference to a blob that is a manifest (`digest`, `runner`, `format`, no size), or a whole inline manifest. The
`mediaType` inside the document tells them apart, as in the client (manifest package of 0.40), never the Content-Type.
Invariant: whatever the bytes are, the result is a document or ValueError.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pullthrough.core.bounded_json import loads
from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest

DOCKER_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
LIST_TYPE: Final = "application/vnd.ollama.manifest.list.v2+json"
OCI_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"

LONGEST: Final = 4 << 20
"""The most bytes of a document; the largest, of tensor models, have a few hundred KiB."""

MAX_SIZE: Final = 1 << 53
"""The largest blob, in bytes: all JSON readers agree on integers up to here (RFC 8259 section 6)."""

MAX_CHILDREN: Final = 64
"""How many children of a list are followed; real lists have one for each runner."""

_ZERO: Final = re.compile(r"\s*q\s*=\s*0(\.0*)?\s*", re.IGNORECASE)


PREFERENCE: Final = ("llamacpp", "ggml", "mlx")
"""Clients choose the child of the first of these runners in the list (0.40; on Apple Silicon mlx comes first)."""


class Layer(NamedTuple):
    """A blob of a model as its manifest describes it, or the config."""

    digest: Digest
    size: int
    media_type: str


class Child(NamedTuple):
    """A manifest that a list offers."""

    digest: Digest | None
    """The blob that is the manifest; None for an inline manifest."""
    runner: str
    """In lower case, "" if the list names none: llamacpp, ggml, mlx."""
    format: str
    layers: tuple[Layer, ...]
    """The layers of an inline manifest."""


class Document(NamedTuple):
    """A manifest, or a list of manifests."""

    layers: tuple[Layer, ...] = ()
    """The layers in order, then the config."""
    children: tuple[Child, ...] | None = None
    """The children that can be followed; None for a manifest."""
    runner: str = ""
    """The runner of a manifest, as in Child."""


def takes_lists(accept: str | None) -> bool:
    """Return whether a client with this Accept field takes manifest lists; one with a malformed field does not."""
    for member in (accept or "").split(","):
        media_type, *parameters = member.split(";")
        if media_type.strip().lower() == LIST_TYPE and not any(map(_ZERO.fullmatch, parameters)):
            return True
    return False


def accept_of(*, takes_lists: bool) -> str:
    """Return the Accept field that Ollama sends: with or without manifest lists.

    The docker type is always in it: without it the registry answered 400 (ollama#769).
    """
    return f"{LIST_TYPE}, {DOCKER_TYPE}" if takes_lists else DOCKER_TYPE


def parse(body: bytes) -> Document:
    """Parse a document. Raises ValueError if the bytes are none."""
    try:
        document = loads(body, limit=LONGEST)
        if document.get("mediaType") == LIST_TYPE:
            return _list_of(document["manifests"])
        return Document(_layers_of(document), runner=_word(document, "runner"))
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise ValueError(f"expected a manifest or a list of manifests, got {body[:60]!r}") from error


def type_of(body: bytes) -> str:
    """Return the Content-Type of a document if the registry's is not known: its own `mediaType`, if valid."""
    try:
        named = loads(body, limit=LONGEST).get("mediaType")
    except (ValueError, AttributeError):
        named = None
    return named if named in (LIST_TYPE, OCI_TYPE) else DOCKER_TYPE


@lru_cache(maxsize=16)
def children_of(body: bytes) -> tuple[Child, ...]:
    """Return the children in the bytes of a valid list; none for a manifest."""
    return parse(body).children or ()


def in_place(body: bytes, child: Child) -> dict[str, Any]:
    """Return the JSON of an inline manifest, which is a child in the bytes of this list."""
    manifest: dict[str, Any] = next(
        item for item in loads(body, limit=LONGEST)["manifests"] if _child_of(item) == child
    )
    return manifest


def preferred(children: Iterable[Child]) -> Child | None:
    """Return the child that most clients choose; None if there are none."""
    ranks = {runner: rank for rank, runner in enumerate(PREFERENCE)}
    return min(children, key=lambda child: ranks.get(child.runner, len(ranks)), default=None)


def _list_of(manifests: Any) -> Document:
    if not isinstance(manifests, list):
        raise TypeError("manifests")
    followed = (child for child in map(_child_of, manifests) if child is not None)
    return Document(children=tuple(child for child, _ in zip(followed, range(MAX_CHILDREN), strict=False)))


def _child_of(item: Any) -> Child | None:
    """Parse a child; None for one that is not followed: a list in the list, or an unknown form."""
    if not isinstance(item, dict) or item.get("mediaType") == LIST_TYPE or "manifests" in item:
        return None
    runner, form = _word(item, "runner"), _word(item, "format")
    try:
        if "digest" in item:
            return Child(Digest.parse(item["digest"]), runner, form, ())
        return Child(None, runner, form, _layers_of(item))
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest):
        return None


def _layers_of(manifest: Any) -> tuple[Layer, ...]:
    layers = manifest["layers"] or []
    if not isinstance(layers, list):
        raise TypeError("layers")
    descriptors = [*layers, *([manifest["config"]] if manifest.get("config") else [])]
    return tuple(map(_layer_of, descriptors))


def _layer_of(item: Any) -> Layer:
    digest, size = Digest.parse(item["digest"]), item["size"]
    if type(size) is not int or not 0 <= size < MAX_SIZE:
        raise TypeError("size")
    return Layer(digest, size, str(item.get("mediaType", "")))


def _word(item: dict[str, Any], key: str) -> str:
    """Return a member as the client compares it: trimmed, in lower case."""
    word = item.get(key)
    return word.strip().lower() if isinstance(word, str) else ""
