"""model_index: searched, sorted and paged, the same for equals whichever way."""

import json
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Final

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.library.listing import View
from pullthrough.monitoring.model_index import PAGE, ModelIndex, Order

NOW: Final = 2_000_000_000.0


def stored(
    pulled: Mapping[str, float],
    *,
    sizes: Mapping[str, int] | None = None,
    pins: tuple[str, ...] = (),
    lacking: Collection[str] = (),
    private: Collection[str] = (),
) -> View:
    """A store of these models, of one layer each; the layers of those `lacking` are not here."""
    manifests, blobs = {}, {}
    for text, time in pulled.items():
        digest, size = Digest(sha256(text.encode()).hexdigest()), (sizes or {}).get(text, 1000)
        body = json.dumps({"layers": [{"digest": f"sha256:{digest.hex}", "size": size}]}).encode()
        record = ManifestRecord.parse(body, "", now=time)
        assert record is not None
        repository, _, tag = text.rpartition(":")
        name = Name("registry.ollama.ai", f"library/{repository}", tag)
        manifests[name] = record._replace(pulled=time, denied=text in private)
        blobs[digest] = BlobRecord(size, text not in lacking, True)
    return View(manifests, blobs, pins, {})


def found(index: ModelIndex, text: str = "", order: Order = Order.PULLED, number: int = 1) -> list[str]:
    return [row.typed for row in index.page(text, order, number).rows]


def test_rows() -> None:
    """What a list shows of a model; a private one is not there."""
    index = ModelIndex(stored({"a:1": 5.0, "b:1": 0.0, "s:1": 9.0}, pins=("a:*",), lacking=["b:1"], private=["s:1"]))
    first, second = index.page().rows
    assert (first.typed, first.size, first.pulled, first.is_whole, first.is_pinned) == ("a:1", 1000, 5.0, True, True)
    assert (second.typed, second.pulled, second.is_whole, second.is_pinned) == ("b:1", 0.0, False, False)
    assert len(index) == 2
    assert found(index, "s:1") == []


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order.PULLED, "d b c a"),
        (Order.OLDEST, "a b c d"),
        (Order.NAME, "a b c d"),
        (Order.LAST_NAME, "d c b a"),
        (Order.SIZE, "a c d b"),
        (Order.SMALLEST, "b a c d"),
    ],
)
def test_orders(order: Order, expected: str) -> None:
    """Equals stand by name in both directions of an order."""
    pulled = {"c:1": 5.0, "a:1": 0.0, "d:1": 9.0, "b:1": 5.0}
    index = ModelIndex(stored(pulled, sizes={"b:1": 10}))
    assert found(index, order=order) == [f"{name}:1" for name in expected.split()]


def test_search() -> None:
    """Each word somewhere in the name, in any case; blanks are no words."""
    index = ModelIndex(stored({"Llama3.2:1b": 1.0, "llama3.2:latest": 2.0, "qwen3:1b": 3.0}))
    assert found(index, "LLAMA") == ["llama3.2:latest", "Llama3.2:1b"]
    assert found(index, " 1b  llama ") == ["Llama3.2:1b"]
    assert found(index, "  ") == ["qwen3:1b", "llama3.2:latest", "Llama3.2:1b"]
    assert found(index, "*") == []


def test_pages() -> None:
    """Every model is on one page; what lies outside is the nearest page."""
    index = ModelIndex(stored({f"m{number:04d}:1": float(number) for number in range(2 * PAGE + 1)}))
    pages = [index.page(order=Order.NAME, number=number) for number in (1, 2, 3)]
    assert [row.typed for page in pages for row in page.rows] == [f"m{number:04d}:1" for number in range(2 * PAGE + 1)]
    assert [(page.number, page.pages, page.found) for page in pages] == [(1, 3, 101), (2, 3, 101), (3, 3, 101)]
    assert index.page(order=Order.NAME, number=4) == pages[2]
    assert index.page(order=Order.NAME, number=0) == pages[0]


def test_nothing() -> None:
    """An empty store has one page, which is empty."""
    assert ModelIndex(stored({})).page() == ([], 1, 1, 0)


def test_a_full_last_page() -> None:
    """Exactly a page of models needs no second one."""
    assert ModelIndex(stored({f"m{number}:1": 1.0 for number in range(PAGE)})).page().pages == 1
