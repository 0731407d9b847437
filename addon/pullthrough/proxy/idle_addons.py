"""Take those of mitmproxy's own addons out that have nothing to do.

mitmproxy asks each of its forty addons about each event, which is most of what a small request costs. Those that only
act when an option of theirs is set, and of which none is set, are removed as mitmproxy has it
(`AddonManager.remove`).

Invariant: an addon whose options were given stays, and so does one that is not in the list.
"""

from typing import Final

from mitmproxy import ctx

IDLE: Final = {
    "anticache": ("anticache",),
    "anticomp": ("anticomp",),
    "blocklist": ("block_list",),
    "browser": (),
    "comment": (),
    "cut": (),
    "export": (),
    "maplocal": ("map_local",),
    "mapremote": ("map_remote",),
    "modifybody": ("modify_body",),
    "modifyheaders": ("modify_headers",),
    "onboarding": (),
    "save": ("save_stream_file",),
    "savehar": ("hardump",),
    "serverplayback": ("server_replay",),
    "stickyauth": ("stickyauth",),
    "stickycookie": ("stickycookie",),
    "updatealtsvc": ("keep_alt_svc_header",),
    "upstreamauth": ("upstream_auth",),
}
"""By name, the options that give an addon something to do; none: a command that mitmdump has no way to be given, or
an option that is ours to set."""


def remove_idle() -> None:
    """Remove them; those that this mitmproxy does not have are none."""
    for name, options in IDLE.items():
        addon = ctx.master.addons.get(name)
        if addon is not None and not any(
            option in ctx.options and ctx.options.has_changed(option) for option in options
        ):
            ctx.master.addons.remove(addon)
