"""A daemon and the command line on one store: what the one does the other sees, and pulls go on meanwhile."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pullthrough.admin.client import SOCKET, ask
from pullthrough.core.digest import Digest
from pullthrough.core.errors import ControlError
from pullthrough.store.rows import look
from pullthrough.store.store import Store
from tests.e2e.conftest import MB, add_model, get, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.modelsfolder import manifest_of, pull_list, read_current, sha256
from tests.support.origin import Fault, Mode, Origin
from tests.support.proxy import Proxy, environment
from tests.support.storefiles import blob_file, blob_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no control socket")

ADDON = Path(__file__).parents[2] / "addon"
MAIN = "import sys; sys.argv[0] = 'ollama-cache'; from pullthrough.cli import main; main()"


def cli(proxy: Proxy, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a verb on the proxy's store, as a user would in another terminal."""
    env = {**environment(proxy.directory / "home"), "PYTHONPATH": str(ADDON), "OLLAMA_CACHE_DIR": str(proxy.store)}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def told(proxy: Proxy, *arguments: str) -> Any:
    """The JSON of a verb that looks."""
    done = cli(proxy, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def said(proxy: Proxy, *arguments: str) -> str:
    done = cli(proxy, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def asked(proxy: Proxy, path: str, *body: str) -> list[Any]:
    """Return what the control socket answers to curl, line by line."""
    command = ["curl", "-sS", "--unix-socket", str(proxy.store / SOCKET), f"http://cache/v1/{path}"]
    done = subprocess.run([*command, *(f"-d{text}" for text in body)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_agreement(store: Path) -> None:
    """Index and files agree: each held blob has its file, each file its row, each manifest's row is whole."""
    contents = look(store / "index")
    held = {digest for digest, record in contents.blobs.items() if record.held}
    assert held == {Digest.parse(path.name) for path in blob_files(store)}
    opened = Store.open(store)
    assert all(opened.held(digest) for digest in held)
    assert list((store / "ingest").iterdir()) == []
    opened.close()


@pytest.mark.long
def test_one_store_two_hands(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]
) -> None:
    """Warm, look, pin, remove and prune beside the daemon; after its end the same without it."""
    small, other = (add_model(origin, unique(3 * MB), repository=f"library/{name}") for name in ("small", "other"))
    proxy = start_proxy(ollama_cache_pins="kept*")
    dry = said(proxy, "warm", "small", "--dry-run")
    assert dry == "small:latest: would record 3.0 MB of 3.0 MB\n"
    assert told(proxy, "ls") == []
    done = cli(proxy, "warm", "small", "nobody/nothing")
    assert done.returncode == 1
    assert "small:latest: recorded 3.0 MB of 3.0 MB\n" in done.stdout
    assert (
        done.stderr
        == "ollama-cache: nobody/nothing: pull model manifest: file does not exist (the registry answered 404)\n"
    )
    assert told(proxy, "show", "small")["pulled"] is None
    new_client(proxy).pull(small.name)
    new_client(proxy).pull(other.name)
    rows = {row["name"]: row for row in told(proxy, "ls")}
    assert {name: row["held"] for name, row in rows.items()} == {"small:latest": "complete", "other:latest": "complete"}
    found = told(proxy, "show", "other")
    assert [layer["digest"] for layer in found["layers"]] == list(other.blobs)
    assert asked(proxy, "show?model=other") == [found]
    for verb in ("pin", "unpin"):
        (pinned,) = asked(proxy, verb, '{"model": "other"}')
        assert pinned["models"] == ["other:latest"]
    assert asked(proxy, "prune", '{"age": 0}') == [{"models": [], "blobs": 0, "leftovers": 0, "freed": 0}]
    *progress, last = asked(proxy, "warm", '{"models": ["small"]}')
    assert {line["progress"]["model"] for line in progress} == {"small:latest"}
    assert last == {"result": [{"model": "small:latest", "size": 3 * MB + 23, "missing": 0}]}
    sums = told(proxy, "stats")
    assert sums["models"] == 2
    assert sums["served"] >= 6 * MB
    assert sums["fetched"] == sums["bytes"]
    sources = {row["name"]: row["source"] for row in told(proxy, "config")}
    assert (sources["pins"], sources["listen"], sources["finish"]) == ("command line", "environment", "default")

    assert said(proxy, "pin", "other").startswith("pinned registry.ollama.ai/library/other:latest\n")
    pruned = said(proxy, "prune", "--age", "0", "--all")
    assert pruned.startswith("removed small:latest\n")
    assert [(row["name"], row["pinned"]) for row in told(proxy, "ls")] == [("other:latest", True)]
    assert not blob_file(proxy.store, Digest.parse(small.layer).file_name).exists()
    new_client(proxy).pull(small.name)
    proxy.stop()

    assert not (proxy.store / SOCKET).exists()
    assert {row["name"]: row["pinned"] for row in told(proxy, "ls")} == {"small:latest": False, "other:latest": True}
    assert told(proxy, "stats")["served"] == sums["served"] + sum(origin.blob(digest).size for digest in small.blobs)
    assert said(proxy, "rm", "--unpin", "other").startswith("removed other:latest\n")
    check_agreement(proxy.store)


@pytest.mark.long
def test_pulls_go_on(origin: Origin, proxy: Proxy, new_client: Callable[..., A2Client]) -> None:
    """Clients pull whole models, bit by bit verified, while their models are removed and the store is pruned."""
    models = [add_model(origin, unique(4 * MB), unique(1 * MB)) for _ in range(3)]

    def pull(number: int) -> None:
        for _ in range(3):
            new_client(proxy).pull(models[number].name)

    with ThreadPoolExecutor(3) as pool:
        pulls = [pool.submit(pull, number) for number in range(3)]
        removed = 0
        while not all(future.done() for future in pulls):
            for model in models:
                removed += cli(proxy, "rm", model.name).returncode == 0
            assert cli(proxy, "prune", "--age", "0", "--all").returncode == 0
        for future in pulls:
            future.result()
    assert removed


def test_a_held_index_blocks_nobody(origin: Origin, proxy: Proxy, new_client: Callable[..., A2Client]) -> None:
    """Somebody holds the index's write lock: pulls and looks go on, and the writes follow when it is free."""
    model = add_model(origin, unique(2 * MB))
    database = sqlite3.connect(proxy.store / "index" / "cache.db", isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        new_client(proxy).pull(model.name)
        assert f"{model.name}:latest" in {row["name"] for row in told(proxy, "ls")}
        assert told(proxy, "show", model.name)["held"] == "complete"
        database.execute("ROLLBACK")
    finally:
        database.close()


def test_ps(origin: Origin, proxy: Proxy, new_client: Callable[..., A2Client]) -> None:
    """While a client waits for a blob, it is a row, by its model's name; afterwards there is none."""
    model = add_model(origin, unique(2 * MB))
    stall = Fault(Mode.STALL, digest=model.layer.removeprefix("sha256:"), after=1000, times=None)
    origin.faults.append(stall)

    def rows() -> list[Any]:
        return [row for row in told(proxy, "ps") if row["digest"] == model.layer]

    with ThreadPoolExecutor(1) as pool:
        pull = pool.submit(new_client(proxy).pull, model.name)
        found = rows()
        while not found or not found[0]["present"]:
            assert not pull.done()
            found = rows()
        stall.gate.open()
        pull.result()
    assert [(row["model"], row["size"]) for row in found] == [(f"{model.name}:latest", 2 * MB)]
    assert list(found[0]) == ["model", "digest", "size", "present", "rate", "readers", "since"]
    proxy.wait_for_line(model.recorded)
    assert rows() == []


def test_import_and_verify_beside_the_daemon(
    origin: Origin, proxy: Proxy, new_client: Callable[..., A2Client], tmp_path: Path
) -> None:
    """What is imported is pulled at once and without the CDN; what is damaged is mended while the cache runs."""
    model = add_model(origin, unique(2 * MB), unique(1000))
    direct = A2Client(None, origin.ca_file, tmp_path / "direct", resolve=origin.resolve)
    direct.pull(model.name)
    done = cli(proxy, "import", str(direct.directory), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    name = f"registry.ollama.ai/{model.repository}:latest"
    assert json.loads(done.stdout)["models"] == [{"model": name, "fate": "imported", "why": ""}]
    assert list((proxy.store / "ingest").iterdir()) == []
    assert told(proxy, "show", model.name)["pulled"] is None
    fetched = origin.counters.cdn_bytes
    new_client(proxy).pull(model.name)
    assert told(proxy, "show", model.name)["pulled"] is not None
    assert origin.counters.cdn_bytes == fetched

    path = blob_file(proxy.store, Digest.parse(model.layer).file_name)
    stored = path.read_bytes()
    path.write_bytes(bytes([stored[0] ^ 1]) + stored[1:])
    done = cli(proxy, "verify", model.name)
    assert done.returncode == 1
    assert "damaged: " in done.stdout and "; quarantined as " in done.stdout
    assert not path.exists()
    new_client(proxy).pull(model.name)
    assert cli(proxy, "verify", model.name).returncode == 0


def test_a_list_beside_the_daemon(proxy: Proxy, tmp_path: Path) -> None:
    """A list of a newer Ollama's folder comes in with the child that was pulled, is served, and goes out again."""
    blobs = [bytes(MB), b"{{ .Prompt }}", b"{}"]
    path = "registry.ollama.ai/library/listed/latest"
    children = {"llamacpp": [b"nobody has pulled this"], "ggml": blobs}
    pull_list(tmp_path / "models", path, children, pulled=["ggml"])
    assert said(proxy, "import", str(tmp_path / "models")).startswith(
        "registry.ollama.ai/library/listed:latest: imported\n"
    )
    assert ("listed:latest", "complete") in [(row["name"], row["held"]) for row in told(proxy, "ls")]
    with to_registry(proxy) as connection:
        for blob in (manifest_of(*blobs), blobs[0]):
            status, fields, _ = get(connection, f"/v2/library/listed/blobs/sha256:{sha256(blob)}")
            assert (status, sha256(blob) in fields["location"]) == (307, True)
    assert cli(proxy, "export", "listed", "--to", str(tmp_path / "out")).returncode == 0
    assert read_current(tmp_path / "out") == read_current(tmp_path / "models")


@pytest.mark.parametrize("staging", ["../blobs", ".import-x/../../blobs", "blobs", ".import-none"])
def test_the_daemon_admits_from_staging_folders_only(proxy: Proxy, staging: str) -> None:
    """Whoever may write to the store may ask; a folder beside it is none all the same."""
    arguments = {"staging": staging, "model": "tiny", "public": True, "replace_confirmed": False}
    with pytest.raises(ControlError, match=r"expected a folder|expected a staged manifest"):
        ask(proxy.store, "admit", arguments)


@pytest.mark.long
def test_a_killed_daemon_leaves_no_riddle(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Its socket stays behind: the verbs do without it, and the next daemon takes its place."""
    add_model(origin, unique(MB), repository="library/stays")
    proxy = start_proxy()
    said(proxy, "warm", "stays")
    proxy.kill()
    assert (proxy.store / SOCKET).exists()
    assert [row["name"] for row in told(proxy, "ls")] == ["stays:latest"]
    said(proxy, "pin", "stays")
    proxy.start()
    assert [row["pinned"] for row in told(proxy, "ls")] == [True]
    assert {row["source"] for row in told(proxy, "config")} >= {"command line"}
