"""catalogue, pruning, traffic, wording: what is told of a store and what goes of it, from values alone."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from pullthrough.catalogue import View, detail, find, listing, statistics
from pullthrough.digest import Digest
from pullthrough.errors import InvalidRequest, NoSuchModel
from pullthrough.pruning import Plan, plan_prune, plan_removal
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.traffic import DAY_S, Totals, Traffic
from pullthrough.wording import ago_text, columns, size_text

HOST = "registry.ollama.ai"


def digest(text: str) -> Digest:
    return Digest(sha256(text.encode()).hexdigest())


def manifest(*parts: str, pulled: float = 0.0, confirmed: float = 0.0) -> ManifestRecord:
    layers = [{"mediaType": "x", "digest": str(digest(part)), "size": 10} for part in parts]
    record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "application/json", now=confirmed)
    assert record is not None
    return record._replace(pulled=pulled)


def held(*parts: str, recorded: float = 0.0) -> dict[Digest, BlobRecord]:
    return {digest(part): BlobRecord(10, held=True, recorded=recorded) for part in parts}


A, B = Name.parse("a"), Name.parse("me/b:1b")


@pytest.mark.parametrize(
    ("text", "name", "typed"),
    [
        ("llama3.2", Name(HOST, "library/llama3.2", "latest"), "llama3.2:latest"),
        ("llama3.2:1b", Name(HOST, "library/llama3.2", "1b"), "llama3.2:1b"),
        ("me/model:tag", Name(HOST, "me/model", "tag"), "me/model:tag"),
        ("hf.co/me/model:Q4", Name("hf.co", "me/model", "Q4"), "hf.co/me/model:Q4"),
        ("registry.ollama.ai/library/a:b", Name(HOST, "library/a", "b"), "a:b"),
    ],
)
def test_what_users_type(text: str, name: Name, typed: str) -> None:
    """As Ollama completes it, and shown as it is typed."""
    assert Name.parse(text) == name
    assert name.typed == typed
    assert find(text, [name]) == name


@pytest.mark.parametrize("text", ["", "a b", "a:", "/a", "a//b", "llama*", ":tag", "hf.co//x"])
def test_what_is_no_model(text: str) -> None:
    """Said to be none, and not asked upstream for."""
    with pytest.raises(InvalidRequest, match="expected a model such as"):
        Name.parse(text)


def test_unknown_and_ambiguous() -> None:
    """An error names what is near; the default registry wins, between others nobody does."""
    one, two = Name("hf.co", "me/x", "q"), Name("other.example", "me/x", "q")
    with pytest.raises(NoSuchModel, match=r"expected a stored model, got 'b'; see"):
        find("b", [A, B])
    with pytest.raises(NoSuchModel, match=r"expected a stored model, got 'me/b'; stored is me/b:1b"):
        find("me/b", [A, B])
    with pytest.raises(NoSuchModel, match=r"may be hf\.co/me/x:q, other\.example/me/x:q"):
        find("me/x:q", [one, two])
    assert find("me/x:q", [one, two, Name(HOST, "me/x", "q")]).host == HOST
    assert find("me/x:q", [two]) == two


def test_rows_detail_and_sums() -> None:
    """A shared blob counts once in what is held, and what is missing makes a model partial."""
    models = {A: manifest("a", "both", pulled=5.0), B: manifest("b", "both", "gone", pulled=9.0)}
    view = View(models, held("a", "b", "both", "alone"), ("me/*",), {1: Totals(300, 100), 0: Totals(0, 50)})
    assert [(row["name"], row["held"], row["pinned"], row["size"]) for row in listing(view)] == [
        ("me/b:1b", "partial", True, 30),
        ("a:latest", "complete", False, 20),
    ]
    assert [layer["held"] for layer in detail(view, "me/b:1b")["layers"]] == [True, True, False]
    sums = statistics(view)
    assert (sums["models"], sums["blobs"], sums["bytes"], sums["deduplicated_bytes"]) == (2, 4, 40, 10)
    assert (sums["served"], sums["fetched"], sums["saved"], sums["ratio"]) == (300, 150, 150, 0.5)
    assert [day["day"] for day in sums["days"]] == ["1970-01-02", "1970-01-01"]


def test_removal_leaves_what_others_need() -> None:
    """The model goes with what is its alone, but for what somebody reads."""
    models = {A: manifest("a", "both", "read"), B: manifest("b", "both")}
    plan = plan_removal(models, held("a", "b", "both", "read"), [A], busy={digest("read")})
    assert plan == Plan((A,), (digest("a"),), (), 10)


def test_prune() -> None:
    """Old blobs without a model and old leftovers; with `every` old models too, but pinned and busy ones."""
    c = Name.parse("c")
    models = {A: manifest("a", pulled=10.0), B: manifest("b", pulled=10.0), c: manifest("c", pulled=90.0)}
    blobs = held("a", "b", "c", "old") | held("new", recorded=90.0)
    files = {Path("old"): (7, 10.0), Path("new"): (7, 90.0)}

    def plan(*, every: bool, busy: frozenset[Digest] = frozenset(), oldest: float = 50.0) -> Plan:
        return plan_prune(models, blobs, files, oldest=oldest, every=every, pins=[str(B)], busy=busy)

    assert plan(every=False) == Plan((), (digest("old"),), (Path("old"),), 17)
    assert plan(every=True).names == (A,)
    assert set(plan(every=True).blobs) == {digest("old"), digest("a")}
    assert plan(every=True, busy=frozenset([digest("a"), digest("old")])) == Plan((), (), (Path("old"),), 7)
    assert plan(every=True, oldest=100.0).names == (A, c)


def test_a_model_that_nobody_pulled_is_as_old_as_its_manifest() -> None:
    """What was recorded in the background is not swept at once."""
    models = {A: manifest("a", confirmed=90.0)}
    plan = plan_prune(models, held("a"), {}, oldest=50.0, every=True, pins=(), busy=())
    assert plan == Plan()


def test_traffic_by_day() -> None:
    """Totals go on from what was left, each day is told once, and what is counted is the growth."""
    traffic = Traffic({0: Totals(1, 1)})
    assert traffic.take() == {}
    traffic.count_up_to(served=0, fetched=0, now=5.0)
    assert traffic.take() == {}
    traffic.count_up_to(served=10, fetched=4, now=5.0)
    traffic.count_up_to(served=10, fetched=9, now=DAY_S + 1.0)
    assert traffic.take() == {0: Totals(11, 5), 1: Totals(0, 5)}
    traffic.count_up_to(served=10, fetched=9, now=DAY_S + 2.0)
    assert traffic.take() == {}


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (4_661_224_676, "4.6 GB"), (274_302_450, "274 MB")]
)
def test_sizes(size: int, text: str) -> None:
    """As `ollama list` shows them."""
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "never"), (0.2, "just now"), (61, "1 minute ago"), (86400, "1 day ago"), (9 * 86400, "9 days ago"),
     (15 * 86400, "2 weeks ago"), (400 * 86400, "1 year ago")],
)  # fmt: skip
def test_times(seconds: float | None, text: str) -> None:
    """Whole units, the largest that says enough."""
    assert ago_text(seconds) == text


def test_columns() -> None:
    """Aligned, and without blanks at the end."""
    assert columns([("A", "B"), ("long", "")]) == ["A       B", "long"]
