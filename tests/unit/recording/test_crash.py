"""crash: what ingest, sealer and store make of a disk on which a daemon or a machine has died, at any write.

A `Life` is one daemon at work on one blob; `die` cuts it off at any change to the disk and leaves a `Machine`, on
which the real code is let loose again. What it then finds must be right, and be all that it had been promised.
"""

import contextlib
import hashlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.core.errors import DigestMismatch
from pullthrough.core.intervals import Intervals
from pullthrough.recording.assembly import Assembly
from pullthrough.recording.blob_writer import BlobWriter
from pullthrough.runtime import platform
from pullthrough.store import store
from pullthrough.store.ingest import Ingest
from pullthrough.store.store import Store
from tests.support.crashdisk import Change, Choose, Disk, Named, Synced, Written, cut, result, survivors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file cannot be removed while it is open")

SIZE = 16
CONTENT = bytes(range(0x41, 0x41 + SIZE))
WRONG = bytes(range(0xC1, 0xC1 + SIZE))
"""What a lying source delivers."""
DIGEST = Digest(hashlib.sha256(CONTENT).hexdigest())
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Thousands of stores are made, and a real disk would be waited for."""


@dataclass(frozen=True)
class Promise:
    """What the next daemon has to find."""

    delivered: bytes = bytes(SIZE)
    """The byte last written at each offset; zero if it must not be there."""
    marked: Intervals = field(default_factory=Intervals)
    """What has to be there after `kill -9`,"""
    flushed: Intervals = field(default_factory=Intervals)
    """and after a power loss."""


class Inline:
    """In place of Threads."""

    async def disk(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return work(*arguments, **options)

    hashing = rehashing = disk


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


# --- the daemon


@dataclass(frozen=True)
class Step:
    """What a daemon does next."""

    kind: Literal["write", "mark", "flush", "again", "finish", "discard", "disown"]
    """`flush` writes the interval while it waits for the disk; `again` goes on with a source that does not lie."""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Machine:
    """What one daemon after another has left on the disk."""

    changes: list[Change] = field(default_factory=list)
    promise: Promise = Promise()
    boot: int = 1
    knows_boots: bool = True

    def planted(self) -> "Machine":
        """Somebody has put a wrong file among the blobs."""
        file, path = 1000 + len(self.changes), f"private/blobs/{DIGEST.file_name}"
        added: list[Change] = [Named(file, None, path), Written(file, 0, WRONG), Synced(file), Synced("private/blobs")]
        return replace(self, changes=self.changes + added, promise=Promise(delivered=WRONG))


class Life:
    """One daemon: looks at what it finds, and does the steps for the one blob."""

    def __init__(self, machine: Machine, *steps: Step, lies: bool = False, sweeps: bool = False) -> None:
        self.was_hit = False
        self._machine = machine
        self._source = WRONG if lies else CONTENT
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
            self._disk: Disk[Promise] = Disk(Path(folder), machine.changes, machine.promise)
            self._disk.install(patch, str(machine.boot) if machine.knows_boots else "")
            if sweeps:
                patch.setattr(store, "KEPT_S", -3600.0)
                self._withdraw()
            run(self._run(Path(folder), steps))
            self._disk.assert_nothing_missed()
        self.changes = self._disk.changes

    def die(self, at: int, choose: Choose, *, power: bool, torn: int = 0) -> Machine:
        """What is left if only so many changes were made, and of a write after them so many bytes."""
        disk, machine = self._disk, self._machine
        promise = [*disk.promises, disk.promise][at]
        changes = cut([*machine.changes, *disk.changes], len(machine.changes) + at, choose, torn=torn)
        if power:
            changes = survivors(changes, choose)
        if power or not machine.knows_boots:
            promise = replace(promise, marked=promise.flushed)
        return replace(machine, changes=changes, promise=promise, boot=machine.boot + power)

    def _withdraw(self) -> None:
        self._disk.promise = Promise(self._disk.promise.delivered)

    async def _run(self, folder: Path, steps: Sequence[Step]) -> None:
        files = Store.open(folder)
        try:
            hit = files.open_blob(DIGEST)
            if hit is not None:
                self.was_hit = True
                assert platform.read_at(hit.descriptor, 0, SIZE + 1) == CONTENT
                hit.release()
                if Step("disown") not in steps:
                    return
                self._withdraw()
                files.disown(DIGEST)
            left = iter(steps)
            while (step := next(left, None)) is not None and files.held(DIGEST) is None:
                ingest = files.ingest(DIGEST)
                await self._record(files, ingest, itertools.chain([step], left))
                ingest.close()
        finally:
            files.close()

    def _resume(self, ingest: Ingest) -> Assembly:
        """What is reported present was delivered, or is right anyway; nothing that was promised is missing."""
        size, present = ingest.resume() or (SIZE, Intervals())
        promise = self._disk.promise
        for interval in promise.marked:
            assert present.covers(*interval), f"expected {promise.marked}, got {present}"
        if ingest.file is None:
            ingest.begin(SIZE)
            self._disk.promise = Promise()
        assert ingest.file is not None
        content = platform.read_at(ingest.file.descriptor, 0, SIZE + 1)
        assert len(content) == size == SIZE
        for offset in itertools.chain.from_iterable(itertools.starmap(range, present)):
            # A file in its stead that the power loss has brought back from quarantine is only to be verified.
            right = (promise.delivered[offset], CONTENT[offset], *([WRONG[offset]] if ingest.in_place else []))
            assert content[offset] in right, f"{present}, got {content!r}"
        return Assembly(size, present)

    async def _record(self, files: Store, ingest: Ingest, steps: Iterable[Step]) -> None:
        disk = self._disk
        assembly = self._resume(ingest)
        blob_writer = BlobWriter(files, Inline(), ingest, assembly)  # type: ignore[arg-type]

        async def write(start: int, stop: int) -> None:
            for gap in list(itertools.starmap(slice, assembly.present.missing(start, stop))):
                delivered = bytearray(disk.promise.delivered)
                delivered[gap] = self._source[gap]
                disk.promise = replace(disk.promise, delivered=bytes(delivered))
                await blob_writer.write(gap.start, memoryview(self._source)[gap])

        async def mark(start: int, stop: int) -> None:
            await blob_writer.mark(start, stop)
            marked = Intervals([*disk.promise.marked, *assembly.present.within(start, stop)])
            disk.promise = replace(disk.promise, marked=marked)

        async def flush(step: Step) -> None:
            present = assembly.present.copy()
            disk.during_sync = lambda: run(write(step.start, step.stop))
            await blob_writer.flush()
            disk.during_sync = None
            disk.promise = replace(disk.promise, marked=Intervals([*disk.promise.marked, *present]), flushed=present)

        for step in steps:
            match step.kind:
                case "write":
                    await write(step.start, step.stop)
                case "mark":
                    await mark(step.start, step.stop)
                case "flush":
                    await flush(step)
                case "again" if not ingest.in_place:  # what is only verified has no source
                    self._withdraw()
                    await blob_writer.begin_again()
                    disk.promise = Promise()
                    self._source = CONTENT
                case "finish":
                    await write(0, SIZE)
                    await mark(0, SIZE)
                    if (actual := await blob_writer.hash()) != DIGEST.hex:
                        self._withdraw()
                        self._source = CONTENT
                    with contextlib.suppress(DigestMismatch):
                        await blob_writer.seal(actual)
                        disk.promise = replace(disk.promise, flushed=Intervals([(0, SIZE)]))
                    return
                case "discard":
                    self._withdraw()
                    ingest.discard()
                    return


def assert_ends_well(machine: Machine) -> None:
    """Left alone, the daemon records what is missing, and the next one has it."""
    # What has to be put away because of a lie is recorded once more.
    for _ in range(3):
        life = Life(machine, Step("finish"))
        machine = life.die(len(life.changes), everything, power=False)
        if life.was_hit:
            break
    assert life.was_hit
    assert not any(path.startswith("ingest/") for path in result(machine.changes)[0])


# --- deaths


def nothing(high: int, change: Change | None) -> int:
    return 0


def everything(high: int, change: Change | None) -> int:
    return high


def names(high: int, change: Change | None) -> int:
    """Names and sizes, but no bytes."""
    return 0 if isinstance(change, Written) else high


def records(high: int, change: Change | None) -> int:
    """Everything but the bytes of blobs, which are shorter than any record of a journal."""
    return 0 if isinstance(change, Written) and len(change.data) <= SIZE else high


def garbage(high: int, change: Change | None) -> int:
    """Names and sizes; all bytes are garbage, those of records too."""
    return 2 if isinstance(change, Written) else high


def old_records(high: int, change: Change | None) -> int:
    """Everything but what befell the names of journals."""
    return 0 if isinstance(change, Named) and ".journal" in (change.new or change.old or "") else high


FIRST = (Step("write", 0, 4), Step("mark", 0, SIZE), Step("flush", 12, 14), Step("mark", 12, 14))
SECOND = (Step("write", 8, 12), Step("mark", 6, 10), Step("flush", 4, 6), Step("finish"))


def left(machine: Machine, *steps: Step, lies: bool = False, choose: Choose = everything) -> Machine:
    """What a daemon has left that was killed after these steps."""
    life = Life(machine, *steps, lies=lies)
    return life.die(len(life.changes), choose, power=False)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("choose", "power"),
    [
        pytest.param(everything, False, id="killed, all rows written"),
        pytest.param(nothing, False, id="killed, no row written", marks=LONG),
        pytest.param(nothing, True, id="power loss spares nothing"),
        pytest.param(everything, True, id="power loss spares everything", marks=LONG),
        pytest.param(names, True, id="power loss spares names", marks=LONG),
        pytest.param(records, True, id="power loss spares records"),
        pytest.param(garbage, True, id="power loss spares garbage", marks=LONG),
        pytest.param(old_records, True, id="power loss spares old records", marks=LONG),
    ],
)
@pytest.mark.parametrize(
    "live",
    [
        pytest.param(lambda: Life(left(Machine(), *FIRST), *SECOND), id="taking over"),
        pytest.param(lambda: Life(Machine(), *FIRST, *SECOND), id="recording", marks=LONG),
        pytest.param(
            lambda: Life(left(Machine(), *FIRST), Step("flush"), *SECOND), id="flushing what was found", marks=LONG
        ),
        pytest.param(
            lambda: Life(left(Machine(knows_boots=False), *FIRST), *SECOND), id="boots cannot be told apart", marks=LONG
        ),
        pytest.param(
            lambda: Life(Machine(), *FIRST, Step("again"), *SECOND, lies=True), id="beginning again", marks=LONG
        ),
        pytest.param(lambda: Life(Machine(), *FIRST, Step("finish"), *SECOND, lies=True), id="quarantine", marks=LONG),
        pytest.param(lambda: Life(Machine(), *FIRST, Step("discard"), *SECOND), id="discarding", marks=LONG),
        pytest.param(lambda: Life(left(Machine(), *SECOND, choose=nothing), Step("finish")), id="adoption", marks=LONG),
        pytest.param(lambda: Life(left(Machine(), *SECOND).planted(), *SECOND), id="a file in its stead", marks=LONG),
        pytest.param(
            lambda: Life(left(Machine(), *FIRST).planted(), *SECOND), id="adoption of a wrong file", marks=LONG
        ),
        pytest.param(lambda: Life(left(Machine(), *SECOND), Step("disown"), *SECOND), id="recording anew", marks=LONG),
        pytest.param(lambda: Life(left(Machine(), *FIRST), *SECOND, sweeps=True), id="sweep", marks=LONG),
    ],
)
def test_each_boundary(live: Callable[[], Life], choose: Choose, power: bool) -> None:
    """Between two changes or inside a write a daemon may die: the next finds what is right, and what was promised."""
    life = live()
    machines = [life.die(at, choose, power=power, torn=3) for at in range(len(life.changes) + 1)]
    for machine in {repr(machine): machine for machine in machines}.values():
        assert_ends_well(machine)


lives = st.fixed_dictionaries(
    {
        "steps": st.lists(
            st.builds(
                lambda kind, start, size: Step(kind, start, min(start + size, SIZE)),
                st.sampled_from(["write", "mark", "flush", "again", "finish", "discard", "disown"]),
                st.integers(0, SIZE - 1),
                st.integers(1, SIZE),
            ),
            max_size=8,
        ),
        "lies": st.booleans(),
        "sweeps": st.sampled_from([False, False, True]),
        "planted": st.sampled_from([False, False, True]),
        "power": st.booleans(),
        "cut": st.integers(0, 60),
        "torn": st.integers(0, 60),
    }
)


def assert_any_deaths_end_well(histories: list[dict[str, Any]], knows_boots: bool, data: st.DataObject) -> None:
    machine = Machine(knows_boots=knows_boots)
    for drawn in histories:
        if drawn["planted"]:
            machine = machine.planted()
        life = Life(machine, *drawn["steps"], lies=drawn["lies"], sweeps=drawn["sweeps"])
        machine = life.die(
            min(drawn["cut"], len(life.changes)),
            lambda high, _: data.draw(st.integers(0, high)),
            power=drawn["power"],
            torn=drawn["torn"],
        )
    assert_ends_well(machine)


@settings(max_examples=30)
@given(histories=st.lists(lives, min_size=1, max_size=4), knows_boots=st.booleans(), data=st.data())
def test_a_few_deaths(histories: list[dict[str, Any]], knows_boots: bool, data: st.DataObject) -> None:
    """Whatever is recorded, however often and wherever daemon or machine die, and whatever of it the medium keeps."""
    assert_any_deaths_end_well(histories, knows_boots, data)


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=600)
@given(histories=st.lists(lives, min_size=1, max_size=4), knows_boots=st.booleans(), data=st.data())
def test_many_deaths(histories: list[dict[str, Any]], knows_boots: bool, data: st.DataObject) -> None:
    """The same, more often."""
    assert_any_deaths_end_well(histories, knows_boots, data)
