"""config_file: what a file may say, and that a mistake in it is told with its line and without its value."""

import tomllib
from pathlib import Path

import pytest

from pullthrough.config.config_file import parse_config, template
from pullthrough.config.options import OPTIONS
from pullthrough.core.errors import SettingsError

PATH = Path("/etc/ollama-cache/config.toml")


def test_values() -> None:
    """Texts as on the command line; numbers, flags and lists as TOML has them."""
    file = parse_config(
        PATH,
        """
max_size = "200GB"
upstream_connections = 8
prefetch = false
registries = [
    "registry.ollama.ai",
    "hf.co",
]
listen = [":9200", "[::1]:9300"]
""",
    )
    assert file.texts == {
        "max_size": "200GB",
        "upstream_connections": "8",
        "prefetch": "false",
        "registries": "registry.ollama.ai,hf.co",
        "listen": ":9200,[::1]:9300",
    }
    assert file.source("prefetch") == f"{PATH}, line 4"
    assert file.source("listen") == f"{PATH}, line 9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# x\n\nmax_sise = 1", "line 3: unknown option max_sise; did you mean max_size?"),
        ("ollama_cache_dir = '/srv'", "line 1: unknown option ollama_cache_dir; did you mean dir?"),
        ("config = 'other.toml'", "line 1: unknown option config; expected one of advertise,"),
        ("dir = '/srv'\n[max_size]\nvalue = 1", "line 2: option max_size: expected a text, a number"),
        ("[store]\ndir = 'x'", "line 1: unknown option store; "),
        ("pins = [['x', {a = 1}]]", "line 1: option pins: expected a text"),
        ("direct = 'auto'", "line 1: option direct was removed: Ollama since 0.35"),
        ("dir = /srv", "expected TOML, got a mistake: Invalid value (at line 1, column 7)"),
        ("dir = 'a'\ndir = 'b'", "expected TOML, got a mistake: Cannot overwrite a value (at end of document)"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    """Where it is, and what was meant."""
    with pytest.raises(SettingsError) as refused:
        parse_config(PATH, text)
    assert str(refused.value).startswith(str(PATH))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "max_sise = 'hunter2'",
        "hf_token = 'hunter2'",
        "dir = {password = 'hunter2'}",
        "dir = hunter2",
        "dir = {hunter2 = 1, hunter2 = 2}",
        "[hunter2]\n[hunter2]",
        "dir = 'hunter2",
        "dir = 'a' hunter2",
        "max_size = 1" + "0" * 5000,
        "dir = " + "[" * 100_000,
    ],
)
def test_no_value_is_shown(text: str) -> None:
    """It may be a secret in the wrong place."""
    with pytest.raises(SettingsError) as refused:
        parse_config(PATH, text)
    assert "hunter2" not in str(refused.value) and "000" not in str(refused.value)


def test_template() -> None:
    """It changes nothing, has every option once, and is what it says once the comments are taken away."""
    text = template({"dir": "/srv/me/store", "certs": "/srv/me/certs"})
    assert tomllib.loads(text) == {}
    live = "\n".join(line.removeprefix("# ") for line in text.splitlines() if " = " in line)
    values = parse_config(PATH, live).texts
    assert values.keys() == {option.name for option in OPTIONS} - {"config"}
    assert values["dir"] == "/srv/me/store"
    assert all(
        values[option.name] == option.default for option in OPTIONS if option.name not in ("dir", "certs", "config")
    )
    assert max(map(len, text.splitlines())) <= 120
