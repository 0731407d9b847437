"""manual: the documentation as pages, whose links lead somewhere."""

import re
from pathlib import Path

import pytest

from pullthrough.monitoring.manual import Manual, slug


def test_our_own() -> None:
    """Each page has a title, and each of its links leads to a page, a heading or a picture that is there."""
    manual = Manual()
    assert "clients.md" in manual.pages and "status-light.png" in manual.pictures
    anchors = {name: set(re.findall(r'<h\d id="([^"]+)"', manual.page(name)[1])) for name in manual.pages}
    for name in manual.pages:
        title, html = manual.page(name)
        assert title and html.count("<h1 ") == 1, name
        for link in re.findall(r'(?:href|src)="([^"]+)"', html):
            if not link.startswith(("http://", "https://")):
                page, _, anchor = link.partition("#")
                assert (page or name) in {*manual.pages, *manual.pictures}, (name, link)
                assert not anchor or anchor in anchors[page or name], (name, link)


def test_a_page(tmp_path: Path) -> None:
    """Headings are anchors, tables are tables, and a link out of the folder is its text."""
    (tmp_path / "README.md").write_text(
        "# A *page*\n\n## What it `does`, and why\n\n[here](b.md#x) [out](../c.md) **b**\n\n| a |\n| --- |\n| 1 |\n"
    )
    title, html = Manual([tmp_path / "none", tmp_path]).page("README.md")
    assert title == "A *page*"
    assert '<h2 id="what-it-does-and-why">' in html
    assert '<p><a href="b.md#x">here</a> out <strong>b</strong></p>' in html
    assert "<td>1</td>" in html


def test_none(tmp_path: Path) -> None:
    """Where there is no documentation, there are no pages."""
    assert not Manual([tmp_path]).pages and not Manual([tmp_path]).pictures


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("Set one up", "set-one-up"), ("`ls`, `show`", "ls-show"), ("Ollama 0.35.0", "ollama-0350"), ("a_b-c", "a_b-c")],
)
def test_anchors(heading: str, anchor: str) -> None:
    """As they are made where the files are published."""
    assert slug(heading) == anchor
