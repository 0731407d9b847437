"""Take those of mitmproxy's own addons out that have nothing to do.

mitmproxy asks each of its forty addons about each event, and makes one of each line of the log: that is most of what a
small request costs. Addons that only act when an option of theirs is set, and of which none is set, are removed as
mitmproxy has it (`AddonManager.remove`).

Invariant: an addon whose options were given stays, and so does one that is not in the list. What listens to the log
goes on doing so.
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
"""By name, the options that give an addon something to do; none: a command that mitmdump has no way to be given, an
option that is ours to set, a mode that is none of ours, or work that is done by the start."""


def remove_idle() -> None:
    """Remove them; those that this mitmproxy does not have are none."""
    for name, options in IDLE.items():
        addon = ctx.master.addons.get(name)
        if addon is not None and not any(
            option in ctx.options and ctx.options.has_changed(option) for option in options
        ):
            ctx.master.addons.remove(addon)
    if not any(hasattr(addon, "add_log") for addon in traverse(ctx.master.addons.chain)):
        _stop_log_events()


def _stop_log_events() -> None:
    """Make no event of a line of the log: mitmproxy formats each once more for it, and has deprecated it."""
    root = logging.getLogger()
    for handler in root.handlers.copy():
        if isinstance(handler, LegacyLogEvents):
            root.removeHandler(handler)
