"""takeover: a connection is taken out of mitmproxy whole, or stays there."""

import asyncio
import logging
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from mitmproxy import ctx
from mitmproxy.options import Options

from pullthrough.proxy import takeover
from pullthrough.proxy.takeover import Takeover

# What mitmproxy's filters are parsed with warns of itself when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLIENT = SimpleNamespace(id="1", peername=("10.0.0.2", 5000), tls_established=False)
HOST = "blobs.example"


class FakeDelivery:
    """What serves connections, and what it was given."""

    def __init__(self) -> None:
        self.served: list[tuple[str, bytes, bool]] = []

    def serve(self, sock: socket.socket, peer: str, early: bytes, *, tunnelled: bool, on_close: Any) -> None:
        sock.close()
        on_close()
        self.served.append((peer, early, tunnelled))


class FakeFlow(SimpleNamespace):
    """A CONNECT that mitmproxy asks about."""

    def __init__(self, host: str = HOST, port: int = 443, **client: Any) -> None:
        super().__init__(response=None, error=None, killed=False, client_conn=SimpleNamespace(**vars(CLIENT) | client))
        self.request = SimpleNamespace(host=host, port=port)

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> None:
    """mitmproxy's options, as if it ran, with those of the addon that serves connections."""
    from mitmproxy.addonmanager import Loader
    from mitmproxy.addons.proxyserver import Proxyserver

    running = Options()
    Proxyserver().load(Loader(SimpleNamespace(options=running)))
    monkeypatch.setattr(ctx, "options", running, raising=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> tuple[Takeover, FakeDelivery, list[str]]:
    """One that takes connections to HOST, what serves them, and how often a place was given up."""
    delivery, given_up = FakeDelivery(), []
    master = SimpleNamespace(addons={"proxyserver": SimpleNamespace(connections={"1": "a handler"})})
    monkeypatch.setattr(ctx, "master", master, raising=False)
    monkeypatch.setattr(takeover, "check", _nothing)
    monkeypatch.setattr(takeover, "take", lambda _handler: (socket.socket(), b"hello"))
    tried = Takeover(lambda client: lambda: given_up.append(client.id))
    asyncio.run(tried.open(delivery, HOST))  # type: ignore[arg-type]
    return tried, delivery, given_up


async def _nothing() -> None:
    return None


def test_this_mitmproxy_gives_all_bytes(options: None) -> None:
    """The trial that each start makes: what was read and not looked at, and the socket itself."""
    asyncio.run(takeover.check())


def test_a_mitmproxy_that_keeps_its_bytes_elsewhere(
    options: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A byte that is lost is noticed by the trial, and no connection is taken: bytes leave the slow way."""
    real = takeover.take
    monkeypatch.setattr(takeover, "take", lambda handler: (real(handler)[0], b"ear"))
    tried = Takeover()
    with caplog.at_level(logging.WARNING):
        asyncio.run(tried.open(FakeDelivery(), HOST))  # type: ignore[arg-type]
    assert "expected all bytes of a trial, got b'ear'" in caplog.text
    assert not tried.is_for(HOST)


def test_a_connect_is_taken(opened: tuple[Takeover, FakeDelivery, list[str]]) -> None:
    """With what came behind it; mitmproxy goes no further with the flow, and the place lasts as long as the service."""
    tried, delivery, given_up = opened
    flow = FakeFlow("Blobs.Example.")
    tried.take_connect(flow)  # type: ignore[arg-type]
    assert flow.killed and delivery.served == [("10.0.0.2", b"hello", True)] and given_up == ["1"]


@pytest.mark.parametrize(
    "flow",
    [FakeFlow("other.example"), FakeFlow(port=8443), FakeFlow(tls_established=True), FakeFlow(id="2")],
    ids=["another host", "another port", "within TLS", "unknown"],
)
def test_a_connect_that_stays(opened: tuple[Takeover, FakeDelivery, list[str]], flow: FakeFlow) -> None:
    """Where it leads elsewhere, or the socket carries more than the client's own bytes."""
    tried, delivery, _ = opened
    tried.take_connect(flow)  # type: ignore[arg-type]
    assert not flow.killed and delivery.served == []


def test_an_answered_connect_stays(opened: tuple[Takeover, FakeDelivery, list[str]]) -> None:
    """A refusal, or an error, is told by mitmproxy; and nothing is taken after the end."""
    tried, delivery, _ = opened
    refused, failed, late = FakeFlow(), FakeFlow(), FakeFlow()
    refused.response = failed.error = "something"
    for flow in (refused, failed):
        tried.take_connect(flow)  # type: ignore[arg-type]
    tried.close()
    tried.take_connect(late)  # type: ignore[arg-type]
    assert not (refused.killed or failed.killed or late.killed) and delivery.served == []


@pytest.mark.parametrize("waiting", [[], ["an event"]])
def test_a_captured_connection(opened: tuple[Takeover, FakeDelivery, list[str]], waiting: list[str]) -> None:
    """What was read comes first; what came while mitmproxy asked cannot be found, so that connection stays."""
    tried, delivery, _ = opened
    following = SimpleNamespace(
        _paused_event_queue=waiting, context=SimpleNamespace(client=CLIENT), data_client=lambda: b"hi, "
    )
    assert tried.take_captured(following) is not waiting  # type: ignore[arg-type]
    assert delivery.served == ([] if waiting else [("10.0.0.2", b"hi, hello", False)])


def test_no_descriptor_is_left(
    opened: tuple[Takeover, FakeDelivery, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client is served by mitmproxy, and the log says why."""

    def fail(_handler: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(takeover, "take", fail)
    tried, delivery, given_up = opened
    flow = FakeFlow()
    tried.take_connect(flow)  # type: ignore[arg-type]
    assert (flow.killed, delivery.served, given_up) == (False, [], [])
    assert "client 10.0.0.2 stays with mitmproxy: [Errno 24] Too many open files" in caplog.text


def test_a_client_that_has_gone() -> None:
    """There is no socket any more."""
    handler: Any = SimpleNamespace(transports={}, client=CLIENT.id)
    with pytest.raises(ConnectionResetError, match="client disconnected"):
        takeover.take(handler)
