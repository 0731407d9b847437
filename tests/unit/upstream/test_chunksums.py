"""chunksums: which lists cover a blob."""

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.errors import UnexpectedResponse
from pullthrough.upstream import chunksums

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64


@pytest.mark.parametrize(
    ("text", "size"),
    [
        pytest.param(f"{A} 0-0", 1, id="one byte"),
        pytest.param(f"{A} 0-9\n{B} 10-14\n", 15, id="two chunks"),
        pytest.param(f"  {A}\t0-9  {B} 10-14", 15, id="any white space"),
    ],
)
def test_size(text: str, size: int) -> None:
    """The last chunk ends where the blob does."""
    assert chunksums.check(text.encode()) == size


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(A, id="digest alone"),
        pytest.param(f"{A} 0-9 {B}", id="half a pair"),
        pytest.param(f"{A} 1-9", id="first byte missing"),
        pytest.param(f"{A} 0-9 {B} 11-14", id="gap"),
        pytest.param(f"{A} 0-9 {B} 9-14", id="overlap"),
        pytest.param(f"{A} 0-9 {B} 10-9", id="empty chunk"),
        pytest.param(f"{A} 0", id="no interval"),
        pytest.param(f"{A} -5", id="suffix"),
        pytest.param(f"{A} 0-\u0661", id="digit of another script"),
        pytest.param(f"{A} 0-{'9' * 5000}", id="endless number"),
        pytest.param("sha256:abc 0-9", id="no digest"),
        pytest.param("<html> <body>", id="a captive portal"),
    ],
)
def test_refused(text: str) -> None:
    """Whatever does not cover a blob is refused, with what was expected and what was got."""
    with pytest.raises(UnexpectedResponse, match=r"expected .* got "):
        chunksums.check(text.encode())


def test_whole() -> None:
    """The list that is made up offline is one that is accepted."""
    assert chunksums.check(chunksums.whole(Digest("a" * 64), 12)) == 12
