"""The choice of what to remove when people clean up.

Invariant: nothing in flight or pinned is chosen, and no blob that a remaining model lists. Pure: times and what is on
the disk are arguments.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pullthrough.core.digest import Digest
from pullthrough.core.records import BlobRecord, ManifestRecord, Name, by_model, listed_by


@dataclass(frozen=True, slots=True)
class Plan:
    """The models, blobs and files to remove."""

    names: tuple[Name, ...] = ()
    blobs: tuple[Digest, ...] = ()
    files: tuple[Path, ...] = ()
    """Partial and quarantined files."""
    freed: int = 0
    """Bytes."""


def plan_removal(
    manifests: Mapping[Name, ManifestRecord],
    blobs: Mapping[Digest, BlobRecord],
    names: Collection[Name],
    *,
    busy: Collection[Digest],
) -> Plan:
    """Plan to remove these models, with the held blobs that no other model lists and nobody is reading."""
    models, gone = by_model(manifests), set(names)
    stays = listed_by(record for name, records in models.items() if name not in gone for record in records)
    parts = listed_by(record for name in gone for record in models[name]) - stays
    chosen = tuple(digest for digest in parts if digest in blobs and blobs[digest].held and digest not in busy)
    return Plan(tuple(sorted(gone)), chosen, freed=sum(blobs[digest].size or 0 for digest in chosen))


def plan_prune(
    manifests: Mapping[Name, ManifestRecord],
    blobs: Mapping[Digest, BlobRecord],
    leftovers: Mapping[Path, tuple[int, float]],
    *,
    oldest: float,
    every: bool,
    pins: Collection[str],
    busy: Collection[Digest],
) -> Plan:
    """Plan to remove held blobs without a model and leftovers older than `oldest` (Unix seconds); models with `every`.

    A model is as old as its last pull, a blob as its recording; a model that is partly in flight stays. `leftovers`
    are files that nothing is writing: (bytes, when they last changed).
    """
    names = []
    models = by_model(manifests)
    for name, records in models.items() if every else ():
        used = max(record.used for record in records) or max(record.confirmed for record in records)
        if used <= oldest and not name.is_among(pins) and not any(map(busy.__contains__, listed_by(records))):
            names.append(name)
    gone = set(names)
    stays = listed_by(record for name, records in models.items() if name not in gone for record in records)
    parts = listed_by(record for name in gone for record in models[name])
    chosen = tuple(
        digest
        for digest, record in blobs.items()
        if record.held and digest not in stays and digest not in busy and (digest in parts or record.recorded <= oldest)
    )
    files = tuple(sorted(path for path, (_, changed) in leftovers.items() if changed <= oldest))
    freed = sum(blobs[digest].size or 0 for digest in chosen) + sum(leftovers[path][0] for path in files)
    return Plan(tuple(sorted(names)), chosen, files, freed)
