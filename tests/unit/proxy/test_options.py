"""options: those of mitmproxy that stop the start."""

from types import SimpleNamespace

import pytest
from mitmproxy.optmanager import OptManager

from pullthrough.core.errors import SettingsError
from pullthrough.proxy import options


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> OptManager:
    """mitmproxy's options of these names; those of 12.3 are among them."""
    manager = OptManager()
    for name in options.REFUSED:
        manager.add_option(name, bool, False, "")
    manager.add_option("dumper_filter", str, "", "")
    manager.add_option("listen_port", int, 8080, "")
    monkeypatch.setattr(options, "ctx", SimpleNamespace(options=manager))
    return manager


def test_the_defaults_start(given: OptManager) -> None:
    """Nothing of it stops a start, nor does a mitmproxy without the newer options."""
    options.check_refused()
    del given._options["emudhra"]
    options.check_refused()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ssl_insecure", True, "must be off (the certificates of registries are always verified)"),
        ("emudhra", True, "must be off (it signs with the leaked key of a public authority)"),
        ("emudhra_old", True, "must be off (it signs with the leaked key of a public authority)"),
        ("dumper_filter", "ollama_cache_max_size=200GB", "an option of the cache is written --set"),
        ("listen_port", 70_000, "option listen_port: expected 0 to 65535, got 70000"),
    ],
)
def test_refused(given: OptManager, name: str, value: object, message: str) -> None:
    """What would undo the trust of clients, or silently not be in force."""
    given.update(**{name: value})
    with pytest.raises(SettingsError) as caught:
        options.check_refused()
    assert message in str(caught.value)
