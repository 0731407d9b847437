"""The README is true: its option table is the product's, and its commands do what it says."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pullthrough.options import OPTIONS
from tests.e2e.conftest import add_model, unique
from tests.e2e.test_matrix import CLIENTS, STATES
from tests.support.origin import Origin
from tests.support.proxy import Proxy, environment
from tests.support.world import REDIRECT

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of all `sh` blocks: what a reader can run where the cache is (`shell` blocks are for clients)."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def command(start: str) -> str:
    """The one command that starts so."""
    found = [line for line in commands() if line.startswith(start)]
    assert len(found) == 1, f"expected one command that starts with {start!r}, got {found}"
    return found[0]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """The cache as the README starts it, but for folders, port and upstream."""
    folder = tmp_path_factory.mktemp("readme")
    program = [ROOT / word if "/" in word else word for word in shlex.split(command("scripts/run"))]
    with Origin(folder / "origin") as origin, Proxy(folder, origin, program=program, front=True) as proxy:
        yield origin, proxy


def test_every_command_is_run() -> None:
    """Nothing is in an `sh` block that no test here, in test_scripts or in CI runs."""
    known = ("scripts/run", "scripts/test", "scripts/bench", "scripts/make-ca", "curl ")
    assert [line for line in commands() if not line.startswith(known)] == []
    for line in commands():
        program = line.split()[0]
        assert program == "curl" or (ROOT / program).is_file()


def test_redirecting_rules() -> None:
    """What makes a gateway of the cache's machine is what makes one of it in the tests."""
    blocks = re.findall(r"^(?:    .*\n)+", README, re.MULTILINE)
    assert {re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks} >= {
        rules.lstrip() for rules in REDIRECT.values()
    }


def test_option_table() -> None:
    """The table has every option with its default and meaning, in order, and no other."""
    section = README.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\| (.*?) \|$", section, re.MULTILINE)
    assert [(name, meaning) for name, _, meaning in rows] == [(option.name, option.help) for option in OPTIONS]
    for (name, default, _), option in zip(rows, OPTIONS, strict=True):
        # Two are words: the machine's folders, and a host name too long for a table.
        assert default.strip(" `") == option.default or name in ("dir", "certs", "blob_host"), name


def test_every_client_is_listed() -> None:
    """The compatibility table has the matrix's clients and states, in order."""
    section = README.partition("\n## Every client\n")[2].partition("\n## ")[0]
    head, *rows = re.findall(r"^\| (?!\d|\||---).*$", section, re.MULTILINE)
    assert head == f"| client | {' | '.join(STATES)} |"
    assert [row.split(" |")[0][2:] for row in rows] == [client.name for client in CLIENTS]


def test_what_the_cache_says_is_what_it_says() -> None:
    """Each phrase that the troubleshooting table quotes from the cache is in its source."""
    section = README.partition("\n### When it does not\n")[2].partition("\n## ")[0]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "addon").rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)
    quoted = re.findall(r"(?:the cache says|the cache's line|look for) `([^`]+)`", section)
    assert len(quoted) >= 5
    for phrase in (*quoted, "is not recorded and upstream cannot be asked", "expected a free store, got one in use"):
        for piece in filter(None, phrase.split("…")):
            assert piece.strip() in source, phrase


def test_ready_lines(running: tuple[Origin, Proxy]) -> None:
    """What the first start says is what the README shows."""
    _, proxy = running
    for line in re.findall(r"^    (.*(?:proxy listening|ollama-cache ready).*)$", README, re.MULTILINE):
        pattern = re.escape(line).replace("…", ".*").replace(re.escape("*:8080"), r"\S+:\d+").replace("AB:CD:", "")
        pattern = pattern.replace(re.escape("*:9200"), r"\S+:\d+")
        assert any(re.search(pattern, said) for said in proxy.output), line


def test_curl_shows_miss_then_hit(running: tuple[Origin, Proxy], tmp_path: Path) -> None:
    """The check with curl works, and answers what the README says."""
    origin, proxy = running
    add_model(origin, unique(1000), repository="library/all-minilm")
    line = command("curl ").replace("http://127.0.0.1:8080", proxy.url)
    line = line.replace("certs/ollama-cache-ca-cert.pem", str(proxy.ca_file))
    for promised in ("ollama-cache; fwd=miss", "ollama-cache; hit"):
        assert promised in README
        try:
            done = subprocess.run(
                shlex.split(line), env=environment(tmp_path), capture_output=True, text=True, timeout=30, check=False
            )
        except FileNotFoundError:
            pytest.skip("curl is not installed")
        assert done.returncode == 0, done.stderr
        assert f"cache-status: {promised}" in done.stdout.lower()
