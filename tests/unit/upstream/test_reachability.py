"""reachability: up and down follow from answers and failures alone, and say since when and why."""

from pathlib import Path

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.core.errors import (
    AddressRefused,
    CacheError,
    Offline,
    UnexpectedResponse,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from pullthrough.upstream import reachability as module
from pullthrough.upstream.reachability import Fetching, Reachability, Role, Service, State, fetching

REGISTRY = "registry.ollama.ai"
OTHER = "hub.example"
BLOBS = "blobs.example"


class Clock:
    """`time`, as the module sees it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def known(**options: str) -> Reachability:
    chosen = {"registries": f"{REGISTRY},{OTHER}", "blob_host": BLOBS} | options
    return Reachability(parse_settings(chosen, dir=Path("/d"), certs=Path("/c")))


def told(found: Reachability, name: str = REGISTRY) -> tuple[State, float | None, float | None, str]:
    service = found.find(name)
    assert service is not None
    return service.state, service.since, service.asked, service.why


def test_since_when_and_why(clock: Clock) -> None:
    """A state lasts until the other one is found; the reason and the time of the last look are of the last look."""
    found = known()
    assert told(found) == (State.NOT_ASKED, None, None, module.NOBODY)
    for now, name in ((1001.0, "first"), (1002.0, "second")):
        clock.now = now
        found.failed(REGISTRY, name)
    assert told(found) == (State.DOWN, 1001.0, 1002.0, "second")
    assert str(found.find(REGISTRY)) == f"registry {REGISTRY}: down since 1970-01-01 00:16:41 UTC, second"
    for clock.now in (1003.0, 1004.0):
        found.answered(REGISTRY)
    assert told(found) == (State.UP, 1003.0, 1004.0, "")
    found.answered(REGISTRY, 503)
    assert told(found) == (State.DOWN, 1004.0, 1004.0, "it answers 503")
    found.answered(REGISTRY, 429)
    assert told(found)[0] is State.UP
    assert [told(found, name)[0] for name in (OTHER, BLOBS)] == [State.NOT_ASKED] * 2


def test_an_old_failure_proves_nothing(clock: Clock) -> None:
    """One part of sixteen that times out while the others flow does not make the blob host down."""
    found = known()
    clock.now = 1010.0
    found.answered(BLOBS)
    found.failed(BLOBS, "no answer in time", began=1005.0)
    assert told(found, BLOBS)[0] is State.UP
    found.failed(BLOBS, "no answer in time", began=1011.0)
    assert told(found, BLOBS)[0] is State.DOWN


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UpstreamUnreachable("refused"), State.DOWN),
        (UpstreamTimeout("late"), State.DOWN),
        (AddressRefused("private"), State.DOWN),
        (Offline("offline"), State.NOT_ASKED),
        (UnexpectedResponse("too long"), State.NOT_ASKED),
    ],
)
def test_what_counts_as_a_failure(error: CacheError, state: State) -> None:
    """That a server cannot be asked; not that nobody may ask, nor an answer that does not fit one request."""
    found = known()
    with pytest.raises(type(error)), found.asking(REGISTRY):
        raise error
    assert told(found)[0] is state


def test_strangers_are_not_told_of() -> None:
    """Blobs may come from any host: the list has the configured ones alone."""
    found = known()
    found.failed("cdn.example", "refused")
    found.answered("cdn.example")
    assert [service.host for service in found.services] == [REGISTRY, OTHER, BLOBS]


def test_offline() -> None:
    """Nobody is asked, which is no failure; the object store is no registry that this is about."""
    found = known(offline="true", object_store="s3://bucket/prefix", fleet_secret_file="/secret")
    assert [(service.state, service.why) for service in found.services] == [
        *[(State.NOT_ASKED, "offline")] * 3,
        (State.NOT_ASKED, module.NOBODY),
    ]
    assert fetching(found.services) is Fetching.NO


@pytest.mark.parametrize(
    ("first", "second", "blobs", "expected"),
    [
        (State.UP, State.UP, State.UP, Fetching.YES),
        (State.UP, State.NOT_ASKED, State.NOT_ASKED, Fetching.YES),
        (State.NOT_ASKED, State.NOT_ASKED, State.NOT_ASKED, Fetching.UNKNOWN),
        (State.NOT_ASKED, State.NOT_ASKED, State.UP, Fetching.UNKNOWN),
        (State.DOWN, State.UP, State.UP, Fetching.PARTLY),
        (State.DOWN, State.DOWN, State.UP, Fetching.NO),
        (State.UP, State.UP, State.DOWN, Fetching.NO),
    ],
)
def test_fetching(first: State, second: State, blobs: State, expected: Fetching) -> None:
    """A manifest and its blobs are needed; another registry's models may still be had."""
    services = [
        Service(Role.REGISTRY, REGISTRY, first),
        Service(Role.REGISTRY, OTHER, second),
        Service(Role.BLOB_HOST, BLOBS, blobs),
        Service(Role.OBJECT_STORE, "s3://bucket", State.DOWN),
    ]
    assert fetching(services) is expected
