"""A start that cannot be right stops: one line that says expected and got, exit code 1, and no open proxy."""

import functools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mitmproxy import version
from mitmproxy.certs import CertStore

from pullthrough.store.store import Store
from tests.support.proxy import PROGRAM, Proxy, patched, run_until_exit

more = functools.partial(pytest.param, marks=pytest.mark.long)
"""A row for the long run: another one goes the same way through the start, and the unit tests know the message."""


def refused(
    folder: Path,
    *,
    program: Sequence[str | Path] = PROGRAM,
    env: dict[str, str] | None = None,
    expected: int = 2,
    **options: object,
) -> str:
    """The one line that mitmdump says before it exits; with 2 where it was called wrongly, else with 1."""
    places = {"ollama_cache_dir": folder / "store", "ollama_cache_certs": folder / "certs"}
    code, output = run_until_exit(folder, program=program, env=env, **(places | options))
    lines = [line for line in output.splitlines() if "Loading script" not in line and "listening at" not in line]
    assert code == expected, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        more(
            {"ollama_cache_tunnel": "some"},
            "option ollama_cache_tunnel: expected any or none, got 'some'",
            id="ollama_cache_tunnel-",
        ),
        ({"ollama_cache_max_sise": "1GB"}, "unknown option ollama_cache_max_sise; did you mean ollama_cache_max_size?"),
        more({"max_size": "1GB"}, "unknown option max_size; did you mean ollama_cache_max_size?", id="max_size-"),
        more(
            {"ollama_cache_manifest_lifetime": "soon"},
            "ollama_cache_manifest_lifetime: expected a duration",
            id="ollama_cache_manifest_lifetime-",
        ),
        more(
            {"ollama_cache_clients": "10.0.0.1/8"},
            "ollama_cache_clients: expected CIDR networks",
            id="ollama_cache_clients-",
        ),
        ({"ssl_verify_upstream_trusted_ca": "/nonexistent.pem"}, "ssl_verify_upstream_trusted_ca: expected a PEM file"),
        (
            {"ssl_insecure": True},
            "option ssl_insecure: must be off (the certificates of registries are always verified)",
        ),
        more({"mode": "socks5"}, "option mode: expected regular, transparent or reverse:https://HOST", id="mode-"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    """Values, misspelt names, and what only the system can tell."""
    assert message in refused(tmp_path, **options)


UNREADABLE = """
import pathlib
exists = pathlib.Path.exists
def refuse(path, **options):
    if path.parent.name == "certs":
        raise PermissionError(13, "Permission denied", str(path))
    return exists(path, **options)
pathlib.Path.exists = refuse
"""


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    """One line says which file, and why. Patched in, because root may read everything."""
    message = refused(tmp_path, program=patched(tmp_path, UNREADABLE), expected=1)
    assert f"{tmp_path / 'certs'}/" in message and "Permission denied; it must be the cache's own" in message


def test_an_option_given_twice(tmp_path: Path) -> None:
    """mitmproxy would go on without the addon: an open proxy, with a CA of its own."""
    assert "option ollama_cache_pins: expected it once, got it 2 times" in refused(
        tmp_path, program=(*PROGRAM, "--set", "ollama_cache_pins=a"), ollama_cache_pins="b"
    )


def test_an_option_that_mitmproxy_does_not_take(tmp_path: Path) -> None:
    """Whatever keeps the addon from being configured ends the start."""
    patch = "from pullthrough.proxy import options\noptions._check_given = lambda *_: None"
    program = (*patched(tmp_path, patch), "--set", "ollama_cache_pins=a")
    message = refused(tmp_path, program=program, ollama_cache_pins="b")
    assert "an option was not accepted: Received multiple values for ollama_cache_pins" in message


@pytest.mark.parametrize("name", [more("emudhra"), more("emudhra_old")])
def test_leaked_authority(tmp_path: Path, name: str) -> None:
    """Leaves are signed by our own authority alone; a mitmproxy that has no such option need not be told."""
    if version.VERSION.startswith("12.2."):
        pytest.skip(f"this mitmproxy has no option {name}")
    message = refused(tmp_path, **{name: True})
    assert f"option {name}: must be off (it signs with the leaked key of a public authority)" in message


@pytest.mark.long
def test_bad_environment(tmp_path: Path) -> None:
    """The environment is held to the same grammar."""
    message = refused(tmp_path, env={"OLLAMA_CACHE_FINISH": "later"})
    assert "option ollama_cache_finish: expected auto or always or never, got 'later' (environment)" in message


def test_bad_file(tmp_path: Path) -> None:
    """So is a configuration file, which is found beside the store."""
    (tmp_path / "config.toml").write_text("# ours\nmax_sise = 'hunter2'\n")
    message = refused(tmp_path)
    assert f"{tmp_path / 'config.toml'}, line 2: unknown option max_sise; did you mean max_size?" in message
    assert "hunter2" not in message


def test_a_proxy_port_in_use(tmp_path: Path) -> None:
    """Whoever has it is named, and so is the option; mitmproxy tells a number of the system."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        places = {"ollama_cache_dir": tmp_path / "store", "ollama_cache_certs": tmp_path / "certs"}
        code, message = run_until_exit(tmp_path, port=port, **places)
    assert code == 1 and "Traceback" not in message, message
    assert "has stopped" not in message, "it had not started"
    assert f"cannot listen on 127.0.0.1:{port} for the proxy: it is taken by " in message
    assert f"(process {os.getpid()}); --listen-port and --listen-host choose another" in message


def test_a_program_with_a_window(tmp_path: Path) -> None:
    """A sentence, and no traceback."""
    message = refused(tmp_path, program=(Path(PROGRAM[0]).with_name("mitmweb"), *PROGRAM[1:]))
    assert "start the cache by `" in message and "ollama-cache run` or `mitmdump -s`" in message


def test_a_word_that_is_no_option(tmp_path: Path) -> None:
    """mitmdump takes it, and all that follows, for a filter: what was meant would silently not be in force."""
    code, output = run_until_exit(tmp_path, program=(*PROGRAM, "ollama_cache_max_size=200GB"))
    assert code == 2
    assert "ollama-cache: expected options, got 'ollama_cache_max_size=200GB" in output
    assert "ollama-cache ready" not in output


def test_lines_come_as_they_are_written(tmp_path: Path) -> None:
    """Into a pipe or file too, where Python would keep them; the last one says that it has stopped.

    And whose options count besides ours: a forgotten file of mitmproxy's could move the port.
    """
    own = tmp_path / "home" / ".mitmproxy" / "config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("anticomp: false\n")
    with Proxy(tmp_path, env={"PYTHONUNBUFFERED": ""}) as proxy:
        proxy.wait_for_line("ollama-cache ready: ")
        proxy.wait_for_line(f"mitmproxy's own options are read from {own}, too")
    assert "ollama-cache has stopped" in proxy.output[-1]


def foreign_folder(folder: Path) -> str:
    (folder / "store").mkdir()
    (folder / "store" / "thesis.tex").write_text("")
    return "expected an ollama-cache store or an empty folder, got a folder with 'thesis.tex' in it"


def unwritable(folder: Path) -> str:
    (folder / "store").write_text("")
    return "expected a folder, got a file"


def newer_format(folder: Path) -> str:
    Store.open(folder / "store").close()
    (folder / "store" / "ollama-cache.json").write_text('{"format": 99}')
    return "expected format 1 to 2 in ollama-cache.json, got 99: a newer version of ollama-cache made it"


def linked_blobs(folder: Path) -> str:
    Store.open(folder / "store").close()
    (folder / "store" / "public" / "blobs").rename(folder / "elsewhere")
    (folder / "store" / "public" / "blobs").symlink_to(folder / "elsewhere")
    return "which the store does not follow: remove it, and move the whole store"


def open_to_all(folder: Path) -> str:
    Store.open(folder / "store").close()
    (folder / "store").chmod(0o777)
    return f"(mode 0777): chmod o-w {folder / 'store'}"


def unconstrained_ca(folder: Path) -> str:
    """mitmproxy's own kind of CA, which may sign anything, under our file names."""
    CertStore.create_store(folder / "mitmproxy", "mitmproxy", 2048)
    (folder / "certs").mkdir()
    both = (folder / "mitmproxy" / "mitmproxy-ca.pem").read_bytes()
    (folder / "certs" / "ollama-cache-ca-key.pem").touch(mode=0o600)
    (folder / "certs" / "ollama-cache-ca-key.pem").write_bytes(both)
    (folder / "certs" / "ollama-cache-ca-cert.pem").write_bytes(
        (folder / "mitmproxy" / "mitmproxy-ca-cert.pem").read_bytes()
    )
    return "expected"


@pytest.mark.parametrize(
    "damage",
    [
        foreign_folder,
        *(more(damage) for damage in (unwritable, newer_format, linked_blobs, open_to_all)),
        unconstrained_ca,
    ],
)
def test_bad_folders(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    """What lies on disk is not ours, or not usable."""
    expected = damage(tmp_path)
    message = refused(tmp_path, expected=1)
    assert expected in message
    assert "certs" in message if damage is unconstrained_ca else "store" in message


def test_second_daemon(tmp_path: Path) -> None:
    """A store belongs to one daemon."""
    store = Store.open(tmp_path / "store")
    assert "expected a free store, got one in use by process" in refused(tmp_path, expected=1)
    store.close()


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        more(
            "from mitmproxy import version; version.VERSION = '13.0.0'",
            "expected mitmproxy >=12.2.3,<13, got 13.0.0",
            id="version",
        ),
        (
            "from mitmproxy.proxy.layers.http._upstream_proxy import HttpUpstreamProxy\ndel HttpUpstreamProxy.make",
            "does not make tunnels as expected",
        ),
    ],
    ids=["version", "internals"],
)
def test_another_mitmproxy(tmp_path: Path, patch: str, message: str) -> None:
    """Internals that are not those which tunnels are made of."""
    assert message in refused(tmp_path, program=patched(tmp_path, patch))


RENAMED = """
from mitmproxy import hooks
from mitmproxy.proxy import server_hooks
from mitmproxy.proxy.layers.http import _hooks
hook = {"client_connected": server_hooks.ClientConnectedHook, "server_connect": server_hooks.ServerConnectHook,
        "http_connect": _hooks.HttpConnectHook}[NAME]
hook.name = NAME + "ing"
hooks.all_hooks[hook.name] = hook
"""
MISSING = """
from pullthrough.proxy.request_hooks import RequestHooks
from pullthrough.proxy.connection_hooks import ConnectionHooks
from pullthrough.proxy.client_limits import ClientLimits
for part in PARTS:
    setattr(part, NAME + "ing", getattr(part, NAME))
    delattr(part, NAME)
"""


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        more("client_connected", "ConnectionHooks", "client_connected: a stranger: expected a refusal"),
        more("client_connected", "ClientLimits", "an endless head"),
        (
            "http_connect",
            "ConnectionHooks",
            "http_connect: a tunnel to port 22: expected a refusal, got b'HTTP/1.1 200",
        ),
        more("server_connect", "ConnectionHooks", "server_connect: a way to this machine: expected a refusal"),
        more("next_layer", "ConnectionHooks", "next_layer: a tunnel that is read: expected a refusal"),
        ("requestheaders", "RequestHooks", "requestheaders: two names: expected a refusal"),
    ],
)
def test_a_hook_that_is_not_called(tmp_path: Path, name: str, parts: str, message: str) -> None:
    """A hook on which the policy stands, and which is called by another name here, stops the start."""
    patch = f"NAME, WHERE = {name!r}, {parts!r}\n" + MISSING.replace("PARTS", "[globals()[WHERE]]")
    told = refused_late(tmp_path, patched(tmp_path, patch))
    assert message in told, told


@pytest.mark.parametrize("name", [more("client_connected"), more("server_connect"), "http_connect"])
def test_a_hook_that_has_another_name(tmp_path: Path, name: str) -> None:
    """A mitmproxy that calls it otherwise is another mitmproxy."""
    told = refused_late(tmp_path, patched(tmp_path, f"NAME = {name!r}\n{RENAMED}"))
    assert "another mitmproxy is needed" in told, told


def refused_late(folder: Path, program: Sequence[str | Path]) -> str:
    """The line about the refusal of a start that had come as far as listening, but admitted nobody."""
    places = {"ollama_cache_dir": folder / "store", "ollama_cache_certs": folder / "certs"}
    code, output = run_until_exit(folder, program=program, **places)
    assert code == 2, output
    assert "Traceback" not in output
    assert "ollama-cache ready" not in output
    return next((line for line in output.splitlines() if "ollama-cache: " in line), output)
