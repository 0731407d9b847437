"""idle_addons: what has nothing to do goes, what has something to do stays."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from mitmproxy import ctx
from mitmproxy.log import LegacyLogEvents

from pullthrough.proxy.idle_addons import IDLE, remove_idle

# What mitmproxy's filters are parsed with warns of itself when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@asynccontextmanager
async def _mitmdump() -> AsyncIterator[None]:
    """mitmdump's own addons, and what they log."""
    from mitmproxy.options import Options
    from mitmproxy.tools.dump import DumpMaster

    before = logging.getLogger().handlers.copy()
    master = DumpMaster(Options())
    try:
        yield
    finally:
        await master.done()
        logging.getLogger().handlers[:] = before


def test_what_was_given_options_stays() -> None:
    """Every name of the list is one of mitmproxy's addons, and an addon that a user has set up is left alone."""

    async def test() -> None:
        async with _mitmdump():
            assert all(ctx.master.addons.get(name) is not None for name in IDLE)
            ctx.options.update(modify_headers=["/~q/X-Mark/1"], proxyauth="any")
            remove_idle()
            left = {name for name in IDLE if ctx.master.addons.get(name) is not None}
            assert left == {"modifyheaders", "proxyauth"}
            assert ctx.master.addons.get("proxyserver") is not None
            remove_idle()

    asyncio.run(test())


def test_each_option_is_one_of_mitmproxys() -> None:
    """A name that mitmproxy does not know would never keep its addon."""

    async def test() -> None:
        async with _mitmdump():
            assert {option for options in IDLE.values() for option in options} <= set(ctx.options.keys())

    asyncio.run(test())


class _Listening:
    """An addon that is told of each line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add_log(self, entry: object) -> None:
        self.lines.append(getattr(entry, "msg", ""))


def test_lines_of_the_log_are_events_for_who_listens() -> None:
    """mitmproxy makes none of them where nobody does."""

    async def test() -> None:
        listening = _Listening()
        async with _mitmdump():
            ctx.master.addons.add(listening)
            remove_idle()
            logging.getLogger().error("heard")
            await asyncio.sleep(0)
            assert any("heard" in line for line in listening.lines)
            ctx.master.addons.remove(listening)
            remove_idle()
            assert not any(isinstance(handler, LegacyLogEvents) for handler in logging.getLogger().handlers)

    asyncio.run(test())
