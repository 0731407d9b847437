"""modes: which `--mode` values start."""

import pytest

from pullthrough.core.errors import SettingsError
from pullthrough.proxy.modes import check_modes

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
