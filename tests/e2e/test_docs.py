"""The documentation is true: its tables are the code's, its commands run or are understood, its links lead somewhere.

Blocks marked `sh` are run here, on the cache's machine and in a state of the page's own; those marked `shell` are for
other machines, for root or for long hours: every verb, option and value in them is parsed, and so is what is quoted
in a line.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from mitmproxy.options import Options
from mitmproxy.tools import cmdline

from pullthrough.config.config_file import parse_config
from pullthrough.config.options import OPTIONS
from pullthrough.config.sources import choices
from pullthrough.proxy.modes import check_modes
from tests import documents
from tests.e2e.conftest import add_model, unique
from tests.e2e.test_matrix import CLIENTS, STATES
from tests.support.a2 import A2Client
from tests.support.blocks import names
from tests.support.modelsfolder import write_model
from tests.support.origin import Origin
from tests.support.proxy import Proxy, environment
from tests.support.world import REDIRECT

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".github/SECURITY.md", "certs/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README: Final = PAGES["README.md"]
BIN: Final = Path(sys.executable).parent
NAMES: Final = [option.name for option in OPTIONS]
RUNNABLE: Final = [page for page, text in PAGES.items() if "\n```sh\n" in text]
LIMIT: Final = 200
"""Lines of the README."""


# --- what a page consists of


def fenced(page: str, *kinds: str) -> list[str]:
    """Return the texts of the fenced blocks of these kinds."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [text for kind, text in blocks if kind in kinds]


def lines(page: str, *kinds: str) -> list[str]:
    """Return the commands of these blocks; a backslash continues one."""
    text = "".join(fenced(page, *kinds)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def inline(page: str) -> list[str]:
    """Return what stands between backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]


def section(page: str, heading: str) -> str:
    """Return what stands under a heading of the second level."""
    return PAGES[page].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


# --- tables and links


def test_readme_is_short() -> None:
    """Whoever opens it reads it to the end."""
    assert len(README.splitlines()) <= LIMIT


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Each leads to a file of the project, and to a heading that is there."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_contents() -> None:
    """Each page of docs/ is in the contents and in the README, under its own title."""
    for page, text in PAGES.items():
        if page.startswith("docs/") and page != "docs/README.md":
            title, name = text.partition("\n")[0].removeprefix("# "), page.removeprefix("docs/")
            assert f"| [{title}]({name}) |" in PAGES["docs/README.md"], page
            assert f"[{title}]({page})" in README, page


def test_no_other_kind_of_block() -> None:
    """A block is run, parsed, or no command; one that is only indented would be none of these."""
    for page in PAGES:
        kinds = set(re.findall(r"^```(\w*)$", PAGES[page], re.MULTILINE)) - {""}
        assert kinds <= {"sh", "shell", "text", "yaml", "toml", "ini", "python"}, page
        assert not re.search(r"^(?:    |\t)\S", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S), re.M), page
        for block in fenced(page, "yaml"):
            assert yaml.safe_load(block), page
        for block in fenced(page, "toml"):
            assert choices(parse_config(ROOT / page, block).texts, {}).settings(), page


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if names(text)])
def test_generated_blocks(page: str) -> None:
    """They are what `python -m tests.documents` writes; every one is made by something."""
    made = documents.generated(page.removeprefix("docs/"), PAGES[page])
    assert made == PAGES[page], "run: .venv/bin/python -m tests.documents"
    known = {*documents.BLOCKS[page.removeprefix("docs/")], "bench figures"}
    assert set(names(PAGES[page])) <= known


def test_every_client_is_listed() -> None:
    """The table has the matrix's clients and states, in order."""
    head, *rows = re.findall(r"^\| (?!---).*$", section("docs/compatibility.md", "Clients"), re.MULTILINE)
    assert head == f"| client | {' | '.join(STATES)} |"
    assert [row.split(" |")[0][2:] for row in rows] == [client.name for client in CLIENTS]


def test_redirecting_rules() -> None:
    """What makes a gateway of the cache's machine is what makes one of it in the tests."""
    assert set(fenced("docs/gateway.md", "shell")) == {rules.lstrip() for rules in REDIRECT.values()}


def test_what_the_cache_says_is_what_it_says() -> None:
    """Each phrase that a page quotes from the cache is in its source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "addon").rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)
    quoted = {"is not recorded and upstream cannot be asked"}
    for text in PAGES.values():
        found = re.findall(r"(?:the cache says|the cache's line|the log\s+says|look for|or) `([^`]+)`", text)
        quoted |= {" ".join(phrase.split()) for phrase in found if " " in phrase.strip()}
    assert len(quoted) >= 12
    for phrase in quoted - {"connection reset by peer", "ollama-cache ca renew"}:
        for piece in filter(None, phrase.split("…")):
            # What is put in at run time is not in the source: our own words around it are.
            assert all(part.strip() in source for part in re.split(r"registry\.ollama\.ai", piece)), phrase


# --- commands are understood


def check_cli(words: list[str], *, strict: bool) -> None:
    """Check a call of `ollama-cache`: the verb and its options exist; with `strict` the whole call is parsed."""
    commands = documents.commands()
    name = " ".join(words[:2]) if " ".join(words[:2]) in commands else words[0]
    assert name in commands, f"no verb {words[0]!r}"
    rest = words[len(name.split()) :]
    if name == "run":
        check_mitmdump(rest)
    elif strict:
        commands[name].make_context(name, list(rest))
    known = {flag for parameter in commands[name].params for flag in parameter.opts} | {"--help"}
    if name != "run":
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


def check_mitmdump(words: list[str]) -> None:
    """Check arguments for mitmdump: it knows them, and `--set` names options and values that we understand."""
    options = Options()
    parsed = cmdline.mitmdump(options).parse_args([word for word in words if word not in ("--help", "--help-mitmdump")])
    for setting in parsed.setoptions:
        name, _, value = setting.partition("=")
        if name.startswith("ollama_cache_"):
            check_option(name.removeprefix("ollama_cache_"), value)
        else:
            assert name in options, setting


def check_option(name: str, value: str) -> None:
    """Check that an option exists and understands a value. Raises ValueError if it does not."""
    assert name in NAMES, name
    OPTIONS[NAMES.index(name)].parse(value)


def check_script(words: list[str]) -> None:
    """Check a script of the project: it is there, and its source knows the options."""
    path, *rest = words
    script = ROOT / path
    assert script.is_file(), path
    if path == "scripts/run":
        check_mitmdump(rest)
        return
    if path == "scripts/test":
        for word in rest:
            file, _, test = word.removeprefix("--ignore=").partition("::")
            if file.startswith("tests"):
                assert (ROOT / file).exists(), word
                assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), word
        return
    if path == "scripts/setup":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(",".join(rest).split(",")) - {""} <= set(project["optional-dependencies"]), rest
        return
    source = script.read_text(encoding="utf-8")
    if (implementation := script.with_name(f"{script.name}.py")).exists():
        source += implementation.read_text(encoding="utf-8")
    for word in rest:
        assert not word.startswith("--") or word.partition("=")[0] in source, " ".join(words)


def check_words(words: list[str], *, strict: bool) -> bool:
    """Check the commands of ours in one simple command; say whether there was one."""
    found = False
    for index, word in enumerate(words):
        rest = list(takewhile(lambda each: each not in ("|", "&&", ";", ">"), words[index:]))
        if re.fullmatch(r"(\S*/)?ollama-cache", word) and len(rest) > 1 and not rest[1].startswith("/"):
            check_cli(rest[1:] if rest[1] != "ollama-cache" else rest[2:], strict=strict)
            return True
        if re.fullmatch(r"scripts/\S+|\.ci/run", word) and (ROOT / word).suffix not in (".yaml", ".png"):
            check_script(rest)
            found = True
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str) -> None:
    """In blocks every call of ours parses; in a line its verb and options exist."""
    for line in lines(page, "sh", "shell"):
        line = re.sub(r"([|;>]|&&)", r" \1 ", re.sub(r"\s#.*$", "", line)) if "{" not in line else line
        check_words(shlex.split(line), strict=True)
    for text in inline(page):
        if re.match(r"(\S*/)?ollama-cache [a-z]|scripts/\S|\.ci/run", text) and "…" not in text:
            words = shlex.split(text.replace("[", "").replace("]", ""))
            if words[1:2] != ["run"] or len(words) > 2:
                check_words([word for word in words if not word.isupper()], strict=False)


@pytest.mark.parametrize("page", PAGES)
def test_options(page: str) -> None:
    """Each option that is named exists, under all of its spellings, and understands the value that it is shown with."""
    text = PAGES[page]
    for name in re.findall(r"\bollama_cache_([a-z_]+)", text):
        assert name in NAMES, name
    for name in re.findall(r"\bOLLAMA_CACHE_([A-Z_]+)", text):
        assert name.lower() in (*NAMES, "name", "test_axe", "test_pages", "test_swift"), name
    others = {"fwd", "event", "trust_env"}
    for quoted in inline(page):
        if match := re.fullmatch(r"([a-z_]+)=(\S+)", quoted):
            name, value = match.groups()
            if name not in others and "…" not in value and not name.startswith("ollama"):
                check_option(name, value)
        if match := re.fullmatch(r"--set '?ollama_cache_([a-z_]+)=([^']+)'?", quoted):
            check_option(match[1], match[2])
        for mode in re.findall(r"--mode (\S+)", quoted):
            if "…" not in mode and mode not in ("wireguard", "local"):
                check_modes([mode], ["registry.ollama.ai"])


@pytest.mark.parametrize(
    ("check", "words"),
    [
        pytest.param(check_cli, ["lst"], id="verb"),
        pytest.param(check_cli, ["ls", "--jsn"], id="option of a verb"),
        pytest.param(check_cli, ["ca", "renew", "--force"], id="option of a verb of two words"),
    ],
)
def test_a_wrong_command_is_found(check: Callable[..., None], words: list[str]) -> None:
    """The checks see what they are for."""
    with pytest.raises(AssertionError):
        check(words, strict=False)


def test_a_wrong_option_is_found() -> None:
    """So do those of options and their values."""
    with pytest.raises(AssertionError):
        check_option("max_sice", "1GB")
    with pytest.raises(ValueError, match="a size"):
        check_option("max_size", "much")
    with pytest.raises(AssertionError):
        check_mitmdump(["--set", "listen_prot=1"])


# --- commands are run


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """The cache as the README starts it, but for folders, ports and upstream, with two models."""
    (line,) = [line for line in lines("README.md", "sh") if line.startswith("scripts/run")]
    folder = tmp_path_factory.mktemp("docs")
    program = [ROOT / word if "/" in word else word for word in shlex.split(line)]
    with Origin(folder / "origin") as origin, Proxy(folder, origin, program=program, front=True) as proxy:
        for name in ("llama3.2", "gemma3", "all-minilm"):
            model = add_model(origin, unique(1000), repository=f"library/{name}")
            if name != "all-minilm":
                A2Client(proxy.url, proxy.ca_file, folder / name).pull(name)
                proxy.wait_for_line(model.recorded)
        config = origin.add_blob(b"{}")
        origin.add_model("library/gemma2", "2b", layers=[], config=config)
        yield origin, proxy


@pytest.fixture
def play(running: tuple[Origin, Proxy], tmp_path: Path) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """Run one line of a page, with this test's addresses and folders in place of the page's."""
    _, proxy = running
    write_model(tmp_path / "models", "registry.ollama.ai/library/old/latest", [b"layer" * 50, b"config"])
    places = {
        "http://127.0.0.1:8080": proxy.url,
        "http://127.0.0.1:9200": f"http://127.0.0.1:{proxy.front_port}",
        "certs/ollama-cache-ca-cert.pem": str(proxy.ca_file),
        "/srv/ollama/models": str(tmp_path / "models"),
        "/media/stick": str(tmp_path),
        ".venv/bin/": f"{BIN}/",
    }
    own = {
        "OLLAMA_CACHE_DIR": str(proxy.store),
        "OLLAMA_CACHE_CERTS": str(proxy.ca_file.parent),
        "OLLAMA_MODELS": str(tmp_path / "models"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }

    def run(line: str, **env: str) -> "subprocess.CompletedProcess[str]":
        for text, place in places.items():
            line = line.replace(text, place)
        return subprocess.run(
            ["sh", "-c", line],
            env=environment(tmp_path / "home", own | env),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_pages_that_are_run() -> None:
    """No page lost its marks."""
    assert {"README.md", "docs/air-gap.md", "docs/certificates.md", "docs/command-line.md"} <= set(RUNNABLE)


@pytest.mark.parametrize("page", RUNNABLE)
def test_run(page: str, play: Any, tmp_path: Path) -> None:
    """Each command does its work, in the order in which they stand there."""
    env = {}
    if page == "docs/certificates.md":  # an authority of its own, with no cache that uses it
        env = {
            "OLLAMA_CACHE_CERTS": str(tmp_path / "certs"),
            "OLLAMA_CACHE_DIR": str(tmp_path / "store"),
            "OLLAMA_CACHE_LISTEN": ":9200",
        }
    for line in lines(page, "sh"):
        if line.startswith("scripts/run"):
            continue  # the fixture
        done = play(line, **env)
        if done.returncode == 127 and line.startswith("curl"):
            pytest.skip("curl is not installed")
        # What the doctor finds is the machine's: the exit code says that, and is one of two.
        expected = (0, 1) if "doctor" in line else (0,)
        assert done.returncode in expected and "Traceback" not in done.stderr, (line, done.stdout, done.stderr)
        assert done.stdout or done.stderr, line


def test_ready_lines(running: tuple[Origin, Proxy]) -> None:
    """What the first start says is what the README shows."""
    _, proxy = running
    shown = re.findall(r"^(.*(?:proxy listening|ollama-cache ready|^store ).*)$", README, re.MULTILINE)
    assert len(shown) == 3
    for line in shown:
        pattern = re.escape(line).replace("…", ".*").replace(re.escape("*:8080"), r"\S+:\d+").replace("AB:CD:", "")
        pattern = pattern.replace(re.escape("*:9200"), r"\S+:\d+").replace(":9200/", r":\d+/")
        pattern = pattern.replace(re.escape(".venv/bin/"), r"\S*")
        assert any(re.search(pattern, said) for said in proxy.output), line


def test_curl_shows_miss_then_hit(running: tuple[Origin, Proxy], play: Any) -> None:
    """The check with curl answers what the README says, and port 9200 lists what was pulled."""
    (line,) = [line for line in lines("README.md", "sh") if line.startswith("curl ")]
    origin, _ = running
    name = f"fresh-{os.getpid()}"
    add_model(origin, unique(1000), repository=f"library/{name}")
    for promised in ("ollama-cache; fwd=miss", "ollama-cache; hit"):
        assert promised in README
        done = play(line.replace("all-minilm", name))
        if done.returncode == 127:
            pytest.skip("curl is not installed")
        assert done.returncode == 0, done.stderr
        assert f"cache-status: {promised}" in done.stdout.lower()
    assert "llama3.2" in play("curl -fsS http://127.0.0.1:9200/").stdout


@pytest.mark.parametrize("line", [line for line in lines("CONTRIBUTING.md", "shell") if " -k " in line])
def test_selections(line: str) -> None:
    """An expression of ours selects tests."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *shlex.split(line)[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("code", fenced("CONTRIBUTING.md", "python"))
def test_scenario_by_hand(tmp_path: Path, code: str) -> None:
    """It runs until Enter, and says where the cache is."""
    assert "/tmp/scenario" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("/tmp/scenario", str(tmp_path))],
        env=environment(tmp_path / "home", {"PYTHONPATH": str(ROOT)}),
        cwd=ROOT,
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HTTPS_PROXY=http://127.0.0.1:")


STACKS: Final = {
    "Python `requests`": ("REQUESTS_CA_BUNDLE", "import requests; print(requests.get(URL).status_code)"),
    "Python `httpx`": ("SSL_CERT_FILE", "import httpx; print(httpx.get(URL).status_code)"),
    "Python `urllib`": ("SSL_CERT_FILE", "import urllib.request as r; print(r.urlopen(URL).status)"),
    "Python `aiohttp`": (
        "SSL_CERT_FILE",
        "import aiohttp, asyncio\nasync def main():\n async with aiohttp.ClientSession(trust_env=True) as session:\n"
        "  async with session.get(URL) as response: print(response.status)\nasyncio.run(main())",
    ),
}
"""The variable by which each trusts our authority, and a request."""


@pytest.mark.parametrize("stack", STACKS)
def test_client_stacks(running: tuple[Origin, Proxy], tmp_path: Path, stack: str) -> None:
    """By HTTPS_PROXY and the variable of its row a program gets a manifest, and without the variable none."""
    _, proxy = running
    variable, code = STACKS[stack]
    (row,) = [line for line in PAGES["docs/clients.md"].splitlines() if line.startswith(f"| {stack}")]
    assert f"`{variable}=CA`" in row
    code = f"URL = 'https://registry.ollama.ai/v2/library/llama3.2/manifests/latest'\n{code}"
    for extra in ({variable: str(proxy.ca_file)}, {}):
        env = environment(tmp_path / "home", {"HTTPS_PROXY": proxy.url, **extra})
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.stdout == "200\n") == bool(extra), done.stderr
