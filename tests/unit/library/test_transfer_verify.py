"""verify: each kind of damage is found and is no hit any more, an interrupted run is gone on with; and the verbs."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pullthrough.admin.client import LONGEST
from pullthrough.cli import app as cli
from pullthrough.cli import progress, transfer
from pullthrough.config.options import parse_settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import StoreError, TransferRefused
from pullthrough.library.verifier import JOURNAL, Defect, Problem, check, mend
from pullthrough.runtime import platform
from pullthrough.store.store import Store
from tests.support.carrying import import_into
from tests.support.modelsfolder import read_models, sha256, write_model
from tests.support.storefiles import blob_file

ADDON = Path(__file__).parents[3] / "addon"
PATHS = tuple(f"registry.ollama.ai/library/{name}/latest" for name in ("one", "two"))
BLOBS = (b"first" * 100, b"second", b"third" * 7)
DIGESTS = tuple(Digest(sha256(blob)) for blob in BLOBS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two models that share a blob."""
    write_model(tmp_path / "tree", PATHS[0], BLOBS[:2])
    write_model(tmp_path / "tree", PATHS[1], BLOBS[1:])
    with closing(Store.open(tmp_path / "store")) as store:
        import_into(store, tmp_path / "tree", now=1.0)
    return tmp_path / "store"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., tuple[int, str, str]]:
    """(exit code, standard output, standard error) of the command on that store."""
    monkeypatch.setenv("OLLAMA_CACHE_DIR", str(folder))

    def invoke(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


def held(folder: Path) -> set[Digest]:
    with closing(Store.open(folder)) as store:
        return {digest for digest in DIGESTS if store.held(digest) is not None}


def path_of(folder: Path, number: int) -> Path:
    return blob_file(folder, DIGESTS[number].file_name)


def _flip(path: Path) -> None:
    """One bit, and the file's time as it was: only its hash tells."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _copy(path: Path) -> None:
    """The same bytes in another file."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _link(path: Path) -> None:
    path.rename(path.parents[2] / "moved")
    path.symlink_to(path.parents[2] / "moved")


@pytest.mark.parametrize(
    ("spoil", "problem", "is_hit"),
    [
        pytest.param(_flip, Problem.DAMAGED, False, id="flipped bit"),
        pytest.param(_cut, Problem.DAMAGED, False, id="cut short"),
        pytest.param(_link, Problem.DAMAGED, False, id="a link"),
        pytest.param(Path.unlink, Problem.MISSING, False, id="row without file"),
        pytest.param(lambda path: os.utime(path, (5, 5)), Problem.ALTERED, True, id="other time"),
        pytest.param(_copy, Problem.ALTERED, True, id="other inode"),
    ],
)
def test_damage_is_found_and_mended(
    folder: Path, spoil: Callable[[Path], object], problem: Problem, is_hit: bool
) -> None:
    """What is wrong is no hit any more, what is right is one again, and the second run finds nothing."""
    spoil(path_of(folder, 0))
    report = check(folder, (), now=5.0)
    (finding,) = report.findings
    assert (finding.problem, finding.digest) == (problem, DIGESTS[0])
    assert (report.checked, f"{finding.expected} {finding.got}") != (0, " ")
    with closing(Store.open(folder)) as store:
        what = mend(store, finding, now=6.0)
        assert (store.held(DIGESTS[0]) is not None) == is_hit
    assert what.startswith("quarantined as") == (problem is Problem.DAMAGED)
    assert len(list((folder / "quarantine").iterdir())) == (problem is Problem.DAMAGED)
    assert held(folder) == (set(DIGESTS) if is_hit else set(DIGESTS[1:]))
    assert check(folder, (), now=7.0).findings == []
    assert list((folder / "ingest").iterdir()) == []


def test_files_that_the_index_does_not_know(folder: Path) -> None:
    """A right one becomes a hit, a wrong one goes to quarantine, and what is no blob is left alone."""
    right, wrong = Digest(sha256(b"right")), Digest(sha256(b"wrong"))
    for name, data in ((right.file_name, b"right"), (wrong.file_name, b"not it"), ("README", b"hello")):
        (folder / "private" / "blobs" / name).write_bytes(data)
    report = check(folder, (), now=5.0)
    assert {(finding.name, finding.problem) for finding in report.findings} == {
        (right.file_name, Problem.UNKNOWN),
        (wrong.file_name, Problem.DAMAGED),
        ("README", Problem.FOREIGN),
    }
    with closing(Store.open(folder)) as store:
        for finding in report.findings:
            assert Defect.parse(json.loads(json.dumps(finding.fields()))) == finding
            mend(store, finding, now=6.0)
        assert store.held(right) is not None
        assert store.held(wrong) is None
    assert [finding.name for finding in check(folder, (), now=7.0).findings] == ["README"]


def test_a_file_that_changes_before_it_is_mended_is_left_alone(folder: Path) -> None:
    """A daemon may have recorded it anew meanwhile."""
    good = path_of(folder, 0).read_bytes()
    _flip(path_of(folder, 0))
    report = check(folder, (), now=5.0)
    path_of(folder, 0).write_bytes(good)
    with closing(Store.open(folder)) as store:
        assert [mend(store, finding, now=6.0) for finding in report.findings] == [""]


def test_one_model(folder: Path) -> None:
    """Only its blobs are looked at; a name that is not there is an error."""
    _flip(path_of(folder, 0))
    assert check(folder, ["two"], now=5.0).checked == 2
    assert len(check(folder, ["one"], now=5.0).findings) == 1
    with pytest.raises(TransferRefused, match="model 'three' not found"):
        check(folder, ["three"], now=5.0)


def test_goes_on_after_an_interruption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified is not read again, unless it has changed, it was long ago, or other models are asked for."""
    monkeypatch.setattr(platform, "cores", lambda: 1)
    seen = 0

    def interrupt(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > len(BLOBS[0]):
            raise KeyboardInterrupt

    def interrupted(*, now: float) -> None:
        nonlocal seen
        seen = 0
        with pytest.raises(KeyboardInterrupt):
            check(folder, (), now=now, on_bytes=interrupt)
        assert (folder / JOURNAL).exists()

    interrupted(now=5.0)
    report = check(folder, (), now=6.0)
    assert (report.remembered, report.checked, report.findings) == (1, 2, [])
    assert not (folder / JOURNAL).exists()
    report = check(folder, (), now=7.0)
    assert (report.remembered, report.checked) == (0, 3)
    interrupted(now=8.0)
    assert check(folder, (), now=8.0 + 8 * 86400).remembered == 0
    interrupted(now=9.0)
    assert check(folder, ["one"], now=10.0).remembered == 0
    interrupted(now=11.0)
    (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + b"torn \xff")
    _copy(path_of(folder, 0))
    report = check(folder, (), now=12.0)
    assert (report.remembered, len(report.findings)) == (0, 1)


def test_a_store_that_is_held_and_answers_nobody(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """What only reads works; what would change the store says who has it, and changes nothing."""
    with closing(Store.open(folder)):
        code, output, _ = run("verify")
        assert (code, "3 blobs checked, 0 things wrong" in output) == (0, True)
        assert run("export", "one", "--to", folder.parent / "out")[0] == 0
        _flip(path_of(folder, 0))
        for arguments in (("import", folder.parent / "tree"), ("verify",)):
            code, _, errors = run(*arguments)
            assert (code, f"got one in use by process {os.getpid()}" in errors) == (1, True)
        assert path_of(folder, 0).exists()
    assert set(read_models(folder.parent / "out")) == {PATHS[0]}


def test_verify_says_what_it_found(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """As lines and as JSON; the exit code is 1, and 0 once it is mended."""
    _flip(path_of(folder, 0))
    wrong = f"sha256:{sha256(path_of(folder, 0).read_bytes())}"
    code, output, _ = run("verify", "--json")
    document = json.loads(output)
    (finding,) = document.pop("findings")
    assert (code, document["checked"], document["bytes"]) == (1, 3, sum(map(len, BLOBS)))
    assert (finding["problem"], finding["expected"], finding["got"]) == ("damaged", str(DIGESTS[0]), wrong)
    assert finding["done"].startswith("quarantined as")
    path_of(folder, 1).unlink()
    code, output, _ = run("verify")
    assert code == 1
    assert f"{DIGESTS[1].file_name}: missing: expected 6 bytes, got no file; no longer held" in output
    assert run("verify")[0] == 0


def test_import_and_export_on_the_command_line(folder: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Each outcome is a line; a model that is refused makes the exit code 1; errors are one line."""
    work = folder.parent
    for target in ("out", "out.tar"):
        for _ in range(2):
            assert run("export", "one", "two:latest", "--to", work / target, "--force")[:2] == (0, "")
        code, output, _ = run("import", work / target, "--dir", work / f"new-{target}")
        assert (code, output.count(": imported\n")) == (0, 2)
    (work / "out" / "blobs" / DIGESTS[0].file_name).write_bytes(b"x")
    code, output, _ = run("import", work / "out", "--dir", work / "bad", "--json")
    fates = {model["model"]: model["fate"] for model in json.loads(output)["models"]}
    assert code == 1
    assert fates == {
        "registry.ollama.ai/library/one:latest": "refused",
        "registry.ollama.ai/library/two:latest": "imported",
    }
    (work / "out.tar.gz").write_bytes(gzip.compress((work / "out.tar").read_bytes()))
    (work / "dir.tar").mkdir()
    manifest = work / "changed" / "manifests" / "registry.ollama.ai" / "library" / "one" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    with (work / "out.tar").open("r+b") as file:
        file.truncate(5000)
    for arguments, message in (
        (("import", work / "out.tar", "--dir", work / "bad2"), "it is truncated"),
        (
            ("import", work / "nowhere"),
            f"{work / 'nowhere'} does not exist: name a models folder of Ollama, or a bundle",
        ),
        (("export", "nothing", "--to", work / "x.tar"), "model 'nothing' not found"),
        (("import", work / "out.tar.gz", "--dir", work / "bad3"), "got a compressed file: unpack it first"),
        (("verify", "--dir", work / "nowhere"), "expected an ollama-cache store"),
        (("export", "one", "--to", work / "out.tar"), "out.tar: already there, and not the same; --force replaces it"),
        (("export", "one", "--to", work / "changed"), "manifests/registry.ollama.ai/library/one/latest: already there"),
        (("export", "one", "--to", work / "x.tgz"), "a bundle is not compressed"),
        (("export", "one", "--to", work / "dir.tar", "--force"), "is a folder"),
    ):
        code, output, errors = run(*arguments)
        assert (code, output) == (1, "")
        assert message in errors and "Traceback" not in errors


def test_export_to_standard_output(folder: Path) -> None:
    """Nothing but the bundle comes out, whoever reads it."""
    command = [sys.executable, "-c", "from pullthrough.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ADDON), "OLLAMA_CACHE_DIR": str(folder)}
    done = subprocess.run([*command, "export", "*", "--to", "-"], env=environment, capture_output=True, check=True)
    (folder.parent / "piped.tar").write_bytes(done.stdout)
    result = CliRunner().invoke(
        cli.app, ["import", str(folder.parent / "piped.tar"), "--dir", str(folder.parent / "far")]
    )
    assert (result.exit_code, result.stdout.count(": imported\n")) == (0, 2)


@pytest.mark.parametrize(
    ("number", "is_the_file"), [("EIO", True), ("EBADMSG", True), ("ESTALE", False), ("EMFILE", False)]
)
def test_what_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, number: str, is_the_file: bool) -> None:
    """A disk that fails at a blob is a finding; a share that has gone, or too few descriptors, say nothing of one."""
    error = OSError(getattr(errno, number), number)

    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(platform, "read_at", fail)
    if is_the_file:
        assert [finding.problem for finding in check(folder, (), now=1.0).findings] == [Problem.DAMAGED] * len(BLOBS)
    else:
        with pytest.raises(OSError, match=number):
            check(folder, (), now=1.0)


def test_progress_that_nobody_reads(
    run: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal or pipe that was closed is no fault of a blob: the work goes on."""

    def echo(text: str = "", *, err: bool = False) -> None:
        if err:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        print(text)

    monkeypatch.setattr(progress, "LINE_S", 0.0)
    monkeypatch.setattr(progress.typer, "echo", echo)
    code, output, _ = run("verify")
    assert (code, output.partition(";")[0]) == (0, "3 blobs checked, 0 things wrong")
    assert held(folder) == set(DIGESTS)


@pytest.mark.skipif(sys.platform == "win32" or platform.cores() < 2, reason="needs SIGINT and two cores")
def test_ctrl_c(folder: Path) -> None:
    """The program ends at once in the middle of a blob, says how to go on, and has remembered the others."""
    huge = folder / "private" / "blobs" / f"sha256-{'0' * 64}"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    command = [sys.executable, "-c", "from pullthrough.cli import main; main()", "verify"]
    environment = {**os.environ, "PYTHONPATH": str(ADDON), "OLLAMA_CACHE_DIR": str(folder)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (folder / JOURNAL).exists() or (folder / JOURNAL).read_text().count("\n") < 1 + len(BLOBS):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; the same command goes on from here" in errors
    huge.unlink()
    report = check(folder, (), now=time.time())
    assert (report.remembered, report.checked, report.findings) == (3, 0, [])


def test_many_findings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of however many, with names as long as they come, no request is larger than the running cache takes."""
    found = [Defect(Problem.DAMAGED, "\udcff" * 255, "a file that can be read", "x" * 4096) for _ in range(1201)]
    told: list[int] = []

    def ask(_: Path, command: str, arguments: Mapping[str, Any]) -> list[str]:
        assert command == "mend" and len(json.dumps(arguments)) < LONGEST
        told.append(len(arguments["findings"]))
        return [str(len(told))] * told[-1]

    monkeypatch.setattr(transfer, "ask", ask)
    done = transfer._mend(parse_settings({}, dir=folder, certs=folder), found)
    assert len(done) == sum(told) == 1201 and done[-1] == str(len(told))


def test_no_store(tmp_path: Path) -> None:
    """A folder that is none is not made one."""
    with pytest.raises(StoreError, match="expected an ollama-cache store"):
        check(tmp_path, (), now=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_evicted_blob_is_no_finding(folder: Path) -> None:
    """Its row says that it is not held, and there is no file."""
    with closing(Store.open(folder)) as store:
        for path in store.evict([DIGESTS[0]]):
            path.unlink()
        record = store.blob(DIGESTS[0])
        assert record is not None and not record.held
    report = check(folder, (), now=5.0)
    assert (report.checked, report.findings) == (2, [])
