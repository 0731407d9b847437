"""cli: what each verb says and exits with, and that it writes nowhere else.

The verbs run in this process, by typer's runner; that the console script exists is for test_packaging to tell.
"""

import errno
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import typer
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from mitmproxy.certs import CertStore
from typer.testing import CliRunner

import pullthrough
from pullthrough.cli import app as cli
from pullthrough.cli import common
from pullthrough.cli.common import _running_store
from pullthrough.config import paths
from pullthrough.config.options import OPTIONS
from pullthrough.config.settings import R2_HOST
from pullthrough.core.errors import ControlError
from pullthrough.pki.authority import CERTIFICATE_NAME, DER_NAME, KEY_NAME, Authority
from pullthrough.runtime.whereabouts import Running

FILES = {CERTIFICATE_NAME, DER_NAME, KEY_NAME}
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder, in an empty home, with no settings but those in `env`."""
    for name in os.environ:
        if re.match(r"(?i)ollama|xdg_", name):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.chdir(tmp_path / "work")

    def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(cli.app, arguments, env=env)

    return invoke


def tree(folder: Path) -> set[str]:
    """Every file under the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def refusal(result: Result, *, code: int = 1) -> str:
    """The one line of a verb that could not do what it says: exit code 1, nothing on standard output."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("ollama-cache: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("ollama-cache: ").removesuffix("\n")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / CERTIFICATE_NAME).read_bytes())


# --- help and what is no command


def test_help(run: Run) -> None:
    """Every verb with what it does."""
    result = run("--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "A pull-through cache for the Ollama registry." in result.stdout
    assert re.search(r"^ *run +Run the cache", result.stdout, re.MULTILINE)
    assert re.search(r"^ *ca +Make the certificate authority", result.stdout, re.MULTILINE)


def test_help_of_ca(run: Run, tmp_path: Path) -> None:
    """The option that names the folder; nothing is made by asking."""
    result = run("ca", "--help")
    assert result.exit_code == 0
    assert re.search(r"--certs .*as the option ollama_cache_certs", result.stdout)
    assert tree(tmp_path) == set()


def test_no_arguments(run: Run) -> None:
    """The help, where usage errors go."""
    result = run()
    assert result.exit_code == 2
    assert "A pull-through cache for the Ollama registry." in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["delete"], "No such command 'delete'", id="unknown verb"),
        pytest.param(["--verbose"], "No such option: --verbose", id="unknown option"),
        pytest.param(["ca", "--cert", "x"], "No such option: --cert", id="unknown option of a verb"),
        pytest.param(["ca", "--certs"], "Option '--certs' requires an argument", id="option without its value"),
        pytest.param(["ca", "here"], "No such command 'here'", id="argument too many"),
    ],
)
def test_bad_usage(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    """Exit code 2, as of any program; said on standard error, nothing done."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert tree(tmp_path) == set()


# --- ca


def test_ca_makes_an_authority_and_shows_it(run: Run, tmp_path: Path) -> None:
    """Where the two files are, what it signs and until when; and nothing else is written."""
    folder = tmp_path / "certs"
    result = run("ca", "--certs", str(folder))
    made = certificate(folder)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines.pop(2).startswith("SHA-256 fingerprint  ")
    assert lines == [
        f"certificate (PEM)    {folder / CERTIFICATE_NAME}",
        f"certificate (DER)    {folder / DER_NAME}",
        f"signs only           registry.ollama.ai, {R2_HOST} (and names below them)",
        f"valid until          {made.not_valid_after_utc:%Y-%m-%d}",
    ]
    assert tree(tmp_path) == {f"certs/{name}" for name in FILES}
    assert x509.load_der_x509_certificate((folder / DER_NAME).read_bytes()) == made
    if os.name == "posix":
        assert stat.S_IMODE((folder / KEY_NAME).stat().st_mode) == 0o600
    ssl.create_default_context(cafile=folder / CERTIFICATE_NAME)


def test_ca_shows_the_fingerprint(run: Run, tmp_path: Path) -> None:
    """SHA-256 of the certificate, as OpenSSL and browsers show it: 32 bytes in capitals, colons between them."""
    numbers = iter(range(1000))
    while True:
        folder = tmp_path / f"certs{next(numbers)}"
        authority = Authority.load_or_create(folder, ["registry.ollama.ai", R2_HOST], now=datetime.now(UTC))
        if not {"AB", "CD"} & set(authority.fingerprint.split(":")):  # which rich would draw as pictures
            break
    fingerprint = certificate(folder).fingerprint(hashes.SHA256()).hex(":").upper()
    assert re.fullmatch(r"[0-9A-F]{2}(:[0-9A-F]{2}){31}", fingerprint)
    result = run("ca", "--certs", str(folder))
    assert f"SHA-256 fingerprint  {fingerprint}" in result.stdout.splitlines()


def test_ca_shows_the_one_there_is(run: Run, tmp_path: Path) -> None:
    """A second time nothing is made: the same words, the same bytes."""
    first = run("ca", "--certs", "certs")
    folder = tmp_path / "work" / "certs"
    before = {name: (folder / name).read_bytes() for name in FILES}
    second = run("ca", "--certs", "certs")
    assert (second.exit_code, second.stdout) == (0, first.stdout)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_ca_does_not_print_its_key(run: Run, tmp_path: Path) -> None:
    """Neither the key nor a piece of it."""
    result = run("ca", "--certs", str(tmp_path / "certs"))
    lines = (tmp_path / "certs" / KEY_NAME).read_text().splitlines()
    assert "PRIVATE KEY" in lines[0]
    assert not any(line in result.output for line in lines if len(line) > 20)


def test_ca_obeys_the_environment(run: Run, tmp_path: Path) -> None:
    """The folder and the names, as the addon reads them."""
    env = {
        "OLLAMA_CACHE_CERTS": str(tmp_path / "from environment"),
        "OLLAMA_CACHE_REGISTRIES": "registry.ollama.ai,hub.example",
        "OLLAMA_CACHE_BLOB_HOST": "blobs.example",
    }
    result = run("ca", env=env)
    assert result.exit_code == 0, result.output
    assert "signs only           registry.ollama.ai, hub.example, blobs.example (and" in result.stdout
    assert tree(tmp_path) == {f"from environment/{name}" for name in FILES}


def test_ca_prefers_the_option(run: Run, tmp_path: Path) -> None:
    """What is typed counts, not what the environment says."""
    result = run("ca", "--certs", str(tmp_path / "typed"), env={"OLLAMA_CACHE_CERTS": str(tmp_path / "environment")})
    assert result.exit_code == 0
    assert tree(tmp_path) == {f"typed/{name}" for name in FILES}


def test_ca_without_any_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place that the platform has for it; the store is not touched."""
    monkeypatch.setattr(paths, "default_certs", lambda: tmp_path / "home" / "configuration")
    monkeypatch.setattr(paths, "default_store", lambda: tmp_path / "home" / "data")
    assert run("ca").exit_code == 0
    assert tree(tmp_path) == {f"home/configuration/{name}" for name in FILES}


def test_ca_in_a_home(run: Run, tmp_path: Path) -> None:
    """A tilde is the user's home, also where no shell has seen it."""
    assert run("ca", env={"OLLAMA_CACHE_CERTS": "~/certs"}).exit_code == 0
    assert tree(tmp_path) == {f"home/certs/{name}" for name in FILES}


def test_ca_is_not_wrapped(run: Run, tmp_path: Path) -> None:
    """A long path stays on its line, to be copied, however narrow the terminal."""
    folder = tmp_path / ("deep " * 20).strip() / "x" / "certs"
    result = run("ca", "--certs", str(folder), env={"COLUMNS": "40"})
    assert result.exit_code == 0
    assert f"certificate (PEM)    {folder / CERTIFICATE_NAME}" in result.stdout.splitlines()


def unconstrained(folder: Path) -> str:
    """mitmproxy's own kind of CA, which may sign anything, under our file names."""
    CertStore.create_store(folder / "mitmproxy", "mitmproxy", 2048)
    key = (folder / "mitmproxy" / "mitmproxy-ca.pem").read_bytes()
    shutil.copy(folder / "mitmproxy" / "mitmproxy-ca-cert.pem", folder / CERTIFICATE_NAME)
    shutil.rmtree(folder / "mitmproxy")
    write_key(folder, key)
    return "expected"


def unconstrained_ec(folder: Path) -> str:
    """Like ours to the last field, but for the name constraints."""
    authority = Authority.load_or_create(folder, ["registry.ollama.ai"], now=datetime.now(UTC))
    found = authority.certificate
    key = serialization.load_pem_private_key((folder / KEY_NAME).read_bytes(), None)
    builder = x509.CertificateBuilder(found.issuer, found.subject, found.public_key(), found.serial_number)
    builder = builder.not_valid_before(found.not_valid_before_utc).not_valid_after(found.not_valid_after_utc)
    for extension in found.extensions:
        if not isinstance(extension.value, x509.NameConstraints):
            builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]  # the key is EC
    (folder / CERTIFICATE_NAME).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return "with name constraints that permit everything"


def expired(folder: Path) -> str:
    Authority.load_or_create(folder, ["registry.ollama.ai", R2_HOST], now=datetime.now(UTC) - timedelta(days=4000))
    return "expected a CA that is valid at "


def other_names(folder: Path) -> str:
    Authority.load_or_create(folder, ["registry.ollama.ai"], now=datetime.now(UTC))
    return f"expected a CA that permits {R2_HOST}, got one that permits registry.ollama.ai"


def no_key(folder: Path) -> str:
    other_names(folder)
    (folder / KEY_NAME).unlink()
    return "expected the private key of the CA"


def open_key(folder: Path) -> str:
    other_names(folder)
    (folder / KEY_NAME).chmod(0o644)
    return "expected mode 0600"


def noise(folder: Path) -> str:
    write_key(folder, os.urandom(100))
    return "expected the private key of the CA"


def write_key(folder: Path, content: bytes) -> None:
    (folder / KEY_NAME).touch(mode=0o600)
    (folder / KEY_NAME).write_bytes(content)


@pytest.mark.parametrize(
    "prepare",
    [
        unconstrained,
        unconstrained_ec,
        expired,
        other_names,
        no_key,
        pytest.param(
            open_key, marks=pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX"), id="open_key"
        ),
        noise,
    ],
)
def test_ca_refuses_what_it_finds(run: Run, tmp_path: Path, prepare: Callable[[Path], str]) -> None:
    """One line that says expected and got, and of which file; what is there stays as it is."""
    folder = tmp_path / "certs"
    folder.mkdir()
    expected = prepare(folder)
    before = {name: (folder / name).read_bytes() for name in tree(folder)}
    message = refusal(run("ca", "--certs", str(folder)))
    assert message.startswith(str(folder))
    assert expected in message
    assert re.search(", got:? ", message)
    after = {name: (folder / name).read_bytes() for name in tree(folder)}
    after.pop(DER_NAME, None)  # a copy for Windows, made of any CA that is bound like ours
    before.pop(DER_NAME, None)
    assert after == before


@pytest.mark.parametrize(
    ("certs", "expected"),
    [
        pytest.param("file", "expected a folder to make a CA in, got", id="a file"),
        pytest.param("file/below", "expected a folder to make a CA in, got", id="below a file"),
        pytest.param(" ", "option ollama_cache_certs: expected a folder, got ' '", id="blank"),
    ],
)
def test_ca_without_a_usable_folder(run: Run, tmp_path: Path, certs: str, expected: str) -> None:
    """Nothing is made anywhere else instead."""
    (tmp_path / "work" / "file").write_text("")
    assert expected in refusal(run("ca", "--certs", certs))
    assert tree(tmp_path) == {"work/file"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REGISTRIES", "10.0.0.1", "option ollama_cache_registries: expected a host name, not an address"),
        ("BLOB_HOST", "registry.ollama.ai", "option ollama_cache_blob_host: expected a host other than the registries"),
        ("FINISH", "later", "option ollama_cache_finish: expected auto or always or never, got 'later'"),
        ("LOG_LEVEL", "[red]loud[/red]", "expected debug, info, warning or error, got '[red]loud[/red]'"),
    ],
)
def test_ca_holds_the_environment_to_its_grammar(run: Run, tmp_path: Path, name: str, value: str, message: str) -> None:
    """A bad option stops it as it stops the cache, before anything is made."""
    env = {f"OLLAMA_CACHE_{name}": value, "OLLAMA_CACHE_CERTS": str(tmp_path / "certs")}
    assert message in refusal(run("ca", env=env))
    assert tree(tmp_path) == set()


def test_ca_in_json(run: Run, tmp_path: Path) -> None:
    """What is made and what is shown is one list; the fingerprint is the certificate's."""
    certs = ("--certs", str(tmp_path / "ca"), "--json")
    (made,) = json.loads(run("ca", *certs).stdout)
    digest = certificate(tmp_path / "ca").fingerprint(hashes.SHA256())
    assert (made["sha256"], made["certificate"]) == (digest.hex(":").upper(), str(tmp_path / "ca" / CERTIFICATE_NAME))
    assert json.loads(run("ca", "show", *certs).stdout) == [made]
    (coming,) = json.loads(run("ca", "renew", *certs).stdout)
    assert json.loads(run("ca", "show", *certs).stdout) == [made, coming]
    assert json.loads(run("ca", "renew", "--switch", *certs).stdout)[0]["sha256"] == coming["sha256"]


def test_ca_show_makes_nothing(run: Run, tmp_path: Path) -> None:
    """It says where it looked; what there is it shows, the next one and former ones too."""
    folder = tmp_path / "certs"
    assert refusal(run("ca", "show", "--certs", str(folder))).startswith(
        f"no authority in {folder}: the cache makes one"
    )
    assert tree(tmp_path) == set()
    made = run("ca", "--certs", str(folder)).stdout
    assert run("ca", "show", "--certs", str(folder)).stdout == f"in use:\n{made}"
    env = {"OLLAMA_CACHE_REGISTRIES": "registry.ollama.ai,hf.co"}
    for switch in ([], ["--switch"], []):
        assert run("ca", "renew", *switch, "--certs", str(folder), env=env).exit_code == 0
        env["OLLAMA_CACHE_REGISTRIES"] = "registry.ollama.ai,hf.co,oci.example"
    before = tree(tmp_path)
    titles = [line for line in run("ca", "show", "--certs", str(folder)).stdout.splitlines() if line.endswith(":")]
    assert titles == ["in use:", "the next one:", "a former one, which signs nothing:"]
    assert tree(tmp_path) == before


def test_ca_renew_takes_configured_names_only(run: Run, tmp_path: Path) -> None:
    """All of them at once; one that is not configured is refused, with how to configure it."""
    folder = tmp_path / "certs"
    run("ca", "--certs", str(folder))
    message = refusal(run("ca", "renew", "hf.co", "--certs", str(folder)))
    assert message.startswith(f"hf.co is not configured here, but registry.ollama.ai, {R2_HOST} is (what is given to")
    assert "or OLLAMA_CACHE_REGISTRIES=registry.ollama.ai,hf.co for this command and for the cache" in message
    assert not (folder / "next").exists()
    env = {"OLLAMA_CACHE_REGISTRIES": "registry.ollama.ai,hf.co,oci.example"}
    result = run("ca", "renew", "hf.co", "--certs", str(folder), env=env)
    assert f"signs only           registry.ollama.ai, hf.co, oci.example, {R2_HOST} (and" in result.stdout


# --- run


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What would have replaced this process."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: calls.append((program, arguments)))
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="none"),
        pytest.param(["--set", "ollama_cache_dir=/srv", "-p", "9200"], id="options of mitmdump"),
        pytest.param(["-v", "--listen-host", "::1"], id="an option of ours by its look"),
        pytest.param(["~d example.com"], id="a filter"),
    ],
)
def test_run_becomes_mitmdump(
    run: Run, tmp_path: Path, executed: list[tuple[str, list[str]]], arguments: list[str]
) -> None:
    """With the script, and everything behind the verb, in order."""
    assert run("run", *arguments).exit_code == 0
    script = Path(pullthrough.__file__).parents[1] / "ollama_cache.py"
    ((program, command),) = executed
    assert command == [program, "-s", str(script), *arguments]
    assert script.is_file()
    assert tree(tmp_path) == set()


def test_run_helps_with_our_options(run: Run, executed: list[tuple[str, list[str]]]) -> None:
    """All of them, by group, and how they are given; nothing is started, wherever the flag stands."""
    for arguments in (["--help"], ["-h"], ["--set", "ollama_cache_dir=/srv", "--help"]):
        result = run("run", *arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "--set ollama_cache_NAME=VALUE" in result.stdout
        for option in OPTIONS:
            assert re.search(rf"^  {option.name} ", result.stdout, re.MULTILINE), option.name
        assert "\nWhat is kept:\n" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 110
    assert executed == []


def test_run_helps_with_those_of_mitmdump(
    run: Run, executed: list[tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    """One flag away; asking for help is no failure, as it is to mitmdump."""
    assert run("run", "--help-mitmdump").exit_code == 0
    assert capfd.readouterr().out.startswith("usage: mitmdump")
    assert executed == []


@pytest.mark.parametrize("argument", ["--max-size", "--max_size", "--ollama-cache-max-size"])
def test_run_says_how_an_option_is_given(run: Run, executed: list[tuple[str, list[str]]], argument: str) -> None:
    """Not as one of mitmdump's, which would answer with all of its own."""
    expected = f"{argument} is no option of the cache; did you mean --set ollama_cache_max_size=20GB?"
    assert refusal(run("run", f"{argument}=20GB"), code=2) == expected
    assert "did you mean --set ollama_cache_certs=VALUE?" in refusal(run("run", "--certs", "/srv/certs"), code=2)
    assert executed == []


def test_run_takes_the_mitmdump_beside_its_python(
    run: Run, tmp_path: Path, executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is installed with it, not whichever PATH finds; that one only where it has none."""
    name = "mitmdump.exe" if sys.platform == "win32" else "mitmdump"
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(shutil, "which", lambda program: f"/elsewhere/{program}")
    run("run")
    (tmp_path / "bin" / name).touch()
    run("run")
    assert [program for program, _ in executed] == ["/elsewhere/mitmdump", str(tmp_path / "bin" / name)]


def test_run_without_mitmdump(
    run: Run, tmp_path: Path, executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where it looked and what to install."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    expected = "expected mitmdump beside this Python or on PATH, got neither; install mitmproxy>=12.2.3,<13"
    assert refusal(run("run")) == expected
    assert executed == []


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--listen-prot", "--listen-port"), ("--listen_port=3128", "--listen-port"), ("--list-host", "--listen-host")],
)
def test_a_misspelt_flag_of_mitmdump(run: Run, executed: list[tuple[str, list[str]]], flag: str, meant: str) -> None:
    """It is told before mitmdump prints its own usage."""
    assert f"is no option of mitmdump; did you mean {meant}?" in refusal(run("run", flag, "3128"), code=2)
    assert executed == []


def test_every_flag_of_mitmdump_is_passed_on(run: Run, executed: list[tuple[str, list[str]]]) -> None:
    """Also those that we have no use for, and what argparse takes for one."""
    shown = subprocess.run(
        [Path(sys.executable).with_name("mitmdump"), "--help"],
        capture_output=True,
        text=True,
        check=False,  # it ends with 1
    ).stdout
    flags = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", shown)) - {"--certs", "--options"})
    assert len(flags) > 30
    for flag in (*flags, "--listen-p"):
        assert run("run", flag).exit_code == 0, flag
    assert len(executed) == len(flags)  # all but --help, which is ours


def test_version_of_a_run(run: Run, executed: list[tuple[str, list[str]]]) -> None:
    """Ours, and then mitmdump's."""
    result = run("run", "--version")
    assert result.stdout.startswith(f"ollama-cache {version('ollama-cache')}, ")
    assert executed[0][1][-1] == "--version"


def test_hints_name_this_program(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not on PATH, by its path; whatever verb a message names."""
    assert {*paths.VERBS} >= {name or "" for name in typer.main.get_command(cli.app).commands}  # type: ignore[attr-defined]
    monkeypatch.setattr(paths, "own_program", lambda: "/opt/cache/bin/ollama-cache")
    assert "start it with `/opt/cache/bin/ollama-cache run`" in refusal(run("ps"))


@pytest.mark.parametrize(
    ("word", "verb"), [("start", "run"), ("help", "--help"), ("remove", "rm"), ("list", "ls"), ("pull", "warm")]
)
def test_words_of_others(run: Run, word: str, verb: str) -> None:
    """What another program calls it is a hint."""
    result = run(word)
    assert result.exit_code == 2 and f" {verb}'?" in " ".join(result.stderr.split())


# --- config --init


def test_config_file_is_written_once(run: Run, tmp_path: Path) -> None:
    """In the user's place, all of it comments; what somebody has written is never replaced."""
    result = run("config", "--init")
    assert (result.exit_code, result.stderr) == (0, "")
    (path,) = (tmp_path / "home").rglob("config.toml")
    assert str(path) in result.stdout
    assert tree(tmp_path) == {str(path.relative_to(tmp_path))}
    before = path.read_text()
    assert "# max_size = " in before
    assert [line for line in before.splitlines() if line and not line.startswith("#")] == []
    assert "expected no " in refusal(run("config", "--init"))
    assert path.read_text() == before


def test_config_file_is_written_where_it_is_read(run: Run, tmp_path: Path) -> None:
    """Beside a store that was chosen; what is set there is in force, and says so."""
    store = tmp_path / "data" / "store"
    assert run("config", "--init", "--dir", str(store)).exit_code == 0
    path = tmp_path / "data" / "config.toml"
    path.write_text(path.read_text().replace("# finish = ", "finish = ").replace('"auto"', '"never"'))
    said = run("config", "--dir", str(store)).stdout
    assert re.search(rf"^finish +{re.escape(str(path))}, line \d+ +never$", said, re.MULTILINE)
    assert not store.exists()


def test_config_file_of_the_cache_that_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written where that cache looks for it, whatever this shell's options are."""
    rows = {"dir": (str(tmp_path / "theirs/store"), "command line"), "certs": ("/their/certs", "default")}
    rows["config"] = ("", "default")

    def answer(*_: object) -> object:
        return [{"name": name, "value": value, "source": source} for name, (value, source) in rows.items()]

    monkeypatch.setattr("pullthrough.cli.options.ask", answer)
    path = tmp_path / "theirs/config.toml"
    result = run("config", "--init")
    assert result.exit_code == 0 and str(path) in result.stdout and "is started again" in result.stdout
    assert '# certs = "/their/certs"' in path.read_text()
    rows["config"] = (str(tmp_path / "own.toml"), "environment")
    assert run("config", "--init").exit_code == 0
    assert (tmp_path / "own.toml").exists()


def test_config_stops_at_a_mistake(run: Run, tmp_path: Path) -> None:
    """As the cache would, with the line."""
    path = tmp_path / "own.toml"
    path.write_text("\nfinnish = 'never'\n")
    message = refusal(run("config", env={"OLLAMA_CACHE_CONFIG": str(path)}))
    assert message == f"{path}, line 2: unknown option finnish; did you mean finish?"


# --- which cache is meant


def cache(store: str, user: str = "", pid: int = 7) -> Running:
    return Running(store, "/certs", "", pid, 0.0, "", user or psutil.Process().username())


def test_the_cache_that_runs_is_meant() -> None:
    """Ours before those of others; with several, the one on our own store."""
    own = Path("/own")
    assert _running_store([], own) == own
    assert _running_store([cache("/running")], own) == Path("/running")
    assert _running_store([cache("/running"), cache("/own", pid=8)], own) == own
    assert _running_store([cache("/running"), cache("/theirs", "somebody")], own) == Path("/running")
    with pytest.raises(ControlError, match=r"several caches run here: process 7 .*/a; process 8 .*/b; say with --dir"):
        _running_store([cache("/a"), cache("/b", pid=8)], own)


@pytest.mark.skipif(os.name != "posix", reason="users are POSIX")
def test_the_cache_of_another_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root is told whose it is about, and follows no note that anybody could have left; others are told whom to ask."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        ControlError, match=r"not this user's \(process 7 of user me, store /srv\): run this as me or root"
    ):
        _running_store([cache("/srv", "me")], Path("/own"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    stranger, vouched = cache("/theirs", "me"), replace(cache("/nonexistent/srv", "me"), is_vouched_for=True)
    with pytest.raises(ControlError, match="if it is meant, say so with --dir"):
        _running_store([stranger], Path("/own"))
    monkeypatch.setattr(common, "running_caches", lambda chosen: [stranger, vouched])
    result = run("connect")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == (
        "ollama-cache: about the cache that runs here: process 7 of user me, store /nonexistent/srv"
    )
    assert "no cache runs on /nonexistent/srv" in result.stderr
    assert _running_store([stranger, vouched], Path("/own")) == Path("/nonexistent/srv")


def test_permission_denied_is_not_no_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb neither goes on as if none ran, nor says that none does."""

    def connect(sock: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for verb in (["ls"], ["rm", "x"], ["connect"], ["warm", "x"]):
        message = refusal(run(*verb, "--dir", str(tmp_path / "store")))
        assert "only its owner and root may ask; run this as that user, or with sudo" in message, verb
    assert tree(tmp_path) == set()
