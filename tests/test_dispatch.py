"""dispatch: the same handlers, in the same order, with the same ends, as mitmproxy's own way."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from mitmproxy import exceptions, hooks, options
from mitmproxy.addonmanager import AddonManager

from pullthrough.dispatch import Dispatch


@dataclass
class TwiceHook(hooks.Hook):
    """An event of our own."""

    name = "twice"
    log: list[str]


class Addon:
    """Notes its turn, then does as it was made."""

    def __init__(self, name: str, end: Callable[[], object] = lambda: None, addons: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.addons = list(addons)
        self._end = end

    def twice(self, log: list[str]) -> None:
        log.append(self.name)
        self._end()


class Slow(Addon):
    async def twice(self, log: list[str]) -> None:
        log.append(f"{self.name} begins")
        await asyncio.sleep(0)
        log.append(f"{self.name} ends")


class Deaf:
    """Has no handler."""

    name = "deaf"


def fail() -> None:
    raise RuntimeError("no")


def halt() -> None:
    raise exceptions.AddonHalt


CHAINS: dict[str, Callable[[], list[Any]]] = {
    "in order": lambda: [Addon("a"), Deaf(), Addon("b", addons=(Addon("c"), Slow("d"))), Slow("e")],
    "a failure": lambda: [Addon("a", fail, addons=(Addon("never"),)), Addon("b")],
    "a halt": lambda: [Addon("a"), Addon("b", halt), Addon("never")],
    "nobody": lambda: [Deaf()],
}


@pytest.fixture
def manager() -> AddonManager:
    return AddonManager(
        SimpleNamespace(options=options.Options(), commands=SimpleNamespace(collect_commands=lambda addon: None))
    )


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("is_async", [True, False])
def test_as_mitmproxy_does_it(
    manager: AddonManager, chain: Callable[[], list[Any]], is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With and without us, twice each: what is found at first serves again."""
    manager.add(*chain())

    def told() -> tuple[list[str], list[str]]:
        caplog.clear()
        log: list[str] = []
        for _ in range(2):
            if is_async:
                asyncio.run(manager.trigger_event(TwiceHook(log)))
            else:
                manager.trigger(TwiceHook(log))
        return log, [record.getMessage().partition("(")[0] for record in caplog.records]

    with caplog.at_level(logging.ERROR):
        plain = told()
        dispatch = Dispatch(manager)
        dispatch.install()
        assert told() == plain
        dispatch.remove()
        assert told() == plain


def test_addons_come_and_go(manager: AddonManager) -> None:
    """What was found is forgotten then, also for one that another addon manages, as a script that is reloaded."""
    first, managed = Addon("first"), Addon("managed")
    manager.add(first)
    dispatch = Dispatch(manager)
    dispatch.install()

    def told() -> list[str]:
        log: list[str] = []
        asyncio.run(manager.trigger_event(TwiceHook(log)))
        return log

    assert told() == ["first"]
    second = Addon("second")
    manager.add(second)
    assert told() == ["first", "second"]
    first.addons.append(managed)
    manager.register(managed)
    assert told() == ["first", "managed", "second"]
    manager.remove(second)
    assert told() == ["first", "managed"]
    manager.clear()
    assert told() == []
    dispatch.remove()
    dispatch.remove()
