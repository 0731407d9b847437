"""What each client has done since the start: its Ollama version, its way to the cache, and what it pulled.

Invariant: memory is bounded whatever clients do: the client seen longest ago is forgotten first, and so is the model
that a client pulled longest ago. The notes may name private models: code that shows them leaves those out.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pullthrough.core.records import Name, Version

CLIENTS: Final = 1000
MODELS: Final = 20
"""How many pulls are remembered of each client."""


class Way(StrEnum):
    """The way by which a client reaches the cache."""

    PROXY = "HTTPS_PROXY"
    GATEWAY = "gateway"
    PLAIN = "plain port"


@dataclass(slots=True)
class Client:
    """A client, by its address."""

    seen: float = 0.0
    """When it last asked for a manifest or received bytes, Unix seconds."""
    way: Way | None = None
    version: Version | None = None
    """The version of its Ollama; None for other programs."""
    bypasses: bool = False
    """Whether its Ollama is known to download without the proxy, having asked through it."""
    sent: int = 0
    """Blob bytes sent to it."""
    pulls: OrderedDict[Name, float] = field(default_factory=OrderedDict)
    """When it last asked for the manifest of each model, the latest last."""


class ClientTable:
    """All clients, by their addresses."""

    def __init__(self, *, limit: int = CLIENTS) -> None:
        self._limit = limit
        self._clients: OrderedDict[str, Client] = OrderedDict()

    def ask(self, address: str, way: Way, version: Version | None, *, bypasses: bool, now: float) -> None:
        """Note that the client has asked for a manifest."""
        client = self._client(address, now)
        client.way, client.version, client.bypasses = way, version, bypasses

    def pull(self, address: str, name: Name, *, now: float) -> None:
        """Note that the client received a model's manifest in order to pull the model."""
        pulls = self._client(address, now).pulls
        pulls[name.model] = now
        pulls.move_to_end(name.model)
        if len(pulls) > MODELS:
            pulls.popitem(last=False)

    def send(self, address: str, count: int, *, now: float) -> None:
        """Note that `count` bytes of a blob went to the client."""
        self._client(address, now).sent += count

    def latest(self) -> Iterator[tuple[str, Client]]:
        """Return all clients, the most recently seen first."""
        return iter(reversed(self._clients.items()))

    def __len__(self) -> int:
        return len(self._clients)

    def _client(self, address: str, now: float) -> Client:
        client = self._clients.setdefault(address, Client())
        client.seen = now
        self._clients.move_to_end(address)
        if len(self._clients) > self._limit:
            self._clients.popitem(last=False)
        return client
