"""listing, prune_plan, usage, humanize: what is told of a store and what goes of it, from values alone."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.errors import InvalidRequest, NoSuchModel
from pullthrough.core.humanize import ago_text, columns, size_text
from pullthrough.core.manifest_json import LIST_TYPE
from pullthrough.core.records import BlobRecord, ManifestRecord, Name
from pullthrough.library.listing import View, beyond_text, detail, find, listing, statistics
from pullthrough.library.prune_plan import Plan, plan_prune, plan_removal
from pullthrough.store.usage import DAY_S, Totals, Usage

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
    with pytest.raises(InvalidRequest, match="invalid model name"):
        Name.parse(text)


def test_unknown_and_ambiguous() -> None:
    """An error names what is near; the default registry wins, between others nobody does."""
    one, two = Name("hf.co", "me/x", "q"), Name("other.example", "me/x", "q")
    with pytest.raises(NoSuchModel, match=r"model 'b' not found; see"):
        find("b", [A, B])
    with pytest.raises(NoSuchModel, match=r"model 'me/b' not found; stored is me/b:1b"):
        find("me/b", [A, B])
    with pytest.raises(NoSuchModel, match=r"may be any of hf\.co/me/x:q, other\.example/me/x:q"):
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
    traffic = Usage({0: Totals(1, 1)})
    assert traffic.take() == {}
    traffic.count_up_to(served=0, fetched=0, now=5.0)
    assert traffic.take() == {}
    traffic.count_up_to(served=10, fetched=4, now=5.0)
    traffic.count_up_to(served=10, fetched=9, now=DAY_S + 1.0)
    assert traffic.take() == {0: Totals(11, 5, saved=6), 1: Totals(0, 5, saved=0)}
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


# --- both representations, lists and their children


def body_of(*parts: str, runner: str = "") -> bytes:
    layers = [{"mediaType": "x", "digest": str(digest(part)), "size": 10} for part in parts]
    return json.dumps({"layers": layers, **({"runner": runner} if runner else {})}).encode()


def list_of(*children: bytes | dict[str, object], pulled: float = 0.0, confirmed: float = 0.0) -> ManifestRecord:
    """A list of references, or of what is given."""
    entries = [
        {"digest": f"sha256:{sha256(child).hexdigest()}", "runner": json.loads(child).get("runner"), "format": "gguf"}
        if isinstance(child, bytes)
        else child
        for child in children
    ]
    document = {"mediaType": LIST_TYPE, "manifests": entries}
    record = ManifestRecord.parse(json.dumps(document).encode(), "text/plain", now=confirmed)
    assert record is not None
    return record._replace(pulled=pulled)


def child_of(body: bytes) -> tuple[Digest, ManifestRecord]:
    record = ManifestRecord.parse(body, "", now=0.0)
    assert record is not None
    return Digest(record.digest), record


FIRST, SECOND = child_of(body_of("a", "both", runner="llamacpp")), child_of(body_of("b", "both", runner="ggml"))
LIST = list_of(FIRST[1].body, SECOND[1].body, pulled=7.0, confirmed=3.0)
PLAIN = manifest("a", "both", pulled=5.0, confirmed=4.0)


def view_of(plain: ManifestRecord | None, lists: ManifestRecord, *here: str, known: int = 1) -> View:
    """A model of both representations; `known` children are here, as blobs too."""
    children = dict((FIRST, SECOND)[:known])
    for record in children.values():
        lists = lists.grown(record)
    blobs = held(*here) | {each: BlobRecord(len(record.body), held=True) for each, record in children.items()}
    manifests = {A.twin: lists} | ({A: plain} if plain is not None else {})
    return View(manifests, blobs, ("a*",), {}, children)


def test_two_representations_are_one_row() -> None:
    """Pulled when either was; the size is what both need, each blob once; the digest is the older clients'."""
    (row,) = listing(view_of(PLAIN, LIST, "a", "both"))
    assert (row["name"], row["digest"], row["pulled"], row["pinned"]) == (
        "a:latest",
        f"sha256:{PLAIN.digest}",
        7.0,
        True,
    )
    assert (row["size"], row["held"]) == (20 + len(FIRST[1].body), "complete")
    assert find("a", [A.twin, A]) == A
    view = view_of(PLAIN._replace(denied=True), LIST._replace(denied=True), "a", "both")
    assert [row["visibility"] for row in listing(view)] == ["private"]
    # Upstream has granted the list again.
    view = view_of(PLAIN._replace(denied=True), LIST, "a", "both")
    assert [(row["visibility"], row["digest"]) for row in listing(view)] == [("public", f"sha256:{LIST.digest}")]


@pytest.mark.parametrize(
    ("here", "known", "expected"),
    [
        pytest.param(("a", "both"), 1, "complete", id="one child of two, whole"),
        pytest.param(("a",), 1, "partial", id="one child of two, in part"),
        pytest.param(("a", "both"), 2, "partial", id="both children, one in part"),
        pytest.param(("a", "both", "b"), 2, "complete", id="both children, whole"),
        pytest.param(("a", "both", "b"), 0, "partial", id="layers without a child"),
    ],
)
def test_what_of_a_list_is_held(here: tuple[str, ...], known: int, expected: str) -> None:
    """A child that nobody has asked for is not missed; one that is known is, with all its layers."""
    (row,) = listing(view_of(None, LIST, *here, known=known))
    assert row["held"] == expected


def test_a_child_that_is_the_plain_manifest() -> None:
    """Its bytes are here, though no blob has been asked for."""
    lists = list_of(PLAIN.body).grown(PLAIN)
    view = View({A: PLAIN, A.twin: lists}, held("a", "both"), (), {}, {Digest(PLAIN.digest): PLAIN})
    (row,) = listing(view)
    assert row["held"] == "complete"
    assert [child["held"] for child in detail(view, "a")["children"]] == [True]


def test_children_in_detail() -> None:
    """With their layers as far as they are known; those in place always are."""
    place = {"runner": "MLX", "layers": json.loads(body_of("c"))["layers"]}
    lists = list_of(FIRST[1].body, SECOND[1].body, place)
    found = detail(view_of(PLAIN, lists, "a", "c"), "a")
    assert [each["digest"] for each in found["layers"]] == [digest("a"), digest("both")]
    assert found["list"] == f"sha256:{lists.digest}"
    assert [(each["runner"], each["format"], each["digest"], each["held"]) for each in found["children"]] == [
        ("llamacpp", "gguf", FIRST[0], True),
        ("ggml", "gguf", SECOND[0], False),
        ("mlx", "", None, True),
    ]
    assert [[(layer["digest"], layer["held"]) for layer in each["layers"]] for each in found["children"]] == [
        [(digest("a"), True), (digest("both"), False)],
        [],
        [(digest("c"), True)],
    ]
    assert found["confirmed"] == 4.0
    assert detail(View({A: PLAIN}, {}, (), {}), "a")["children"] == []


def test_sums_count_a_model_once() -> None:
    """What both representations list is not stored twice by any other cache either."""
    sums = statistics(view_of(PLAIN, LIST, "a", "both"))
    assert (sums["models"], sums["deduplicated_bytes"]) == (1, 0)


def test_both_representations_go_together() -> None:
    """With the children's layers; what another model lists stays."""
    view = view_of(PLAIN, LIST, "a", "both", "b", known=2)
    manifests = {**view.manifests, B: manifest("both")}
    plan = plan_removal(manifests, view.blobs, [A], busy=())
    assert plan.names == (A,)
    assert set(plan.blobs) == {digest("a"), digest("b"), FIRST[0], SECOND[0]}
    for oldest, names in ((6.0, ()), (7.0, (A,))):
        plan = plan_prune(view.manifests, view.blobs, {}, oldest=oldest, every=True, pins=(), busy=())
        assert plan.names == names
    assert plan_prune(view.manifests, view.blobs, {}, oldest=9, every=True, pins=(), busy=[digest("b")]) == Plan()
    assert plan_prune(view.manifests, view.blobs, {}, oldest=9, every=True, pins=("a*",), busy=()) == Plan()


def test_what_no_model_shows() -> None:
    """Private blobs, and what lies beside the blobs; nothing is said of nothing."""
    blobs = {
        Digest(letter * 64): BlobRecord(size, True, public)
        for letter, size, public in (("a", 5, True), ("b", 7, False))
    }
    blobs[Digest("c" * 64)] = BlobRecord(9, False, False)
    sums = statistics(View({}, blobs, (), {}, {}, 2000, 3))
    assert (sums["bytes"], sums["private_bytes"], sums["unfinished_bytes"], sums["quarantined_bytes"]) == (
        12,
        7,
        2000,
        3,
    )
    assert beyond_text(sums) == "private blobs 7 B, unfinished recordings 2.0 KB, quarantine 3 B"
    assert beyond_text(statistics(View({}, {}, (), {}))) == ""
