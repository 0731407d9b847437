"""How long a blob may be, by what is known of it: what a recording and a grant expect.

Invariant: a set of complete lengths, empty where nothing is known. What manifests claim counts within their own
repository, so that nobody spoils another one's blob by a manifest that claims a wrong size for it.
"""

from pullthrough.core.digest import EMPTY, Digest
from pullthrough.store.store import Store


def sizes_in(store: Store, host: str, repository: str, digest: Digest) -> frozenset[int]:
    """Return the lengths that the blob may have in this repository: the held one, else those that manifests claim.

    A claim is no secret, so manifests that are private by now count too.
    """
    if digest == EMPTY:
        return frozenset({0})
    if (held := store.held(digest)) is not None and held.size is not None:
        return frozenset({held.size})
    records = store.manifests_of(host, repository, private=True).values()
    return frozenset(size for record in records if (size := record.claim(digest)))


def public_sizes(store: Store, digest: Digest) -> frozenset[int]:
    """Return the same of a blob that everybody may have, from whatever repository; of another nothing is known."""
    record = store.blob(digest)
    if digest != EMPTY and (record is None or not record.public):
        return frozenset()
    places = store.repositories(digest) or [("", "")]
    return frozenset[int]().union(*(sizes_in(store, *place, digest) for place in places))
