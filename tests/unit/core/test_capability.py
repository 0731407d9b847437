"""capability: who holds the query may read that blob, until then."""

from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.capability import Capability, verify
from pullthrough.core.digest import Digest

SECRET = b"s" * 32
DIGEST = Digest("ab" * 32)
QUERY = Capability(DIGEST, 1234, 1000).to_query(SECRET)


def test_round_trip() -> None:
    """What was granted verifies."""
    assert verify(QUERY, DIGEST, secret=SECRET, now=999.9) == Capability(DIGEST, 1234, 1000)


def test_refused() -> None:
    """Another blob, another store's secret, and the end of its time."""
    assert verify(QUERY, Digest("cd" * 32), secret=SECRET, now=0) is None
    assert verify(QUERY, DIGEST, secret=b"t" * 32, now=0) is None
    assert verify(QUERY, DIGEST, secret=SECRET, now=1000) is None
    assert verify("", DIGEST, secret=SECRET, now=0) is None
    assert verify("X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=00", DIGEST, secret=SECRET, now=0) is None


@given(st.integers(0, len(QUERY) - 1), st.characters(codec="ascii"))
def test_every_character_counts(index: int, character: str) -> None:
    """Altering one character of a query makes it worthless."""
    altered = QUERY[:index] + character + QUERY[index + 1 :]
    expected = Capability(DIGEST, 1234, 1000) if altered == QUERY else None
    assert verify(altered, DIGEST, secret=SECRET, now=0) == expected


def test_offload_is_signed() -> None:
    """Whether a holder may be sent elsewhere is no matter of the holder's."""
    granted = Capability(DIGEST, 1234, 1000, offload=True)
    query = granted.to_query(SECRET)
    assert verify(query, DIGEST, secret=SECRET, now=0) == granted
    assert verify(query.replace("&offload=1", ""), DIGEST, secret=SECRET, now=0) is None
    assert verify(QUERY.replace("&access", "&offload=1&access"), DIGEST, secret=SECRET, now=0) is None


def test_longer_life_cannot_be_claimed() -> None:
    """The expiry is signed."""
    assert verify(QUERY.replace("expires=1000", "expires=9000"), DIGEST, secret=SECRET, now=0) is None
