"""The stored manifests and lists, and the manifests that lists refer to.

Invariant: a list lists what each of its children lists as soon as that child's bytes are here, so whoever asks what a
repository lists, what a model needs, or what may go, sees one flat set of blobs. Bytes are stored once, whoever has
them: names and children. What a list refers to says nothing of who may have it.
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
"""How far the index may lag behind with the time of a manifest's last pull."""


class ManifestTable:
    """Of one store."""

    def __init__(self, index: Index, contents: Contents, read: Callable[[Digest], ManifestRecord | None]) -> None:
        """`read` gives the manifest that a held blob is, else None."""
        self._index = index
        self._read = read
        self._records = contents.manifests
        self._children = contents.children
        self.records: Mapping[Name, ManifestRecord] = MappingProxyType(self._records)
        self.children: Mapping[Digest, ManifestRecord] = MappingProxyType(self._children)
        """Those that a stored list refers to and whose bytes have come."""
        self._names: dict[tuple[str, str], set[Name]] = {}
        """Under which the manifests of each (host, repository) are stored."""
        self._denied: dict[tuple[str, str], set[Name]] = {}
        """Those of them that are denied."""
        self._bodies = Counter(record.digest for record in self._children.values())
        """By how many names and children the bytes of a manifest are stored."""
        self._parents: dict[Digest, set[Name]] = {}
        """Whose lists refer to the child."""
        self._untold: dict[Name, float] = {}
        """Since when the index lacks the time of a manifest's last pull."""
        for name, record in self._records.items():
            self._names.setdefault(name.place, set()).add(name)
            if record.denied:
                self._denied.setdefault(name.place, set()).add(name)
            self._bodies[record.digest] += 1
            if record.is_list:
                for child in record.children:
                    self._parents.setdefault(child, set()).add(name)

    def open(self) -> None:
        """Take in children whose bytes came without that being written."""
        for child in list(self._parents):
            self.take_in(child)

    def close(self) -> None:
        """Write out what is pending."""
        for name in self._untold:
            self._index.put_manifest(name, self._records[name])

    def of(self, place: tuple[str, str]) -> Iterator[tuple[Name, ManifestRecord]]:
        """Yield the manifests of the (host, repository)."""
        return ((name, self._records[name]) for name in self._names.get(place, ()))

    def listing(self, place: tuple[str, str]) -> list[ManifestRecord]:
        """Return those that are not denied; other threads may ask."""
        found = [self._records.get(name) for name in list(self._names.get(place, ()))]
        return [record for record in found if record is not None and not record.denied]

    def denied(self, place: tuple[str, str]) -> list[ManifestRecord]:
        """Return those that are denied of the (host, repository)."""
        return [self._records[name] for name in self._denied.get(place, ())]

    def put(self, name: Name, record: ManifestRecord) -> None:
        """Store a manifest, in the place of what the name had."""
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
        """Return whether `known` is what `put` would make of the record."""
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
        """Note that a client has pulled it, or that it was brought; on disk every TOLD_S seconds, and at the end."""
        record = self._records.get(name)
        if record is None:
            return
        self._records[name] = record = record._replace(pulled=now) if by_client else record._replace(brought=now)
        if now - self._untold.setdefault(name, now) >= TOLD_S:
            del self._untold[name]
            self._index.put_manifest(name, record)

    def take_in(self, digest: Digest) -> None:
        """Let the lists that refer to this blob list what it lists, if its bytes are here and are a manifest."""
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
        """Return the manifest that is this blob, as it is stored by name or held as a file. A list is none."""
        if digest.hex not in self._bodies:
            return self._read(digest)
        body = next(record.body for record in self._records.values() if record.digest == digest.hex)
        record = ManifestRecord.parse(body, DOCKER_TYPE, now=0.0)
        return None if record is None or record.is_list else record

    def _leave(self, name: Name, record: ManifestRecord, *, still: list[Digest] | tuple[()]) -> None:
        """The name no longer has this record, and refers only to the children in `still`."""
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
