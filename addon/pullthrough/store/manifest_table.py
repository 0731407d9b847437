"""The stored manifests and lists, and the manifests that lists refer to.

Invariant: a list's record includes the blobs of each child as soon as that child's bytes are here. So the questions
what a repository lists, what a model needs and what may be evicted are answered from one flat set of blobs. Bytes are
stored once, however many names and children share them. That a list refers to a manifest grants nobody access to it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.index import Index
from pullthrough.store.rows import Contents

TOLD_S: Final = 600.0
"""The longest that the index may lag behind with the time of a manifest's last pull."""


class ManifestTable:
    """The manifests of one store."""

    def __init__(self, index: Index, contents: Contents, read: Callable[[Digest], ManifestRecord | None]) -> None:
        """`read` parses a held blob as a manifest, and returns None if it is not one."""
        self._index = index
        self._read = read
        self._records = contents.manifests
        self._children = contents.children
        self.records: Mapping[Name, ManifestRecord] = MappingProxyType(self._records)
        self.children: Mapping[Digest, ManifestRecord] = MappingProxyType(self._children)
        """The manifests that stored lists refer to and whose bytes are here."""
        self._names: dict[tuple[str, str], set[Name]] = {}
        """(host, repository) → the names of its stored manifests."""
        self._denied: dict[tuple[str, str], set[Name]] = {}
        """(host, repository) → the names of its denied manifests."""
        self._bodies = Counter(record.digest for record in self._children.values())
        """How many names and children share the bytes of each manifest."""
        self._parents: dict[Digest, set[Name]] = {}
        """Child → the names whose lists refer to it."""
        self._untold: dict[Name, float] = {}
        """Name → since when its last pull is missing from the index."""
        for name, record in self._records.items():
            self._names.setdefault(name.place, set()).add(name)
            if record.denied:
                self._denied.setdefault(name.place, set()).add(name)
            self._bodies[record.digest] += 1
            if record.is_list:
                for child in record.children:
                    self._parents.setdefault(child, set()).add(name)

    def open(self) -> None:
        """Take in children whose bytes are here but were not recorded as such in the index."""
        for child in list(self._parents):
            self.take_in(child)

    def close(self) -> None:
        """Write the times of pulls that the index lacks."""
        for name in self._untold:
            self._index.put_manifest(name, self._records[name])

    def of(self, place: tuple[str, str]) -> Iterator[tuple[Name, ManifestRecord]]:
        """Return an iterator over the manifests of the (host, repository)."""
        return ((name, self._records[name]) for name in self._names.get(place, ()))

    def listing(self, place: tuple[str, str]) -> list[ManifestRecord]:
        """Return the repository's manifests that are not denied. May be called by other threads."""
        found = [self._records.get(name) for name in list(self._names.get(place, ()))]
        return [record for record in found if record is not None and not record.denied]

    def denied(self, place: tuple[str, str]) -> list[ManifestRecord]:
        """Return the repository's manifests that are denied."""
        return [self._records[name] for name in self._denied.get(place, ())]

    def put(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest, replacing the name's previous one."""
        before = self._records.get(name)
        for child in record.children:
            self._parents.setdefault(child, set()).add(name)
        for child in record.children:
            self.take_in(child)
        for child in record.children:
            if (known := self._children.get(child)) is not None:
                record = record.grown(known)
        self._records[name] = record
        self._names.setdefault(name.place, set()).add(name)
        denied = self._denied.setdefault(name.place, set())
        (denied.add if record.denied else denied.discard)(name)
        self._untold.pop(name, None)
        self._bodies[record.digest] += 1
        self._index.put_manifest(name, record)
        if before is not None:
            self._leave(name, before, still=record.children)
        self.take_in(Digest(record.digest))

    def is_same(self, known: ManifestRecord, record: ManifestRecord) -> bool:
        """Return whether `put` would turn the record into `known`."""
        if not record.is_list:
            return known == record
        for child in record.children:
            if (of_child := self._children.get(child)) is not None:
                record = record.grown(of_child)
        return set(known.digests) == set(record.digests) and known == record._replace(
            listed=known.listed, claimed=known.claimed
        )

    def drop(self, name: Name) -> None:
        """Forget the manifest, and the children that no other list refers to."""
        record = self._records.pop(name)
        self._untold.pop(name, None)
        self._names[name.place].discard(name)
        self._denied.get(name.place, set()).discard(name)
        self._index.delete_manifest(name)
        self._leave(name, record, still=())

    def touch(self, name: Name, now: float, *, by_client: bool = True) -> None:
        """Note that a client has pulled it, or that it was brought; written every TOLD_S seconds, and at the end."""
        record = self._records.get(name)
        if record is None:
            return
        self._records[name] = record = record._replace(pulled=now) if by_client else record._replace(brought=now)
        if now - self._untold.setdefault(name, now) >= TOLD_S:
            del self._untold[name]
            self._index.put_manifest(name, record)

    def take_in(self, digest: Digest) -> None:
        """Add what this blob lists to the lists that refer to it, if its bytes are here and are a manifest."""
        parents = self._parents.get(digest)
        if parents is None or digest in self._children:
            return
        child = self._find(digest)
        if child is None:
            return
        self._children[digest] = child
        self._bodies[child.digest] += 1
        self._index.put_child(digest, child)
        for name in parents:
            record = self._records.get(name)
            if record is not None and digest in record.children:
                self._records[name] = record = record.grown(child)
                self._index.put_manifest(name, record)

    def _find(self, digest: Digest) -> ManifestRecord | None:
        """Return the blob as a manifest, stored by name or held as a file; None if it is not one, or is a list."""
        if digest.hex not in self._bodies:
            return self._read(digest)
        body = next(record.body for record in self._records.values() if record.digest == digest.hex)
        record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
        return None if record is None or record.is_list else record

    def _leave(self, name: Name, record: ManifestRecord, *, still: list[Digest] | tuple[()]) -> None:
        """Release what the name's old record referred to, except for the children in `still`."""
        for child in set(record.children).difference(still):
            parents = self._parents[child]
            parents.discard(name)
            if not parents:
                del self._parents[child]
                if self._children.pop(child, None) is not None:
                    self._index.delete_child(child)
                    self._drop_body(child.hex)
        self._drop_body(record.digest)

    def _drop_body(self, digest: str) -> None:
        self._bodies[digest] -= 1
        if not self._bodies[digest]:
            del self._bodies[digest]
            self._index.delete_body(digest)
