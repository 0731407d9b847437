"""options: those of mitmproxy that stop the start."""

from contextlib import nullcontext
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
    ("values", "message"),
    [
        ({"ollama_cache_max_size": None}, ""),
        ({"ollama_cache_max_size": ["1GB", "1GB"]}, "expected it once, got it 2 times"),
        ({"ollama_cache_max_size": ["1GB"]}, "expected text, got list"),
        (
            {"ollama_cache_max_size": 300},
            "option ollama_cache_max_size: expected text, got int; put the value in quotes",
        ),
    ],
)
def test_what_a_file_gives(given: OptManager, values: dict[str, object], message: str) -> None:
    """Of mitmproxy's config.yaml: what is no text would make mitmproxy go on without us."""
    given.update_defer(**values)
    with pytest.raises(SettingsError, match=message) if message else nullcontext():
        options.check_refused()


def test_given_twice(given: OptManager) -> None:
    """On the command line, too; what is not ours is not judged."""
    given.set("ollama_cache_pins=a", "else=1", "else=2", defer=True)
    options.check_refused()
    given.set("ollama_cache_pins=a", "ollama_cache_pins=b", defer=True)
    with pytest.raises(SettingsError, match="option ollama_cache_pins: expected it once, got it 2 times"):
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
