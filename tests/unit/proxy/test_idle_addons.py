"""idle_addons: what has nothing to do goes, what has something to do stays."""

import asyncio

import pytest
from mitmproxy import ctx

from pullthrough.proxy.idle_addons import IDLE, remove_idle

# What mitmproxy's filters are parsed with warns of itself when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_what_was_given_options_stays() -> None:
    """Every name of the list is one of mitmproxy's addons, and an addon that a user has set up is left alone."""

    from mitmproxy.addons import default_addons
    from mitmproxy.test import taddons

    async def test() -> None:
        with taddons.context(*default_addons(), loadcore=False):
            assert all(ctx.master.addons.get(name) is not None for name in IDLE)
            ctx.options.update(modify_headers=["/~q/X-Mark/1"])
            remove_idle()
            left = {name for name in IDLE if ctx.master.addons.get(name) is not None}
            assert left == {"modifyheaders"}
            assert ctx.master.addons.get("proxyserver") is not None
            remove_idle()

    asyncio.run(test())


def test_each_option_is_one_of_mitmproxys() -> None:
    """A name that mitmproxy does not know would never keep its addon."""

    from mitmproxy.addons import default_addons
    from mitmproxy.test import taddons

    async def test() -> None:
        with taddons.context(*default_addons(), loadcore=False):
            assert {option for options in IDLE.values() for option in options} <= set(ctx.options.keys())

    asyncio.run(test())
