"""digest: one name, however it is spelled."""

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("text", [f"sha256:{HEX}", f"sha256-{HEX}", f"sha256:{HEX.upper()}"])
def test_spellings_are_equal(text: str) -> None:
    """Colon and dash, lower and upper case name the same blob."""
    assert Digest.parse(text) == Digest(HEX)


def test_spells_itself() -> None:
    """With a colon on the wire, with a dash in folders."""
    digest = Digest(HEX)
    assert (str(digest), digest.file_name, digest.short) == (f"sha256:{HEX}", f"sha256-{HEX}", HEX[:12])


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEX,
        f"sha256:{HEX[1:]}",
        f"sha256:{HEX}0",
        f"sha512:{HEX}",
        f"sha256_{HEX}",
        f"sha256:{HEX}\n",
        f" sha256:{HEX}",
    ],
)
def test_others_are_refused(text: str) -> None:
    """Anything else says what was expected and what was got."""
    with pytest.raises(InvalidRequest, match=r"expected sha256:<64 hexadecimal digits>, got "):
        Digest.parse(text)
