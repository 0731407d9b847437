"""upstream_proxy: which mitmproxy it works with."""

import pytest
from mitmproxy import ctx, version
from mitmproxy.options import Options
from mitmproxy.proxy.layers.http._upstream_proxy import HttpUpstreamProxy

from pullthrough.core.errors import SettingsError
from pullthrough.proxy.upstream_proxy import check_internals


@pytest.fixture(autouse=True)
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """mitmproxy's options, as if it ran."""
    monkeypatch.setattr(ctx, "options", Options(), raising=False)


def test_this_mitmproxy() -> None:
    """The one that is installed makes tunnels."""
    check_internals()


@pytest.mark.parametrize("found", ["11.1.3", "12.2.2", "13.0.0"])
def test_another_version(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """One that this cache was not tried with is named."""
    monkeypatch.setattr(version, "VERSION", found)
    with pytest.raises(SettingsError, match=f"expected mitmproxy >=12.2.3,<13, got {found}"):
        check_internals()


def test_other_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mitmproxy whose tunnels are made in another way."""
    monkeypatch.delattr(HttpUpstreamProxy, "make")
    with pytest.raises(SettingsError, match="does not make tunnels as expected"):
        check_internals()
    monkeypatch.setattr(HttpUpstreamProxy, "make", lambda _context, _send_connect: ["nothing"], raising=False)
    with pytest.raises(SettingsError, match="expected a tunnel of our kind"):
        check_internals()
