"""cdn_loop: CDN-Loop is extended and recognised as RFC 8586 says."""

import pytest

from pullthrough.core.cdn_loop import LoopGuard

OURS = LoopGuard("ollama-cache-0123456789abcdef")


@pytest.mark.parametrize(
    ("trail", "expected"),
    [
        (None, "ollama-cache-0123456789abcdef"),
        ("", "ollama-cache-0123456789abcdef"),
        ("cloudflare; loops=1", "cloudflare; loops=1, ollama-cache-0123456789abcdef"),
    ],
)
def test_a_field_is_only_added_to(trail: str | None, expected: str) -> None:
    """What others have written stays, in order; ours is the last."""
    assert OURS.extend(trail) == expected


@pytest.mark.parametrize(
    ("trail", "own"),
    [
        (None, False),
        ("", False),
        ("ollama-cache-0123456789abcdef", True),
        ("Ollama-Cache-0123456789ABCDEF", True),
        ("a.example:443;x=1 ,  ollama-cache-0123456789abcdef ; hops=2, b", True),
        ("ollama-cache-fedcba9876543210", False),
        ("ollama-cache-0123456789abcdef0", False),
        ('a; x="ollama-cache-0123456789abcdef"', False),
    ],
)
def test_own_is_told_from_others(trail: str | None, own: bool) -> None:
    """Members are compared whole, without their parameters; another cache of this kind is another cache."""
    assert OURS.is_own(trail) is own


def test_what_was_extended_is_recognised() -> None:
    """Two caches in a row: the first one sees itself, the second one does not."""
    other = LoopGuard("ollama-cache-fedcba9876543210")
    trail = OURS.extend(None)
    assert not other.is_own(trail)
    assert OURS.is_own(other.extend(trail))
