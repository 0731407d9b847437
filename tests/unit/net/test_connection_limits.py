"""connection_limits: who gets a place, and who makes room."""

from collections.abc import Callable

import pytest

from pullthrough.net.connection_limits import ConnectionLimits, Slot, client_key, most_connections


class House:
    """Connections by name, with those that were closed to make room."""

    def __init__(self, total: int, per_address: int = 100) -> None:
        self.limits = ConnectionLimits(total, per_address)
        self.closed: list[str] = []

    def take(self, address: str, name: str, *, busy: bool = False) -> Slot | None:
        slot = self.limits.take(address, self._closer(name))
        if slot is not None:
            slot.busy = busy
        return slot

    def _closer(self, name: str) -> Callable[[], None]:
        return lambda: self.closed.append(name)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
    ],
)
def test_what_counts_as_one_client(address: str, key: str) -> None:
    """A host chooses the second half of its IPv6 address itself."""
    assert client_key(address) == key


@pytest.mark.parametrize(
    ("descriptors", "clients"), [(64, 16), (256, 32), (1024, 256), (2048, 512), (4096, 1536), (65_536, 32_256)]
)
def test_descriptors_are_reserved(descriptors: int, clients: int) -> None:
    """Clients get half of what is left for them, since each may cost two."""
    assert most_connections(descriptors) == clients


def test_one_address_has_too_many() -> None:
    """The one that has waited longest makes room; what is busy stays; others are not touched."""
    house = House(100, per_address=3)
    house.take("192.0.2.9", "other")
    house.take("192.0.2.1", "busy", busy=True)
    for name in ("first", "second", "third"):
        assert house.take("192.0.2.1", name) is not None
    assert house.closed == ["first"]
    assert len(house.limits) == 4


def test_one_address_has_too_many_that_are_busy() -> None:
    """Then the newcomer is turned away."""
    house = House(100, per_address=2)
    assert house.take("2001:db8::1", "one", busy=True)
    assert house.take("2001:db8::2", "two", busy=True)
    assert house.take("2001:db8::3", "three") is None
    assert house.take("2001:db8:0:1::3", "of another network") is not None
    assert house.closed == []


def test_all_together_have_too_many() -> None:
    """The address with most connections makes room, or the next one that has an idle connection."""
    house = House(5)
    for number in range(3):
        house.take("192.0.2.1", f"flood {number}")
    house.take("192.0.2.2", "small")
    house.take("192.0.2.3", "busy", busy=True)
    assert house.take("192.0.2.4", "new") is not None
    assert house.closed == ["flood 0"]
    assert len(house.limits) == 5


def test_all_together_are_busy() -> None:
    """Nobody who is answered makes room."""
    house = House(2)
    slots = [house.take("192.0.2.1", "one", busy=True), house.take("192.0.2.2", "two", busy=True)]
    assert house.take("192.0.2.3", "three") is None
    assert slots[0] is not None
    slots[0].release()
    slots[0].release()
    assert len(house.limits) == 1
    assert house.take("192.0.2.3", "three") is not None
    assert house.take("192.0.2.4", "four") is not None
    assert house.closed == ["three"]


def test_another_owner_releases() -> None:
    """A slot is released by whoever holds it, long after who took it has forgotten it; then nothing is left of it."""
    house = House(10)
    slot = house.take("192.0.2.1", "one", busy=True)
    assert slot is not None
    held, slot = slot, None
    assert len(house.limits) == 1
    held.release()
    assert len(house.limits) == 0
    assert house.limits == ConnectionLimits(10, 100)
