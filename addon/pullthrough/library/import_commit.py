"""The admission of models to the store, once their blobs were verified in a staging folder inside it.

Invariant: blobs come first and the manifest last, and what upstream has refused stays refused, whatever the options of
the import.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from os.path import lexists
from pathlib import Path
from typing import Final, Self

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.manifest_json import DOCKER_TYPE, children_of, type_of
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.blob_files import BlobFile
from pullthrough.store.store import Store

MANIFEST: Final = "manifest"
"""The file in a staging folder with the manifest of the model to be admitted."""


class Fate(StrEnum):
    """The result for one model."""

    IMPORTED = "imported"
    PRESENT = "present"
    """It was already stored, with the same bytes."""
    KEPT = "kept"
    """Another manifest is stored under that name, and upstream has confirmed it."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """The outcome for one model; `why` says why it was not imported."""

    model: str
    fate: Fate
    why: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """The conditions on which models are admitted."""

    public: bool = True
    """The operator lets everybody have them; else nobody gets them until upstream grants it, as after a refusal."""
    replace_confirmed: bool = False
    """They may replace manifests that upstream has confirmed."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be imported, in one representation: for clients that take lists, or for the others."""

    name: Name
    record: ManifestRecord
    blobs: Mapping[Digest, int]
    """The blobs that come with it, with claimed sizes; for a list its whole children and all that they list."""

    @classmethod
    def parse(cls, name: Name, body: bytes, blobs: Callable[[ManifestRecord], Mapping[Digest, int]]) -> Self:
        """Parse a manifest or list. Raises TransferRefused if the bytes are neither."""
        # `confirmed` 0: this cache has not asked upstream about it. It is stale from the beginning, and served if
        # upstream cannot be asked.
        record = ManifestRecord.parse(body, type_of(body), now=0.0)
        if record is None or not record.listed:
            raise TransferRefused(f"{name}: expected a manifest that lists blobs, got {body[:60]!r}")
        return cls(name._replace(takes_lists=record.is_list), record, blobs(record))


def needs(
    record: ManifestRecord, *, document: Callable[[Digest], bytes | None], has: Callable[[Digest], bool]
) -> dict[Digest, int]:
    """Return the blobs that come with a manifest or list; `document` reads a child at the source.

    A child is absent if nobody has pulled it, which is usual: a list comes with the children that are complete. Raises
    TransferRefused for a list without any.
    """
    if not record.is_list:
        return {digest: size for digest, size in record.sizes.items() if size is not None}
    found: dict[Digest, int] = {}
    for child in children_of(record.body):
        blobs = {layer.digest: layer.size for layer in child.layers}
        if child.digest is not None:
            if (body := document(child.digest)) is None:
                continue
            manifest = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
            if manifest is None or manifest.is_list:
                raise TransferRefused(f"{child.digest}: expected a manifest, as the list says, got {body[:60]!r}")
            blobs = {child.digest: len(body)} | needs(manifest, document=document, has=has)
        if blobs and all(map(has, blobs)):
            found |= blobs
    if not found:
        raise TransferRefused("expected all blobs of one manifest of the list, got those of none: pull the model again")
    return found


def admit(store: Store, staging: Path, model: Model, terms: Terms, *, now: float) -> ImportOutcome:
    """Do the three steps at once, for a caller that has the store to itself. Waits for the disk."""
    return refusal(store, model, terms) or enter(store, model, terms, place(store, staging, model), now=now)


def refusal(store: Store, model: Model, terms: Terms) -> ImportOutcome | None:
    """Return why the model may not be imported; None if it may."""
    stored = store.manifest(model.name)
    text = str(model.name)
    if terms.public and store.is_refused(*model.name.place):
        return ImportOutcome(
            text, Fate.REFUSED, "expected a public model, got one that its registry refuses to everybody"
        )
    same = stored is not None and stored.digest == model.record.digest
    if stored is not None and stored.confirmed and not same and not terms.replace_confirmed:
        return ImportOutcome(text, Fate.KEPT, f"sha256:{stored.digest} is stored, and its registry has confirmed it")
    return None


def place(store: Store, staging: Path, model: Model) -> dict[Digest, BlobFile]:
    """Move its blobs from the staging folder into the store. Waits for the disk, and changes nothing in memory.

    Raises StoreUnwritable if the disk refuses.
    """
    placed = {}
    for digest in model.blobs:
        # A blob that is not there is held already, or came with a model before this one.
        if lexists(staging / digest.file_name):
            placed[digest] = store.place(digest, staging / digest.file_name)
    return placed


def enter(store: Store, model: Model, terms: Terms, placed: Mapping[Digest, BlobFile], *, now: float) -> ImportOutcome:
    """Enter the placed blobs into the index, then store the manifest."""
    name, text, stored = model.name, str(model.name), store.manifest(model.name)
    for digest, file in placed.items():
        store.publish(digest, file, now=now)
    for digest in model.blobs:
        if store.held(digest) is None:
            return ImportOutcome(
                text, Fate.REFUSED, f"blob {digest}: expected it in the store, got none: it was evicted"
            )
    same = stored is not None and stored.digest == model.record.digest
    if not (same and stored is not None and (not stored.denied or not terms.public)):
        pulled = stored.pulled if stored is not None else 0.0
        store.put_manifest(name, model.record._replace(denied=not terms.public, pulled=pulled, brought=now))
    elif not placed and (not terms.public or all(_is_public(store, name, each) for each in model.blobs)):
        return ImportOutcome(text, Fate.PRESENT)
    if terms.public:
        for digest in model.blobs:
            store.confirm_public(name.host, name.repository, digest)
    return ImportOutcome(text, Fate.IMPORTED)


def _is_public(store: Store, name: Name, digest: Digest) -> bool:
    record = store.blob(digest)
    return record is not None and record.public and store.is_member(name.host, name.repository, digest)
