"""The lengths that a blob may have by what is known of it, as a recording and a grant expect them.

Invariant: a set of complete lengths, empty if nothing is known. What manifests claim counts only within their own
repository, so that nobody can spoil another's blob with a manifest that claims a wrong size for it.
"""

from pullthrough.core.digest import EMPTY, Digest
from pullthrough.store.store import Store


def sizes_in(store: Store, host: str, repository: str, digest: Digest) -> frozenset[int]:
    """Return the lengths that the blob may have in this repository: the held one, else those that manifests claim.

    A claim is no secret, so manifests that have become private count, too.
    """
    if digest == EMPTY:
        return frozenset({0})
    if (held := store.held(digest)) is not None and held.size is not None:
        return frozenset({held.size})
    records = store.manifests_of(host, repository, private=True).values()
    return frozenset(size for record in records if (size := record.claim(digest)))


def public_sizes(store: Store, digest: Digest) -> frozenset[int]:
    """Return the lengths that a public blob may have, from any repository; none for any other blob."""
    record = store.blob(digest)
    if digest != EMPTY and (record is None or not record.public):
        return frozenset()
    places = store.repositories(digest) or [("", "")]
    return frozenset[int]().union(*(sizes_in(store, *place, digest) for place in places))
