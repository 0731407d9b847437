"""presigned: when a signed address expires, and what is none."""

import pytest

from pullthrough.core.presigned import expiry

QUERY = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k%2F20261128%2Fauto%2Fs3%2Faws4_request"
SIGNED = f"https://r2.example/a/data?{QUERY}&X-Amz-Date=20261128T120000Z&X-Amz-Expires=86400&X-Amz-Signature=ab"
NOON = 1795867200.0


def test_expiry() -> None:
    """The time of the signature and its lifetime."""
    for now in (NOON, NOON + 86399):
        assert expiry(SIGNED, now=now) == NOON + 86400


@pytest.mark.parametrize("wrong_by", [-56 * 365 * 86400.0, -1.0, 86400.0, 1e9])
def test_a_clock_that_is_wrong(wrong_by: float) -> None:
    """The address has just been obtained, so it is good: neither for years, nor over at once."""
    assert expiry(SIGNED, now=NOON + wrong_by) == NOON + wrong_by + 86400


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("https://", "http://", id="plain"),
        pytest.param("&X-Amz-Signature=ab", "", id="no-signature"),
        pytest.param("X-Amz-Signature=ab", "X-Amz-Signature=", id="empty-signature"),
        pytest.param("X-Amz-Date=20261128T120000Z", "X-Amz-Date=yesterday", id="no-date"),
        pytest.param("&X-Amz-Date=20261128T120000Z", "", id="without-date"),
        pytest.param("X-Amz-Date=20261128T120000Z", "X-Amz-Date=99999999T999999Z", id="impossible-date"),
        pytest.param("X-Amz-Expires=86400", "X-Amz-Expires=-1", id="negative"),
        pytest.param("X-Amz-Expires=86400", "X-Amz-Expires=0", id="no-lifetime"),
        pytest.param("X-Amz-Expires=86400", "X-Amz-Expires=604801", id="longer-than-a-week"),
        pytest.param("X-Amz-Expires=86400", "X-Amz-Expires=" + "9" * 5000, id="endless"),
        pytest.param("X-Amz-Expires=86400", "X-Amz-Expires=1e3", id="no-number"),
        pytest.param(f"?{QUERY}", "#", id="no-query"),
        pytest.param(QUERY, "&".join(["a=b"] * 40), id="too-many-fields"),
        pytest.param("https://r2.example", "https://[", id="no-address"),
    ],
)
def test_no_presigned_address(old: str, new: str) -> None:
    """Whatever is missing or malformed, there is no error."""
    assert expiry(SIGNED.replace(old, new), now=NOON) is None


def test_a_capability_is_none() -> None:
    """Another cache's own address looks like the registry's, and is not signed by it."""
    assert expiry("https://r2.example/data?size=1&expires=2&access=ab", now=NOON) is None
