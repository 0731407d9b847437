"""manifest_table: lists that grow by what their children list; through the store, which owns it."""

import hashlib
import json
import sqlite3
import tempfile
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pullthrough.core.digest import Digest
from pullthrough.core.manifest_json import DOCKER_TYPE, LIST_TYPE, LONGEST
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.store import Store
from tests.support.formats import make_format_1

HOST = "registry.ollama.ai"
NAME = Name(HOST, "library/tiny", "latest")
LISTS = NAME.twin
PLACE = NAME.place


def digest_of(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def hold(store: Store, data: bytes) -> Digest:
    """The blob is recorded."""
    digest = digest_of(data)
    ingest = store.ingest(digest)
    ingest.begin(len(data))
    ingest.write_at(0, data)
    ingest.sync()
    store.publish(digest, store.place(digest, ingest.partial_path), now=1.0)
    ingest.forget()
    ingest.close()
    return digest


def evict(store: Store, *blobs: bytes) -> None:
    store.remove_files(store.evict([digest_of(blob) for blob in blobs]))


def manifest(*blobs: bytes) -> bytes:
    layers = [{"digest": digest_of(blob), "size": len(blob)} for blob in blobs]
    return json.dumps({"mediaType": DOCKER_TYPE, "layers": layers}).encode()


def listing(*children: bytes | dict[str, object]) -> bytes:
    """A list of references, or of whatever is given."""
    items = [{"digest": digest_of(child)} if isinstance(child, bytes) else child for child in children]
    return json.dumps({"mediaType": LIST_TYPE, "manifests": items}).encode()


def parsed(body: bytes) -> ManifestRecord:
    record = ManifestRecord.parse(body, "text/plain", now=5.0)
    assert record is not None
    return record


FIRST, SECOND = manifest(b"a", b"both"), manifest(b"b", b"both", b"b")
LIST = listing(FIRST, SECOND)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def test_a_list_grows(store: Store) -> None:
    """First it lists its children, whose sizes nobody knows; then what they list, as soon as they are here."""
    store.put_manifest(LISTS, parsed(LIST))
    for _ in range(2):
        record = store.manifest(LISTS)
        assert record is not None
        assert record.sizes == {digest_of(FIRST): None, digest_of(SECOND): None}
        assert (record.size, record.children, store.children()) == (0, record.digests, {})
        assert not store.is_member(*PLACE, digest_of(b"a"))
        store.close()
        store = Store.open(store.folder)
    hold(store, FIRST)
    grown = {digest_of(FIRST): len(FIRST), digest_of(b"a"): 1, digest_of(b"both"): 4}
    for _ in range(2):
        record = store.manifest(LISTS)
        assert record is not None
        assert record.sizes == {digest_of(SECOND): None, **grown}
        assert record.body == LIST
        assert list(store.children()) == [digest_of(FIRST)]
        assert store.children()[digest_of(FIRST)].body == FIRST
        assert [store.is_member(*PLACE, digest_of(each)) for each in (b"a", b"both", b"b")] == [True, True, False]
        assert (digest_of(b"a") in record.needed(store.children()), record.is_whole(store.children(), {})) == (
            True,
            False,
        )
        store.close()
        store = Store.open(store.folder)
    hold(store, b"a")
    hold(store, b"both")
    record = store.manifest(LISTS)
    assert record is not None
    assert record.is_whole(store.children(), store.blobs())
    store.close()


def test_a_child_that_is_here_before_its_list(store: Store) -> None:
    """It counts as soon as the list is stored, also again and again, as each confirmation does."""
    hold(store, FIRST)
    assert store.children() == {}
    for _ in range(2):
        store.put_manifest(LISTS, parsed(LIST))
        assert store.is_member(*PLACE, digest_of(b"a"))
    store.close()


@pytest.mark.parametrize("order", [(NAME, LISTS), (LISTS, NAME)], ids=["manifest first", "list first"])
def test_a_child_that_is_the_plain_manifest(store: Store, order: tuple[Name, Name]) -> None:
    """Its bytes are here without a blob of that name."""
    for name in order:
        store.put_manifest(name, parsed(FIRST if name == NAME else LIST))
    assert list(store.children()) == [digest_of(FIRST)]
    record = store.manifest(LISTS)
    assert record is not None
    assert record.lists(digest_of(b"a"))
    store.drop_manifest(NAME)
    assert list(store.children()) == [digest_of(FIRST)]
    store.close()


@pytest.mark.parametrize(
    "child",
    [
        pytest.param(b"no manifest", id="something else"),
        pytest.param(listing(FIRST), id="a list"),
        pytest.param(manifest(b"a") + b" " * LONGEST, id="too long"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_child_that_is_no_manifest(store: Store, child: bytes) -> None:
    """It is a blob, and nothing follows from it."""
    store.put_manifest(LISTS, parsed(listing(child)))
    hold(store, child)
    record = store.manifest(LISTS)
    assert record is not None
    assert (record.digests, store.children()) == ([digest_of(child)], {})
    assert not record.is_whole(store.children(), store.blobs())
    store.close()


def test_children_in_place(store: Store) -> None:
    """Their blobs are listed from the beginning; one layer in two children counts once."""
    layers = [{"digest": digest_of(blob), "size": len(blob)} for blob in (b"a", b"both", b"a")]
    record = parsed(listing({"runner": "mlx", "layers": layers}, SECOND, {"layers": layers[1:2]}))
    store.put_manifest(LISTS, record)
    assert record.sizes == {digest_of(b"a"): 1, digest_of(b"both"): 4, digest_of(SECOND): None}
    hold(store, SECOND)
    stored = store.manifest(LISTS)
    assert stored is not None
    assert [list(series.digests) for series in stored.series(store.children())] == [
        [digest_of(b"a"), digest_of(b"both"), digest_of(b"a")],
        [digest_of(b"b"), digest_of(b"both")],
        [digest_of(b"both")],
    ]
    assert stored.size == len(b"a") + len(b"both") + len(b"b") + len(SECOND)
    store.close()


def test_a_refusal_takes_children_along(store: Store) -> None:
    """Children and their layers are nobody's once the repository is private, but for what another one has."""
    store.put_manifest(LISTS, parsed(LIST))
    for blob in (FIRST, b"a", b"both"):
        hold(store, blob)
        store.confirm_public(*PLACE, digest_of(blob))
    store.confirm_public(HOST, "library/other", digest_of(b"both"))
    assert store.deny(*PLACE)
    for _ in range(2):
        assert [store.is_member(*PLACE, digest_of(blob)) for blob in (FIRST, b"a", b"both")] == [False] * 3
        assert [store.known_blobs()[digest_of(blob)].public for blob in (FIRST, b"a", b"both")] == [False, False, True]
        assert store.manifests_of(*PLACE) == {}
        store.close()
        store = Store.open(store.folder)
    # What comes to be known of a private list is private.
    hold(store, SECOND)
    assert not store.is_member(*PLACE, digest_of(b"b"))
    store.put_manifest(LISTS, parsed(LIST))
    assert store.is_member(*PLACE, digest_of(b"b"))
    assert not store.known_blobs()[digest_of(SECOND)].public
    store.close()


def test_children_go_with_the_last_list(store: Store) -> None:
    """They are known as long as a list refers to them; their bytes are stored once, and go with whoever is last."""
    other = Name(HOST, "library/other", "latest", takes_lists=True)
    for name, body in ((LISTS, LIST), (other, listing(SECOND)), (NAME, FIRST)):
        store.put_manifest(name, parsed(body))
    hold(store, SECOND)
    assert set(store.children()) == {digest_of(FIRST), digest_of(SECOND)}
    # A tag that has moved from a list to a manifest refers to nothing.
    store.put_manifest(LISTS, parsed(FIRST))
    assert set(store.children()) == {digest_of(SECOND)}
    store.drop_model(NAME)
    assert list(store.manifests()) == [other]
    store.drop_model(other.model)
    assert (store.manifests(), store.children()) == ({}, {})
    store.close()
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection:
        kinds = {key.partition(" ")[0] for (key,) in connection.execute("SELECT key FROM Cache")}
    assert kinds == {"blob", "index"}


def test_a_crash_between_blob_and_child(store: Store) -> None:
    """What the index lacks of a child is found at the next start."""
    store.put_manifest(LISTS, parsed(LIST))
    hold(store, FIRST)
    store.close()
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection, connection:
        connection.execute("DELETE FROM Cache WHERE key GLOB 'child *'")
    store = Store.open(store.folder)
    assert list(store.children()) == [digest_of(FIRST)]
    assert store.is_member(*PLACE, digest_of(b"a"))
    store.close()


def test_rows_of_the_version_before(store: Store) -> None:
    """A manifest whose facts say nothing of `brought` is read as it was, and needs no new index."""
    store.put_manifest(NAME, parsed(FIRST)._replace(pulled=7.0))
    store.close()
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection:
        ((key, value),) = connection.execute("SELECT key, value FROM Cache WHERE key GLOB 'manifest *'")
        facts = json.loads(value)
        del facts["brought"], facts["sum"]
        facts["sum"] = zlib.crc32(json.dumps(facts).encode())
        connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (json.dumps(facts), key))
        connection.commit()
    store = Store.open(store.folder)
    found = store.manifests()[NAME]
    assert (found.pulled, found.brought) == (7.0, 0.0)
    store.close()


def test_a_row_with_a_size_too_few(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """It is no sound index: the manifest is read from its file again."""
    store.put_manifest(NAME, parsed(FIRST))
    store.close()
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection:
        ((key, value),) = connection.execute("SELECT key, value FROM Cache WHERE key GLOB 'manifest *'")
        facts = json.loads(value)
        del facts["sum"]
        facts["claimed"] = facts["claimed"].partition(" ")[2]
        connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (json.dumps(facts), key))
        connection.commit()
    store = Store.open(store.folder)
    assert "expected a size for each blob" in caplog.text
    found = store.manifest(NAME)
    assert found is not None
    assert found.sizes == parsed(FIRST).sizes
    store.close()


def test_both_representations_are_one_model(store: Store) -> None:
    """Stored side by side, also after a restart; the key of the plain one is what it always was."""
    store.put_manifest(NAME, parsed(FIRST))
    store.put_manifest(LISTS, parsed(LIST))
    store.touch(LISTS, 7.0)
    store.close()
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection:
        keys = {key for (key,) in connection.execute("SELECT key FROM Cache WHERE key GLOB 'manifest *'")}
    assert keys == {f"manifest {HOST} library/tiny latest", f"manifest {HOST} library/tiny latest lists"}
    store = Store.open(store.folder)
    assert {name: record.body for name, record in store.manifests().items()} == {NAME: FIRST, LISTS: LIST}
    assert [store.manifests()[name].pulled for name in (NAME, LISTS)] == [0.0, 7.0]
    store.drop_manifest(LISTS)
    store.touch(LISTS, 9.0)
    store.touch(NAME, 11.0, by_client=False)
    store.close()
    store = Store.open(store.folder)
    found = store.manifests()[NAME]
    assert (found.pulled, found.brought, found.used) == (9.0, 11.0, 11.0)
    store.drop_model(LISTS.model)
    assert not store.manifests()
    store.close()


def test_rows_of_earlier_versions(store: Store) -> None:
    """They lack what was not known then."""
    store.put_manifest(NAME, parsed(FIRST))
    store.close()
    make_format_1(store.folder, references=False)
    store = Store.open(store.folder)
    assert store.manifest(NAME) == parsed(FIRST)
    store.close()


def test_a_registry_of_two_names(store: Store) -> None:
    """An earlier version has stored each name's models apart; the one name's are what there is, where both are."""
    other = Name(HOST, "library/other", "latest")
    store.put_manifest(NAME, parsed(FIRST))
    store.confirm_public(*PLACE, digest_of(b"a"))
    store.close()
    make_format_1(store.folder)
    alias = "registry.ollama.com"
    with closing(sqlite3.connect(store.folder / "index" / "cache.db")) as connection, connection:
        for kind, rest, new in (
            ("manifest", "library/tiny latest", "library/other latest"),
            ("manifest", "library/tiny latest", "library/tiny latest"),
            ("members", "library/tiny", "library/other"),
        ):
            columns = "raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value"
            connection.execute(
                f"INSERT INTO Cache (key, {columns}) SELECT ?, {columns} FROM Cache WHERE key = ?",
                (f"{kind} {alias} {new}", f"{kind} {HOST} {rest}"),
            )
    for _ in range(2):
        store = Store.open(store.folder)
        assert {name: record.body for name, record in store.manifests().items()} == {NAME: FIRST, other: FIRST}
        assert store.is_member(alias, "library/other", digest_of(b"a"))
        assert store.is_member(HOST, "library/other", digest_of(b"a"))
        store.close()
    store = Store.open(store.folder)
    assert store.deny(alias, "library/other")
    assert store.is_denied(HOST, "library/other")
    store.drop_model(other)
    store.close()
    store = Store.open(store.folder)
    assert list(store.manifests()) == [NAME]
    store.close()


BLOBS = [b"a", b"b", b"c", b"d"]
MANIFESTS = [manifest(b"a", b"b"), manifest(b"b", b"c"), manifest(b"d")]
BODIES = [*MANIFESTS, listing(*MANIFESTS[:2]), listing(*MANIFESTS[1:]), listing(MANIFESTS[2], {"layers": []})]
LISTED = {
    MANIFESTS[0]: {b"a", b"b"},
    MANIFESTS[1]: {b"b", b"c"},
    MANIFESTS[2]: {b"d"},
}
REFERRED = {BODIES[3]: MANIFESTS[:2], BODIES[4]: MANIFESTS[1:], BODIES[5]: MANIFESTS[2:]}
NAMES = [
    Name(HOST, repository, "latest", takes_lists) for repository in ("x/one", "x/two") for takes_lists in (False, True)
]
EVERYTHING = [*BLOBS, *MANIFESTS]


class Children(RuleBasedStateMachine):
    """Against a model that derives everything from what is stored and what has come."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.open(Path(self.folder.name) / "store")
        self.stored: dict[Name, tuple[bytes, bool]] = {}
        """(body, denied) by name."""
        self.known: set[bytes] = set()
        """Children whose bytes have been here while a list referred to them."""
        self.held: set[bytes] = set()
        self.granted: dict[tuple[str, str], set[bytes]] = {}

    @rule(name=st.sampled_from(NAMES), body=st.sampled_from(BODIES))
    def put(self, name: Name, body: bytes) -> None:
        if body in REFERRED and not name.takes_lists:
            return
        # A tag may move from a manifest to a list that refers to it.
        self.known |= {before for before, _ in self.stored.values()}
        self.store.put_manifest(name, parsed(body))
        self.stored[name] = body, False

    @rule(blob=st.sampled_from(EVERYTHING))
    def hold(self, blob: bytes) -> None:
        if blob not in self.held:
            hold(self.store, blob)
            self.held.add(blob)

    @rule(blob=st.sampled_from(EVERYTHING))
    def evict(self, blob: bytes) -> None:
        if blob in self.held:
            evict(self.store, blob)
            self.held.discard(blob)

    @rule(name=st.sampled_from(NAMES), blob=st.sampled_from(EVERYTHING))
    def grant(self, name: Name, blob: bytes) -> None:
        self.store.confirm_public(*name.place, digest_of(blob))
        self.granted.setdefault(name.place, set()).add(blob)

    @rule(name=st.sampled_from(NAMES))
    def deny(self, name: Name) -> None:
        self.store.deny(*name.place)
        for each, (body, _) in list(self.stored.items()):
            if each.place == name.place:
                self.stored[each] = body, True
        self.granted.pop(name.place, None)

    @rule(name=st.sampled_from(NAMES), whole=st.booleans())
    def drop(self, name: Name, whole: bool) -> None:
        if whole:
            self.store.drop_model(name)
            self.stored.pop(name.twin, None)
        elif name in self.stored:
            self.store.drop_manifest(name)
        self.stored.pop(name, None)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.store.folder)

    def follow(self) -> set[bytes]:
        """The children whose bytes have been here while a list referred to them."""
        referred = {child for body, _ in self.stored.values() for child in REFERRED.get(body, ())}
        bodies = {body for body, _ in self.stored.values()}
        self.known = {child for child in referred if child in self.known | self.held | bodies}
        return self.known

    @invariant()
    def children_are_those_that_are_referred_to_and_have_come(self) -> None:
        if not hasattr(self, "store"):
            return
        assert set(self.store.children()) == {digest_of(child) for child in self.follow()}

    @invariant()
    def what_is_listed(self) -> None:
        if not hasattr(self, "store"):
            return
        known = self.follow()
        for name, (body, denied) in self.stored.items():
            children = REFERRED.get(body, [])
            blobs = set(children) | LISTED.get(body, set())
            blobs |= {blob for child in children if child in known for blob in LISTED[child]}
            record = self.store.manifests()[name]
            assert (set(record.digests), record.denied, record.body) == ({*map(digest_of, blobs)}, denied, body)
            assert all(size is not None for digest, size in record.sizes.items() if digest in self.store.children())
        for place in {name.place for name in NAMES}:
            member = set(self.granted.get(place, ()))
            for name, (_, denied) in self.stored.items():
                if name.place == place and not denied:
                    listed = self.store.manifests()[name].digests
                    member |= {blob for blob in EVERYTHING if digest_of(blob) in listed}
            assert {blob for blob in EVERYTHING if self.store.is_member(*place, digest_of(blob))} == member
        for blob in EVERYTHING:
            record_ = self.store.blob(digest_of(blob))
            is_public = record_ is not None and record_.public
            # Nothing is public that no repository has granted since its last refusal.
            assert not is_public or any(blob in blobs for blobs in self.granted.values())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestChildren = Children.TestCase
TestChildren.settings = settings(max_examples=settings.default.max_examples // 3, stateful_step_count=30)
