"""models without a daemon: what each verb says, does and exits with; recorded at 80 columns."""

import json
import os
import re
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pullthrough.cli import app as cli
from pullthrough.core.digest import Digest
from pullthrough.core.intervals import Intervals
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.store import Store
from pullthrough.store.usage import Totals
from tests.support.bigstore import fill
from tests.support.formats import make_format_1
from tests.support.storefiles import blob_file, blob_files

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of two models that share a layer, a blob without a model, a partial, and a day of traffic."""
    folder = tmp_path / "store"
    store = Store.open(folder)
    now = time.time()
    for data in (b"one", b"two", b"both", b"alone"):
        put(store, data, now)
    for text, parts, pulled in (("llama3.2:1b", (b"one", b"both"), 3600), ("me/x", (b"two", b"both", b"gone"), 86400)):
        layers = [{"mediaType": f"x/{part.decode()}", "digest": str(digest(part)), "size": len(part)} for part in parts]
        record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "application/json", now=now - pulled)
        assert record is not None
        store.put_manifest(Name.parse(text), record)
        store.touch(Name.parse(text), now - pulled - 1)
    store.ledger.put_days({20000: Totals(2_000_000, 500_000)})
    partial = store.ingest(digest(b"gone"))
    partial.begin(4)
    partial.close()
    store.close()
    return folder


def put(store: Store, data: bytes, now: float) -> None:
    ingest = store.ingest(digest(data))
    ingest.begin(len(data))
    ingest.write_at(0, data)
    ingest.close()
    store.publish(ingest.digest, store.place(ingest.digest, ingest.partial_path), now=now)
    ingest.forget()


def digest(data: bytes) -> Digest:
    return Digest(sha256(data).hexdigest())


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb on the store, with no settings but those in `env`."""
    for name in os.environ:
        if re.match(r"(?i)ollama", name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
        env = {"OLLAMA_CACHE_DIR": str(folder), **(env or {})}
        result = CliRunner().invoke(cli.app, arguments, env=env, prog_name="ollama-cache")
        assert "\x1b" not in result.output
        return result

    return invoke


def said(result: Result) -> str:
    """Standard output of a verb that did what it says."""
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(result: Result) -> str:
    """The line of a verb that could not."""
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def test_ls(run: Run) -> None:
    """As `ollama list`, with what is special here."""
    lines = said(run("ls", env={"OLLAMA_CACHE_PINS": "me/*"})).splitlines()
    assert re.sub(r"\b[0-9a-f]{12}\b", "ID..........", "\n".join(lines)) == (
        "NAME           ID              SIZE    HELD        PULLED        PINNED\n"
        "llama3.2:1b    ID..........    7 B     complete    1 hour ago\n"
        "me/x:latest    ID..........    11 B    partial     1 day ago     yes\n\n"
        "2 models, 18 B\non the disk: private blobs 15 B"
    )
    rows = json.loads(said(run("ls", "--json")))
    assert list(rows[0]) == [
        *("name", "host", "repository", "reference", "id", "digest", "size", "held", "pulled", "pinned", "visibility")
    ]
    assert rows[0]["digest"].startswith(f"sha256:{rows[0]['id']}")


def test_ls_of_some(run: Run) -> None:
    """Names that begin so, as `ollama list` has it, or that match; sorted as is asked; in JSON too."""

    def listed(*arguments: str) -> list[str]:
        return [row["name"] for row in json.loads(said(run("ls", "--json", *arguments)))]

    assert listed() == listed("--sort", "pulled") == ["llama3.2:1b", "me/x:latest"]
    assert listed("--sort", "size") == ["me/x:latest", "llama3.2:1b"]
    assert listed("--sort", "name") == ["llama3.2:1b", "me/x:latest"]
    assert listed("LLAMA") == listed("llama*") == listed("library/ll") == listed("*:1b") == ["llama3.2:1b"]
    assert listed("*x") == listed("me/") == ["me/x:latest"]
    assert listed("lama") == []
    assert run("ls", "--sort", "age").exit_code == 2


def test_ls_is_whole_in_a_pipe(run: Run) -> None:
    """However narrow the terminal is said to be, what is not shown on one is not cut."""
    text = said(run("ls", env={"COLUMNS": "20"}))
    assert "me/x:latest    " in text and "PINNED" in text and "…" not in text


def test_ps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache that runs it says so, and what to start."""
    line = refused(run("ps"))
    assert line.startswith("ollama-cache: nothing is being recorded: no cache runs on ")
    assert "; start it with `" in line and line.endswith("ollama-cache run`\n")
    monkeypatch.setattr("pullthrough.cli.models.ask", lambda *_: [])
    assert said(run("ps")) == "nothing is being recorded\n"
    assert json.loads(said(run("ps", "--json"))) == []


def test_rm_of_a_pinned_model(run: Run) -> None:
    """It is refused, and nothing goes; --unpin takes the model's own pin along and says which other stays."""
    said(run("pin", "me/x"))
    env = {"OLLAMA_CACHE_PINS": "me/*"}
    line = refused(run("rm", "llama3.2:1b", "me/x", env=env))
    assert "me/x:latest is pinned by me/*, registry.ollama.ai/me/x:latest: nothing was removed; --unpin" in line
    assert len(json.loads(said(run("ls", "--json")))) == 2
    done = json.loads(said(run("rm", "me/x", "--unpin", "--json", env=env)))
    assert (done["models"], done["unpinned"], done["pins"]) == (
        ["me/x:latest"],
        ["registry.ollama.ai/me/x:latest"],
        ["me/*"],
    )
    assert "got 'me/x'" in refused(run("unpin", "me/x"))


@pytest.mark.parametrize("verb", ["rm llama3.2:1b", "pin me/x", "prune"])
def test_json_of_a_change(run: Run, verb: str) -> None:
    """What a verb has done is one object."""
    assert "models" in json.loads(said(run(*verb.split(), "--json")))


def test_show(run: Run) -> None:
    """Layers in the manifest's order, which are here, and who may have them."""
    text = re.sub(r"sha256:\S+", "sha256:…", said(run("show", "me/x")))
    assert text == (
        "name          me/x:latest\nhost          registry.ollama.ai\ndigest        sha256:…\nsize          11 B\n"
        "held          partial\npulled        1 day ago\nconfirmed     1 day ago\nvisibility    public\n"
        "pinned        no\n\n"
        "LAYER           SIZE    HELD    MEDIA TYPE\n"
        f"{digest(b'two').short}    3 B     yes     x/two\n"
        f"{digest(b'both').short}    4 B     yes     x/both\n"
        f"{digest(b'gone').short}    4 B     no      x/gone\n"
    )
    found = json.loads(said(run("show", "me/x", "--json")))
    assert found["layers"][2] == {"media_type": "x/gone", "digest": str(digest(b"gone")), "size": 4, "held": False}
    assert refused(run("show", "llama3.2")) == ("ollama-cache: model 'llama3.2' not found; stored is llama3.2:1b\n")


def test_stats(run: Run) -> None:
    """What is stored once though two need it, and what did not have to be fetched."""
    assert said(run("stats")) == (
        "models     2\nblobs      4, 15 B\nshared     4 B not stored twice\nheld       private blobs 15 B\n"
        "served     2.0 MB\nfetched    500 KB\n"
        "saved      1.5 MB (75 % of what was served)\n\n"
        "DAY (UTC)     SERVED    FETCHED\n2024-10-04    2.0 MB    500 KB\n"
    )
    assert json.loads(said(run("stats", "--json"))) == {
        "models": 2,
        "blobs": 4,
        "bytes": 15,
        "deduplicated_bytes": 4,
        "private_bytes": 15,
        "unfinished_bytes": 0,
        "quarantined_bytes": 0,
        "served": 2_000_000,
        "fetched": 500_000,
        "saved": 1_500_000,
        "ratio": 0.75,
        "days": [{"day": "2024-10-04", "served": 2_000_000, "fetched": 500_000, "saved": 1_500_000}],
    }


def test_rm(run: Run, folder: Path) -> None:
    """The model and what is its alone; with one unknown name nothing goes."""
    assert "model 'nope' not found" in refused(run("rm", "me/x", "nope"))
    assert said(run("rm", "me/x")) == "removed me/x:latest\n3 B freed\n"
    assert {path.name for path in blob_files(folder)} == {
        digest(data).file_name for data in (b"one", b"both", b"alone")
    }
    store = Store.open(folder)
    assert list(store.manifests()) == [Name.parse("llama3.2:1b")]
    assert store.held(digest(b"two")) is None
    store.close()


def test_pins(run: Run) -> None:
    """A pin stays, keeps from prune, and can be taken back; also one for a pattern, whose models need not be here."""
    assert said(run("pin", "me/x")) == "pinned registry.ollama.ai/me/x:latest\n    me/x:latest\n"
    nothing = "    no stored model yet; it applies when one is pulled\n"
    assert said(run("pin", "gemma*")) == f"pinned gemma*\n{nothing}"
    assert said(run("pin", "nope")) == f"pinned registry.ollama.ai/library/nope:latest\n{nothing}"
    assert "invalid model name 'a b'" in refused(run("pin", "a b"))
    assert [row["pinned"] for row in json.loads(said(run("ls", "--json")))] == [False, True]
    assert "me/x" not in said(run("prune", "--age", "0", "--all", "--dry-run"))
    assert said(run("unpin", "me/x", env={"OLLAMA_CACHE_PINS": "me/*"})) == (
        "unpinned registry.ollama.ai/me/x:latest\n    me/x:latest is kept by another pin\n"
    )
    assert (
        "expected a pin of this store (gemma*, registry.ollama.ai/library/nope:latest; by the option: none), got 'me/x'"
        in refused(run("unpin", "me/x"))
    )


def test_prune(run: Run, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By default only what is a week old; a dry run changes nothing and says the same."""
    caplog.set_level("INFO")
    assert said(run("prune")) == "nothing to remove\n"
    assert "removed" not in caplog.text
    dry = said(run("prune", "--age", "0", "--dry-run"))
    dry, told = dry.splitlines(keepends=True)
    assert re.fullmatch(r"would remove 1 blob and 1 leftover, .+ B\n", dry)
    assert re.fullmatch(r"on the disk now: private blobs 15 B(, unfinished recordings .+ B)?\n", told)
    assert blob_file(folder, digest(b"alone").file_name).exists()
    assert said(run("prune", "--age", "0")) == dry.replace("would remove", "removed")
    assert not blob_file(folder, digest(b"alone").file_name).exists()
    assert list((folder / "ingest").iterdir()) == []
    done = said(run("prune", "--age", "90m", "--all"))
    assert done.startswith("removed me/x:latest\nremoved 1 blob ")
    assert run("prune", "--age", "soon").exit_code == 2


def test_config(run: Run, folder: Path) -> None:
    """Each option, its value and where that is from."""
    rows = {row["name"]: row for row in json.loads(said(run("config", "--json", env={"OLLAMA_CACHE_PINS": "x"})))}
    assert rows["pins"] == {"name": "pins", "value": "x", "source": "environment"}
    assert rows["finish"] == {"name": "finish", "value": "auto", "source": "default"}
    assert rows["dir"] == {"name": "dir", "value": str(folder), "source": "environment"}
    assert "\nfinish                  default        auto\n" in said(run("config"))


def test_warm_needs_the_cache(run: Run, tmp_path: Path) -> None:
    """Without a daemon it says what to start; called without a model it is called wrongly."""
    assert "ollama-cache run`" in refused(run("warm", "llama3.2"))
    assert run("warm").exit_code == 2
    (tmp_path / "list").write_text("# none yet\n\n")
    assert run("warm", "--file", str(tmp_path / "list")).exit_code == 2
    assert "expected a list of models in" in refused(run("warm", "--file", str(tmp_path / "absent")))


@pytest.mark.parametrize("verb", [["ls"], ["show", "x"], ["stats"], ["rm", "x"], ["pin", "x"], ["prune"]])
def test_no_store(run: Run, tmp_path: Path, verb: list[str]) -> None:
    """A folder that is no store is said to be none, and nothing is made there."""
    (tmp_path / "empty").mkdir()
    assert f"store in {tmp_path / 'empty'}" in refused(run(*verb, "--dir", str(tmp_path / "empty")))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_store_of_an_earlier_version(run: Run, folder: Path) -> None:
    """What looks says that it has to be converted; the first change does that, and pins and pulls are kept."""
    said(run("pin", "me/x"))
    before = json.loads(said(run("ls", "--json")))
    make_format_1(folder)
    assert "converts it" in refused(run("ls"))
    said(run("prune"))
    after = json.loads(said(run("ls", "--json")))
    assert [{**row, "visibility": ""} for row in after] == [{**row, "visibility": ""} for row in before]


def test_a_locked_store(run: Run, folder: Path) -> None:
    """What looks works while another process holds the store; what changes it does not, and says who has it."""
    store = Store.open(folder)
    try:
        assert "llama3.2:1b" in said(run("ls"))
        assert f"expected a free store, got one in use by process {os.getpid()}" in refused(run("rm", "me/x"))
        assert "stop that one first" in refused(run("rm", "me/x"))
    finally:
        store.close()


def test_looking_changes_nothing(run: Run, folder: Path) -> None:
    """No verb that looks touches a file of the store, a complete one or a partial."""

    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    before = state()
    for verb in (["ls"], ["show", "me/x"], ["stats"], ["config"]):
        said(run(*verb))
    assert state() == before
    store = Store.open(folder)
    assert store.ingest(digest(b"gone")).resume() == (4, Intervals())
    store.close()


@pytest.mark.long
def test_many_models(tmp_path: Path, run: Run) -> None:
    """Ten thousand models, sixty thousand blobs: seconds of a busy machine at most."""
    fill(tmp_path / "big", models=10_000, layers=7, day=86.4)
    for verb in (["ls"], ["stats"], ["prune", "--dry-run"]):
        began = time.process_time()
        said(run(*verb, "--dir", str(tmp_path / "big")))
        spent = time.process_time() - began
        print(f"{verb[0]}: {spent:.2f} s of CPU")
        assert spent < 10
