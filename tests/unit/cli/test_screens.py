"""What each verb says is what the files beside this one say; and it fits."""

import pytest

from tests.screens import FILES, WIDTHS, screens


@pytest.mark.parametrize("width", WIDTHS)
def test_screens(width: int) -> None:
    """At each width, to the letter; `python -m tests.documents` writes what is wanted now."""
    assert screens(width) == (FILES / f"{width}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits(width: int) -> None:
    """No help, and no table of models, is wider than the terminal."""
    text = (FILES / f"{width}.txt").read_text(encoding="utf-8")
    for said in text.split("\n$ "):
        call, *lines = said.splitlines()
        if call.endswith("--help") or call.split()[-1] in ("ls", "ps"):
            told = [line for line in lines if not line.startswith("ollama-cache: ")]
            assert max(map(len, told), default=0) <= width, call
