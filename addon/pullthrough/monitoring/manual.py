"""The documentation as web pages, for networks that cannot reach the published one.

The files are those of docs/, which is inside the package in a wheel and beside it in a checkout. Invariant: only our
own text is shown; a link that leads out of the folder becomes plain text.
"""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PACKAGE: Final = Path(__file__).parents[1]
PLACES: Final = (_PACKAGE / "docs", _PACKAGE.parents[1] / "docs")
"""The folder's place in a wheel, and in a checkout."""
START: Final = "README.md"


class Manual:
    """The pages of one folder."""

    def __init__(self, places: Sequence[Path] = PLACES) -> None:
        """The first of the `places` with documentation is used."""
        folder = next((place for place in places if (place / START).is_file()), None)
        files = sorted(folder.iterdir()) if folder is not None else []
        self.pages = {path.name: path for path in files if path.suffix == ".md"}
        """The pages, by the name of the file. Empty if there is no documentation."""
        self.pictures = {path.name: path for path in files if path.suffix == ".png"}
        self._markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
        self.page = lru_cache(maxsize=None)(self._page)
        """Return (title, HTML) of the page of this name; rendered once."""

    def _page(self, name: str) -> tuple[str, str]:
        text = self.pages[name].read_text(encoding="utf-8")
        tokens = self._markdown.parse(text)
        title = ""
        for token, inside in itertools.pairwise(tokens):
            if token.type == "heading_open":
                title = title or inside.content
                token.attrSet("id", slug(inside.content))
        for token in tokens:
            if token.children:
                token.children = _kept(token.children)
        return title, self._markdown.renderer.render(tokens, self._markdown.options, {})


def slug(heading: str) -> str:
    """Return the anchor of a heading, made as on the site where the files are published."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _kept(tokens: list[Token]) -> list[Token]:
    """Leave out the links to files outside the folder."""
    kept, left_out = [], False
    for token in tokens:
        if token.type == "link_open" and str(token.attrGet("href")).startswith("../"):
            left_out = True
        elif token.type == "link_close" and left_out:
            left_out = False
        else:
            kept.append(token)
    return kept
