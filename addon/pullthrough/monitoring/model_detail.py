"""One public model in detail, for its page.

Invariant: the cost grows with the model's layers and its repository's tags, not with what else is stored; a model that
its registry refuses to strangers is not found.
"""

from dataclasses import dataclass

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.library.listing import JSON, View, detail, listing
from pullthrough.store.store import Store


@dataclass(frozen=True, slots=True)
class ModelDetail:
    """A model, its layers, its pins, and the other tags of its repository."""

    name: Name
    facts: JSON
    """What `detail` of listing returns."""
    pins: tuple[str, ...]
    """The pins that keep it."""
    verified: float | None
    """When each stored blob of it was verified, Unix seconds."""
    held: int
    """How many of its blobs are stored."""
    listed: int
    """How many blobs it lists."""
    tags: tuple[JSON, ...]
    """Rows of all stored models of the repository, including this one, by name."""


def find_detail(store: Store, pins: tuple[str, ...], text: str) -> ModelDetail | None:
    """Return the stored public model that a user means by `text`; None if there is none."""
    try:
        name = Name.parse(text)
    except InvalidRequest:
        return None
    manifests = store.manifests_of(*name.place)
    records = {each: record for each, record in manifests.items() if each.model == name}
    if not records:
        return None
    view = _view(store, records, pins)
    times = [record.recorded for record in view.blobs.values() if record.held]
    tags = listing(_view(store, manifests, pins))
    return ModelDetail(
        name,
        detail(view, str(name)),
        tuple(pattern for pattern in pins if name.matches(pattern)),
        max(times) or None if times else None,
        len(times),
        len(view.blobs),
        tuple(sorted(tags, key=lambda row: str(row["name"]))),
    )


def _view(store: Store, manifests: dict[Name, ManifestRecord], pins: tuple[str, ...]) -> View:
    """Return a view of these manifests only."""
    blobs: dict[Digest, BlobRecord] = {}
    for record in manifests.values():
        for digest in record.digests:
            blobs[digest] = store.blob(digest) or BlobRecord()
    return View(manifests, blobs, pins, {}, store.children())
