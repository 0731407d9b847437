"""Removal of mitmproxy's own addons that have nothing to do.

mitmproxy calls each of its forty addons for each event, and makes an event of each line of the log: that is most of
what a small request costs. Addons that act only when one of their options is set are removed if none is, by mitmproxy's
own means (`AddonManager.remove`).

Invariant: an addon whose options were given stays, and so does one that is not in the list. Addons that listen for log
events still get them.
"""

import logging
from typing import Final

from mitmproxy import ctx
from mitmproxy.addonmanager import traverse
from mitmproxy.log import LegacyLogEvents

IDLE: Final = {
    "anticache": ("anticache",),
    "anticomp": ("anticomp",),
    "block": (),
    "blocklist": ("block_list",),
    "browser": (),
    "commandhistory": (),
    "comment": (),
    "core": (),
    "cut": (),
    "dnsresolver": (),
    "dumper": ("dumper_filter",),
    "export": (),
    "keepserving": ("client_replay", "server_replay", "rfile"),
    "maplocal": ("map_local",),
    "mapremote": ("map_remote",),
    "modifybody": ("modify_body",),
    "modifyheaders": ("modify_headers",),
    "onboarding": (),
    "proxyauth": ("proxyauth",),
    "readfilestdin": ("rfile",),
    "save": ("save_stream_file",),
    "savehar": ("hardump",),
    "serverplayback": ("server_replay",),
    "stickyauth": ("stickyauth",),
    "stickycookie": ("stickycookie",),
    "stripdnshttpsrecords": (),
    "termlog": (),
    "updatealtsvc": ("keep_alt_svc_header",),
    "upstreamauth": ("upstream_auth",),
}
"""By addon, the options that give it something to do; none if it serves a command that mitmdump cannot be given, an
option that we set, a mode that we do not use, or work that is over by the start."""


def remove_idle() -> None:
    """Remove the idle addons; those that this mitmproxy does not have are skipped."""
    for name, options in IDLE.items():
        addon = ctx.master.addons.get(name)
        if addon is not None and not any(
            option in ctx.options and ctx.options.has_changed(option) for option in options
        ):
            ctx.master.addons.remove(addon)
    if not any(hasattr(addon, "add_log") for addon in traverse(ctx.master.addons.chain)):
        _stop_log_events()


def _stop_log_events() -> None:
    """Stop log lines from becoming events: mitmproxy formats each line again for that, and has deprecated it."""
    root = logging.getLogger()
    for handler in root.handlers.copy():
        if isinstance(handler, LegacyLogEvents):
            root.removeHandler(handler)
