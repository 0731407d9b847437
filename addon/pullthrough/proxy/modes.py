"""The modes of mitmproxy in which the cache runs.

Invariant: a mode for which `connection_hooks` does not decide what is intercepted stops the start.
"""

from collections.abc import Collection, Iterable

from mitmproxy.proxy.mode_specs import ProxyMode, RegularMode, ReverseMode, TransparentMode

from pullthrough.core.errors import CannotListen, SettingsError
from pullthrough.runtime.ports import listening, listens, reason, shown_address


def check_modes(specs: Iterable[str], hosts: Collection[str]) -> None:
    """Raise SettingsError unless we support each of mitmproxy's `--mode` values; `hosts` are those we intercept."""
    for spec in specs:
        if not _is_ours(spec, hosts):
            raise SettingsError(
                "option mode: expected regular, transparent or reverse:https://HOST "
                f"with HOST one of {', '.join(hosts)}, got {spec}"
            )


def check_ports(specs: Iterable[str], host: str, port: int | None, *, others: Collection[int] = ()) -> None:
    """Check that mitmproxy can listen; on its own it would only report a system error number.

    `host` and `port` are mitmproxy's own for all modes. Call this while the cache listens on its own ports, `others`.
    mitmproxy may already listen on some of its ports, as it does so while a script is loaded.

    Raises:
        CannotListen: an address is in use, not this machine's, or not permitted to this user.
    """
    for spec in specs:
        mode = ProxyMode.parse(spec)
        at, number = mode.listen_host(host), mode.listen_port(port)
        if number is None:
            continue
        try:
            sockets = listening(at, number)
        except OSError as error:
            if number not in others and listens(number):
                continue
            raise CannotListen(
                f"cannot listen on {shown_address(at, number)} for the proxy: {reason(error, number)}; "
                "--listen-port and --listen-host choose another"
            ) from error
        for sock in sockets:
            sock.close()


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
