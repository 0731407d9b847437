"""Find the addons that handle an event once, and not for each event.

mitmproxy asks some forty addons for each of the nine events that a small request makes; that is two thirds of what the
request costs. Invariant: the same handlers are called in the same order, and fail in the same way, as mitmproxy does
it; what was found is forgotten when addons come or go. Knows no event.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from mitmproxy import exceptions, hooks
from mitmproxy.addonmanager import AddonManager, safecall

_log = logging.getLogger(__name__)

Handler = Callable[..., Any]


class Dispatch:
    """Stands in the place of the manager's own between `install` and `remove`."""

    def __init__(self, manager: AddonManager) -> None:
        self._manager = manager
        self._found: dict[str, list[list[Handler]]] = {}

    def install(self) -> None:
        own = vars(self._manager)
        own["trigger_event"] = self._trigger_event
        own["trigger"] = self._trigger
        for name in ("register", "remove", "clear"):
            own[name] = self._forgetting(getattr(self._manager, name))

    def remove(self) -> None:
        """May be called twice, and without `install`."""
        for name in ("trigger_event", "trigger", "register", "remove", "clear"):
            vars(self._manager).pop(name, None)

    def _forgetting(self, change: Handler) -> Handler:
        def changed(*arguments: Any) -> Any:
            self._found.clear()
            return change(*arguments)

        return changed

    def _handlers(self, event: hooks.Hook) -> list[list[Handler]]:
        """By addon of the chain: one that fails ends its own children's turn, and nobody else's."""
        found = self._found.get(event.name)
        if found is None:
            each = (
                [function for _, function in self._manager._iter_hooks(addon, event)] for addon in self._manager.chain
            )
            found = self._found[event.name] = [handlers for handlers in each if handlers]
        return found

    async def _trigger_event(self, event: hooks.Hook) -> None:
        arguments = event.args()
        for handlers in self._handlers(event):
            try:
                with safecall():
                    for function in handlers:
                        result = function(*arguments)
                        if result is not None and inspect.isawaitable(result):
                            await result
            except exceptions.AddonHalt:
                return

    def _trigger(self, event: hooks.Hook) -> None:
        arguments = event.args()
        for handlers in self._handlers(event):
            try:
                with safecall():
                    for function in handlers:
                        if inspect.iscoroutinefunction(function):
                            raise exceptions.AddonManagerError(
                                f"Async handler {event.name} ({function}) cannot be called from sync context"
                            )
                        function(*arguments)
            except exceptions.AddonHalt:
                return
