"""pull_history: one line for a pull, whatever number of requests it took."""

import random
from collections.abc import Sequence

from pullthrough.core.digest import Digest
from pullthrough.core.records import Name
from pullthrough.net.pull_history import LONGEST_S, QUIET_S, RECENT, Pull, PullHistory

A, B, C = Digest("a" * 64), Digest("b" * 64), Digest("c" * 64)
NAME = Name.parse("llama3.2")
OTHER = Name.parse("gemma")
SIZE = {A: 16_000, B: 10, C: 500}


class History:
    """A history, and what it has told."""

    def __init__(self, *, limit: int = 1000, kept: int = 1000) -> None:
        self.told: list[Pull] = []
        self.now = 1000.0
        self.inner = PullHistory(self.told.append, limit=limit, kept=kept)

    def ask(self, *wanted: Sequence[Digest], client: str = "c", name: Name = NAME) -> None:
        self.inner.ask(client, name, wanted, now=self.now)

    def send(
        self, digest: Digest, start: int = 0, sent: int | None = None, *, client: str = "c", cached: bool = True,
        seconds: float = 1.0, found: Name | None = None,
    ) -> None:  # fmt: skip
        pull = self.inner.begin(client, digest, SIZE[digest], lambda: found, now=self.now)
        self.now += seconds
        if pull is not None:
            sent = SIZE[digest] if sent is None else sent
            self.inner.end(pull, digest, start, sent, cached=cached, now=self.now)


def test_sixteen_parts_are_one_pull() -> None:
    """In any order, at once, some cut and begun again; the last byte ends it, and no other request does."""
    history = History()
    history.ask([A, B])
    parts = list(range(16))
    random.Random(1).shuffle(parts)
    pulls = [history.inner.begin("c", A, SIZE[A], lambda: None, now=history.now) for _ in parts]
    for part, pull in zip(parts, pulls, strict=True):
        assert pull is not None
        history.now += 1
        history.inner.end(pull, A, part * 1000, 400 if part == 3 else 1000, cached=False, now=history.now)
    history.send(A, 3400, 600, cached=False)
    assert history.told == []
    assert [(pull.is_running, pull.sent) for pull in history.inner.running] == [(True, 16_000)]
    history.send(B)
    (told,) = history.told
    assert (told.client, told.name, told.size, told.from_cache, told.from_upstream) == ("c", NAME, 16_010, 10, 16_000)
    assert (told.seconds, told.is_whole, told.source) == (18.0, True, "both")
    assert str(told) == "c pulled llama3.2:latest: 10 B from the cache and 16 KB from upstream in 18.0 s"
    assert list(history.inner.recent) == [told] and history.inner.running == []


def test_two_clients_are_two() -> None:
    """Each has its own line, with its own bytes and sources."""
    history = History()
    for client, cached in (("c", False), ("d", True)):
        history.ask([A], client=client)
        history.send(A, client=client, cached=cached)
    assert [(pull.client, pull.source) for pull in history.told] == [("c", "upstream"), ("d", "cache")]


def test_what_the_client_has_already_is_not_asked_for() -> None:
    """The pull ends when it has been quiet, and its time is that of its last byte; a manifest alone is no pull."""
    history = History()
    history.ask([A, B])
    history.ask([C], name=OTHER)
    history.send(B)
    history.inner.expire(now=history.now + QUIET_S)
    assert history.told == []
    history.inner.expire(now=history.now + QUIET_S + 1)
    (pull,) = history.told
    assert (pull.size, pull.seconds, pull.is_whole) == (10, 1.0, True)


def test_a_pull_that_is_cut() -> None:
    """What is short is said."""
    history = History()
    history.ask([A])
    history.send(A, 0, 4000)
    history.inner.close()
    assert str(history.told[0]) == "c pulled llama3.2:latest: 4.0 KB from the cache in 1.0 s, short of 16 KB"


def test_nobody_is_quiet_while_a_body_is_sent() -> None:
    """An hour for one part is not the end."""
    history = History()
    history.ask([A])
    pull = history.inner.begin("c", A, SIZE[A], lambda: None, now=history.now)
    history.inner.expire(now=history.now + 3600)
    assert history.told == [] and pull is not None
    history.inner.end(pull, A, 0, SIZE[A], cached=True, now=history.now + 3600)
    assert history.told[0].seconds == 3600


def test_a_list_and_its_child() -> None:
    """The child that a client asks for by its digest is the same pull; its blobs end it."""
    history = History()
    history.ask(name=NAME._replace(takes_lists=True))
    history.ask([B, C], name=NAME._replace(reference="sha256:" + "d" * 64))
    history.send(B)
    history.send(C)
    assert [(pull.name, pull.size) for pull in history.told] == [(NAME, 510)]


def test_after_a_restart() -> None:
    """A client that goes on with a blob is one that pulls the model that has it; a stranger's blob is nobody's."""
    history = History()
    history.send(A, 0, 1000)
    assert history.inner.running == []
    history.send(A, 0, 1000, found=NAME)
    history.send(A, 1000, 15_000)
    history.inner.close()
    assert [(pull.name, pull.size, pull.is_whole) for pull in history.told] == [(NAME, 16_000, True)]


def test_memory_is_bounded() -> None:
    """Of pulls that never end, and of those that have."""
    history = History(limit=3)
    for number in range(RECENT + 10):
        history.ask([A], client=f"c{number}")
        history.send(A, 0, 10, client=f"c{number}")
        assert len(history.inner.running) <= 3
    history.inner.close()
    assert len(history.told) == RECENT + 10
    assert len(history.inner.recent) == RECENT and history.inner.recent[0].client == f"c{RECENT + 9}"


def test_odd_ranges_are_bounded() -> None:
    """A client that reads every other byte, of many blobs by many manifests, is kept of no more than is allowed."""
    history = History(kept=50)
    history.ask([B], client="other")
    history.send(B, 0, 1, client="other")
    history.ask([A, C])
    for start in range(0, 16_000, 2):
        history.send(A, start, 1, found=NAME)
    assert [pull.client for pull in history.told[:2]] == ["other", "c"]
    assert sum(pull.from_cache for pull in history.told if pull.client == "c") > 7900
    assert all(pull.kept <= 50 for pull in history.inner._open.values())
    for number in range(100):
        history.ask([Digest(f"{number:064x}")], name=NAME._replace(reference=f"sha256:{number:064x}"))
    assert sum(pull.kept for pull in history.inner._open.values()) <= 50
    history.inner.close()
    assert history.inner._kept == 0


def test_what_is_sent_in_order_takes_no_room() -> None:
    """A large blob in thousands of pieces, each behind the one before or not far from it, ends nothing."""
    history = History(kept=50)
    history.ask([A, B])
    for start in range(0, 16_000, 20):
        history.send(A, start + 10, 10)
        history.send(A, start, 10)
    assert history.told == []
    history.send(B)
    assert [pull.is_whole for pull in history.told] == [True]


def test_a_client_that_never_stops_asking() -> None:
    """It is told of all the same, once a day."""
    history = History()
    history.ask([A, B])
    for _ in range(int(LONGEST_S / 20) + 1):
        history.send(A, 0, 10, seconds=20)
        history.inner.expire(now=history.now)
    (pull,) = history.told
    assert LONGEST_S <= pull.seconds <= LONGEST_S + 20
