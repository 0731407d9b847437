"""Which modes of mitmproxy the cache runs in.

Invariant: a mode for which `connection_hooks` does not decide what is intercepted stops the start.
"""

from collections.abc import Collection, Iterable

from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode, ReverseMode, TransparentMode

from pullthrough.core.errors import SettingsError


def check_modes(specs: Iterable[str], hosts: Collection[str]) -> None:
    """SettingsError unless each of mitmproxy's `--mode` values is one of ours; `hosts` are those we intercept."""
    for spec in specs:
        if not _is_ours(spec, hosts):
            raise SettingsError(
                "option mode: expected regular, transparent or reverse:https://HOST "
                f"with HOST one of {', '.join(hosts)}, got {spec}"
            )


def _is_ours(spec: str, hosts: Collection[str]) -> bool:
    try:
        mode = ProxyMode.parse(spec)
    except ValueError:
        return False
    match mode:
        case RegularMode() | TransparentMode():
            return True
        case ReverseMode(scheme="https", address=(host, 443)):
            return host in hosts
    return False
