"""pulls: who shows a pull, and who was sent away and never came back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.recording.pulls import FAR, LOST_S, Counts, Pulls

A, B = Digest("a" * 64), Digest("b" * 64)
PLACE, OTHER = ("registry.ollama.ai", "library/m"), ("registry.ollama.ai", "library/other")
GB = 10**9


@pytest.mark.parametrize(
    ("start", "stop", "size", "shown"),
    [
        pytest.param(0, 1, 4 * GB, False, id="one-byte"),
        pytest.param(0, 32 << 20, 4 * GB, False, id="a-head"),
        pytest.param(0, FAR, 4 * GB, False, id="up-to-64-mib"),
        pytest.param(0, FAR + 1, 4 * GB, True, id="past-64-mib"),
        pytest.param(0, 250_000_000, 4 * GB, True, id="the-first-part-of-an-ollama"),
        pytest.param(0, 4 * GB, 4 * GB, True, id="un-ranged"),
        pytest.param(5, 4 * GB, 4 * GB, True, id="open-ended"),
        pytest.param(4 * GB - 1, 4 * GB, 4 * GB, True, id="the-last-byte"),
        pytest.param(0, 500, 500, True, id="a-small-blob-in-one-part"),
        pytest.param(0, 499, 500, False, id="most-of-a-small-blob"),
    ],
)
def test_one_range(start: int, stop: int, size: int, shown: bool) -> None:
    """By itself: the last byte, or a byte far in."""
    assert Pulls().begin("c", A, start, stop, size) is shown


def test_two_ranges_at_once() -> None:
    """Of one client and one blob; the same range again, and one after the other, are none."""
    pulls = Pulls()
    assert not pulls.begin("c", A, 0, 100, GB)
    assert not pulls.begin("d", A, 100, 200, GB)
    assert not pulls.begin("c", B, 100, 200, GB)
    assert not pulls.begin("c", A, 0, 100, GB)
    assert pulls.begin("c", A, 100, 200, GB)
    for start in (0, 0, 100):
        pulls.end("c", A, start, start + 100)
    assert not pulls.begin("c", A, 200, 300, GB)


@given(st.lists(st.tuples(st.sampled_from("cd"), st.sampled_from([A, B]), st.integers(0, 3), st.integers(4, 9))))
def test_what_has_ended_leaves_nothing(ranges: list[tuple[str, Digest, int, int]]) -> None:
    """In whatever order readings end."""
    pulls = Pulls()
    for client, digest, start, stop in ranges:
        pulls.begin(client, digest, start, stop, GB)
    for client, digest, start, stop in sorted(ranges, key=repr):
        pulls.end(client, digest, start, stop)
    assert not pulls._ranges


def test_lost() -> None:
    """A pull of which no byte is asked for in a quarter of an hour, told once, by whether it is known to bypass."""
    told: list[tuple[str, tuple[str, str], bool]] = []
    pulls = Pulls(lambda *args: told.append(args))
    for client, bypasses in (("m1", True), ("m3", False), ("ctrl-c", False)):
        for digest in (A, B):
            pulls.ask(client, PLACE, digest)
            pulls.redirect(client, PLACE, digest, bypasses=bypasses, now=10.0)
    pulls.begin("m3", B, 0, 5, 5)
    pulls.expire(now=10.0 + LOST_S - 1)
    assert pulls.counts == Counts() and not told
    pulls.expire(now=10.0 + LOST_S)
    pulls.expire(now=1e9)
    assert pulls.counts == Counts(bypassed=1, unseen=1)
    assert told == [("m1", PLACE, True), ("ctrl-c", PLACE, False)]


def test_each_layer_starts_the_clock_again() -> None:
    """A pull goes on for as long as it asks for addresses."""
    pulls = Pulls()
    for now in (0.0, LOST_S - 1):
        pulls.redirect("c", PLACE, A, bypasses=True, now=now)
    pulls.expire(now=LOST_S + 1)
    assert pulls.counts == Counts()


def test_a_pull_is_counted_once_however_long_its_layers_take() -> None:
    """Ollama asks for a layer's address when the one before is complete; the next day it is another pull."""
    told: list[str] = []
    pulls = Pulls(lambda client, *_: told.append(client), limit=2)
    for hour in (0, 2, 5, 40):
        now = hour * 3600.0
        pulls.redirect("c", PLACE, A, bypasses=True, now=now)
        pulls.expire(now=now + LOST_S)
    assert (pulls.counts, told) == (Counts(bypassed=2), ["c", "c"])
    for client in "defg":
        pulls.redirect(client, PLACE, A, bypasses=True, now=0.0)
        pulls.expire(now=LOST_S)
    assert len(pulls._lost) == 2


def test_another_model_of_the_same_client_is_another_pull() -> None:
    """Bytes of one do not speak for the other."""
    pulls = Pulls()
    for place, digest in ((PLACE, A), (OTHER, B)):
        pulls.ask("c", place, digest)
        pulls.redirect("c", place, digest, bypasses=True, now=0.0)
    pulls.begin("c", B, 0, 5, 5)
    pulls.expire(now=LOST_S)
    assert pulls.counts == Counts(bypassed=1)


def test_the_place_is_where_it_was_asked_for_last() -> None:
    """So that the layers behind it are those of the model that is pulled."""
    pulls = Pulls()
    assert pulls.place("c", A) is None
    pulls.ask("c", PLACE, A)
    pulls.ask("c", OTHER, A)
    pulls.ask("d", PLACE, A)
    assert (pulls.place("c", A), pulls.place("d", A)) == (OTHER, PLACE)


def test_waiting() -> None:
    """From the redirect to the first byte, blob by blob and client by client."""
    pulls = Pulls()
    pulls.ask("c", PLACE, A)
    assert not pulls.is_waiting("c", PLACE, A)
    pulls.redirect("c", PLACE, A, bypasses=True, now=0.0)
    assert pulls.is_waiting("c", PLACE, A)
    assert not pulls.is_waiting("c", PLACE, B) and not pulls.is_waiting("d", PLACE, A)
    pulls.begin("c", A, 0, 5, 5)
    assert not pulls.is_waiting("c", PLACE, A)


def test_memory_is_bounded() -> None:
    """Clients that come and go are forgotten, the oldest first."""
    pulls = Pulls(limit=2)
    for number in range(5):
        pulls.redirect("one", PLACE, Digest(f"{number:064x}"), bypasses=True, now=0.0)
    assert len(pulls._redirected["one", PLACE].digests) == 2
    for number in range(5):
        pulls.ask(str(number), PLACE, A)
        pulls.redirect(str(number), PLACE, A, bypasses=True, now=0.0)
    assert [pulls.place(str(number), A) for number in range(5)] == [None, None, None, PLACE, PLACE]
    pulls.expire(now=LOST_S)
    assert pulls.counts.bypassed == 2
