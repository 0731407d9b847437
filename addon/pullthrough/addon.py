"""The mitmproxy addon: its options, and mitmproxy's word for when the cache begins and ends.

Invariant: a start that fails ends mitmdump before it serves anybody. What runs is the `daemon`'s.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Set as AbstractSet
from typing import NoReturn

from mitmproxy import addonmanager, ctx, exceptions

from pullthrough.config.paths import as_called_here
from pullthrough.config.settings import PREFIX
from pullthrough.config.sources import choices
from pullthrough.core.errors import CacheError, CannotListen, SettingsError
from pullthrough.daemon import Daemon
from pullthrough.proxy import options
from pullthrough.proxy.frontend import Frontend
from pullthrough.proxy.log_setup import set_up_logs
from pullthrough.proxy.modes import check_modes, check_ports
from pullthrough.proxy.startup import check_program, own_files, write_by_lines
from pullthrough.proxy.upstream_proxy import check_internals, ways_out

_log = logging.getLogger(__name__)


class OllamaCache:
    """The addon that `mitmdump -s addon/ollama_cache.py` runs."""

    name = "ollama_cache"

    def __init__(self) -> None:
        self._frontend = Frontend()
        self._daemon: Daemon | None = None
        self._is_configured = False
        self._has_started = False
        self.addons = self._frontend.addons

    def load(self, loader: addonmanager.Loader) -> None:
        """Declare our options."""
        write_by_lines()
        try:
            check_program(ctx.master)
            check_internals()
            options.check_refused()
        except CacheError as error:
            _stop(error)
        for path in own_files(ctx.options.confdir):
            _log.info("mitmproxy's own options are read from %s, too", path)
        options.declare(loader)
        asyncio.get_running_loop().call_soon(self._check_configured)

    def _check_configured(self) -> None:
        """Stop if mitmproxy goes on without us: it would be an open proxy with a CA of its own."""
        if not self._is_configured:
            _stop(options.unaccepted())

    def configure(self, updated: AbstractSet[str]) -> None:
        """Understand the options and open what needs no event loop; stop with one line where that fails."""
        if self._is_configured:
            if changed := sorted(name for name in updated if name.startswith(PREFIX)):
                raise exceptions.OptionsError(f"{changed[0]} cannot be changed while running")
            return
        # The daemon sets options of mitmproxy's own, which brings us here again.
        self._is_configured = True
        try:
            self._daemon = self._make_daemon()
        except CacheError as error:
            _stop(error)
        except OSError as error:
            _stop(CacheError(f"{error.filename}: {error.strerror}; it must be the cache's own to read and write"))

    def _make_daemon(self) -> Daemon:
        chosen = choices(options.given(), os.environ)
        settings = chosen.settings()
        check_modes(ctx.options.mode, settings.intercepted)
        set_up_logs(settings.log, settings.log_level)
        daemon = Daemon(
            settings,
            self._frontend,
            ways_out(os.environ, options.ports_to_listen_on()),
            trusted_ca=ctx.options.ssl_verify_upstream_trusted_ca,
            options=chosen.rows(),
        )
        others = {port for _, port in settings.listeners}
        check_ports(ctx.options.mode, ctx.options.listen_host, ctx.options.listen_port, others=others)
        return daemon

    async def running(self) -> None:
        """Open what needs the event loop; from here on clients are served."""
        assert self._daemon is not None
        self._forbid_reload()
        try:
            await self._daemon.start()
            self._has_started = True
        except CacheError as error:
            _stop(error)

    async def done(self) -> None:
        """Let go of everything."""
        if self._daemon is not None:
            await self._daemon.stop()
        if self._has_started:
            _log.info("ollama-cache has stopped")

    def _forbid_reload(self) -> None:
        """mitmproxy reloads a script whose file changes, half-way: a new addon without its asynchronous start."""
        for script in ctx.master.addons.get("scriptloader").addons:
            if script.ns is not None and self in getattr(script.ns, "addons", ()) and script.reloadtask:
                script.reloadtask.cancel()


def _stop(error: CacheError) -> NoReturn:
    """End mitmdump before it serves anybody: a cache that failed to start must not be an open proxy.

    The exit code is 2, as for mitmdump's own flags, where no other start with the same options could go better.
    """
    _log.error("ollama-cache: %s", as_called_here(str(error)))
    called_wrongly = isinstance(error, SettingsError) and not isinstance(error, CannotListen)
    sys.exit(2 if called_wrongly else 1)
