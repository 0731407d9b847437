"""modes: which `--mode` values start."""

import socket

import pytest

from pullthrough.core.errors import SettingsError
from pullthrough.proxy.modes import check_modes, check_ports

HOSTS = ("registry.ollama.ai", "cdn.example")


@pytest.mark.parametrize(
    "specs",
    [
        ["regular"],
        ["regular@127.0.0.1:3128", "transparent@8081", "reverse:https://registry.ollama.ai@443"],
        ["reverse:https://cdn.example:443@0.0.0.0:8443"],
    ],
    ids=" ".join,
)
def test_ours(specs: list[str]) -> None:
    """Forward, transparent, and reverse to a name that is intercepted; several at once."""
    check_modes(specs, HOSTS)


@pytest.mark.parametrize(
    "spec",
    [
        *("socks5", "wireguard", "local", "local:ollama", "dns", "tun", "upstream:http://proxy:3128", "nonsense"),
        *("reverse:https://example.com", "reverse:https://registry.ollama.ai:8443", "reverse:http://cdn.example"),
        *("reverse:tls://cdn.example:443", "reverse:tcp://cdn.example:443", "reverse:https://x.cdn.example"),
    ],
)
def test_others(spec: str) -> None:
    """One that is not ours among others stops the start, by name."""
    with pytest.raises(SettingsError, match="expected regular, transparent or reverse:https://HOST") as caught:
        check_modes(["regular", spec], HOSTS)
    assert str(caught.value).endswith(f"got {spec}")


def test_a_port_that_mitmproxy_has() -> None:
    """It may listen already, where the addon is a script: that is no trouble, but the blob server's port is."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_ports([f"regular@127.0.0.1:{port}"], "", None)
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port} for the proxy: it is taken by"):
            check_ports([f"regular@127.0.0.1:{port}"], "", None, others={port})
