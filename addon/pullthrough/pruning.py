"""What goes when people clean up.

Invariant: nothing in flight and nothing pinned is chosen, and no blob that a model which stays lists. Pure: times and
what lies on the disk are arguments. Knows no disk.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pullthrough.digest import Digest
from pullthrough.records import BlobRecord, ManifestRecord, Name


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes."""

    names: tuple[Name, ...] = ()
    blobs: tuple[Digest, ...] = ()
    files: tuple[Path, ...] = ()
    """Partials and quarantined bytes."""
    freed: int = 0
    """Bytes."""


def plan_removal(
    manifests: Mapping[Name, ManifestRecord],
    blobs: Mapping[Digest, BlobRecord],
    names: Collection[Name],
    *,
    busy: Callable[[Digest], bool],
) -> Plan:
    """These models go, with the blobs that no other model lists and nobody reads. `blobs` are the held ones."""
    gone = set(names)
    stays = _listed(record for name, record in manifests.items() if name not in gone)
    parts = _listed(manifests[name] for name in gone) - stays
    chosen = tuple(digest for digest in blobs if digest in parts and not busy(digest))
    return Plan(tuple(sorted(gone)), chosen, freed=sum(blobs[digest].size or 0 for digest in chosen))


def plan_prune(
    manifests: Mapping[Name, ManifestRecord],
    blobs: Mapping[Digest, BlobRecord],
    leftovers: Mapping[Path, tuple[int, float]],
    *,
    oldest: float,
    every: bool,
    pinned: Callable[[Name], bool],
    busy: Callable[[Digest], bool],
) -> Plan:
    """Blobs without a model, and leftovers, older than `oldest` (Unix seconds); with `every`, models too.

    A model is as old as its last pull, a blob as its recording; a model that is in flight in part stays. `leftovers`
    are files that nobody writes: (bytes, when they last changed).
    """
    names = []
    for name, record in manifests.items() if every else ():
        used = max(record.pulled, 0.0) or record.confirmed
        if used <= oldest and not pinned(name) and not any(map(busy, record.sizes)):
            names.append(name)
    gone = set(names)
    stays = _listed(record for name, record in manifests.items() if name not in gone)
    parts = _listed(manifests[name] for name in gone)
    chosen = tuple(
        digest
        for digest, record in blobs.items()
        if digest not in stays and not busy(digest) and (digest in parts or record.recorded <= oldest)
    )
    files = tuple(sorted(path for path, (_, changed) in leftovers.items() if changed <= oldest))
    freed = sum(blobs[digest].size or 0 for digest in chosen) + sum(leftovers[path][0] for path in files)
    return Plan(tuple(sorted(names)), chosen, files, freed)


def _listed(records: Iterable[ManifestRecord]) -> set[Digest]:
    return {digest for record in records for digest in record.sizes}
