"""The scripts find a Python in odd places, say plainly when there is none, and set up once."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for POSIX shells")

ROOT: Final = Path(__file__).parents[1]
SCRIPTS: Final = ROOT / "scripts"
TOOLS: Final = (
    *("cat", "cksum", "dirname", "env", "flock", "grep", "id", "ls", "mkdir", "mv", "readlink", "rm"),
    *("sh", "sleep", "sort", "tail", "timeout", "tr"),
)
BASE: Final = str(getattr(sys, "_base_executable", sys.executable))


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def link(path: Path, target: str | Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


# What a Python 3.11 answers to the question of find-python: its version, on stderr, and no.
OLD: Final = "#!/bin/sh\necho 'cpython 3.11.2' >&2\nexit 1\n"


class Machine:
    """A PATH with the basic tools and no Python, an empty home, and nothing of the real machine's places."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        for tool in TOOLS:
            if found := shutil.which(tool):
                link(self.bin / tool, found)
        self.environment = {"PATH": str(self.bin), "HOME": str(self.home), "FIND_PYTHON_PLACES": ""}
        # The home directory of the account is looked at as well: this machine's account has an empty one.
        (self.bin / "id").unlink(missing_ok=True)
        executable(self.bin / "id", "#!/bin/sh\necho nobody-of-this-name\n")

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def find_python(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(SCRIPTS / "find-python", **environment)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def same_python(answer: str) -> bool:
    return Path(answer.strip()).resolve() == Path(BASE).resolve()


def test_nothing_found_says_what_is_missing(machine: Machine) -> None:
    """Without any Python the message names the version needed and ways to get it, and the status is 1."""
    result = machine.find_python()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("ollama-cache needs Python >= 3.12")
    assert "pyenv install 3.13" in result.stderr
    assert "PYTHON=" in result.stderr


def test_too_old_python_is_named(machine: Machine) -> None:
    """A python3 that is too old is refused, and the message says which and why."""
    old = executable(machine.bin / "python3", OLD)
    result = machine.find_python()
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{old}: cpython 3.11.2" in result.stderr


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(OLD, id="old"),
        pytest.param("#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n", id="pyenv-shim"),
        pytest.param("#!/bin/sh\necho \"No module named 'ensurepip'\" >&2\nexit 1\n", id="no-ensurepip"),
        pytest.param("#!/nowhere/python\n", id="interpreter-gone"),
        pytest.param("#!/bin/sh\nexit 0\n", id="says-nothing"),
        pytest.param("#!/bin/sh\necho lies\n", id="names-no-file"),
    ],
)
def test_broken_candidate_is_passed_over(machine: Machine, broken: str) -> None:
    """A candidate counts by what it does, not by its name."""
    executable(machine.bin / "python3.13", broken)
    link(machine.bin / "python3", BASE)
    result = machine.find_python()
    assert same_python(result.stdout), result.stderr
    assert result.returncode == 0


def test_hanging_candidate_is_given_up(machine: Machine) -> None:
    """A candidate that never answers costs its time limit and no more."""
    if shutil.which("timeout") is None:
        pytest.skip("needs the timeout command")
    script = (SCRIPTS / "find-python").read_text(encoding="utf-8")
    assert "\nseconds=10 " in script
    quick = executable(machine.folder / "find-python", script.replace("\nseconds=10 ", "\nseconds=1 "))
    executable(machine.bin / "python3.13", "#!/bin/sh\nsleep 50\n")
    link(machine.bin / "python3", BASE)
    started = time.monotonic()
    result = machine.run(quick)
    assert same_python(result.stdout), result.stderr
    assert time.monotonic() - started < 10


def test_asked_for_python_goes_first(machine: Machine) -> None:
    """PYTHON names the interpreter, also where others are on PATH; an unusable one is passed over."""
    executable(machine.bin / "python3", OLD)
    chosen = link(machine.folder / "elsewhere" / "my-python", BASE)
    assert same_python(machine.find_python(PYTHON=str(chosen)).stdout)
    link(machine.bin / "python3.12", BASE)
    assert same_python(machine.find_python(PYTHON=str(machine.bin / "python3")).stdout)


@pytest.mark.parametrize("told_by", ["PYENV_ROOT", "HOME", "PATH", "symlink"])
def test_pyenv_folder_is_searched(machine: Machine, told_by: str) -> None:
    """Where python3 is 3.11, a newer Python of pyenv is found, whatever tells where pyenv keeps it."""
    executable(machine.bin / "python3", OLD)
    root = machine.home / ".pyenv" if told_by == "HOME" else machine.folder / "opt" / "py env"
    executable(root / "versions" / "3.11.7" / "bin" / "python", OLD)
    link(root / "versions" / "3.12.1" / "bin" / "python", BASE)
    pyenv = executable(root / "bin" / "pyenv", "#!/bin/sh\nexit 1\n")
    environment = {}
    if told_by == "PYENV_ROOT":
        environment = {"PYENV_ROOT": str(root)}
    elif told_by == "PATH":
        environment = {"PATH": f"{machine.bin}:{pyenv.parent}"}
    elif told_by == "symlink":
        link(machine.bin / "pyenv", pyenv)
    result = machine.find_python(**environment)
    assert same_python(result.stdout), result.stderr


def test_newest_patch_release_of_pyenv_goes_first(machine: Machine) -> None:
    """3.13.10 is newer than 3.13.9, and a release that cannot run gives way to the next."""
    versions = machine.home / ".pyenv" / "versions"
    order = machine.folder / "order"
    for version in ("3.12.9", "3.13.9", "3.13.10", "3.13.2", "3.9.20"):
        executable(versions / version / "bin" / "python", f"#!/bin/sh\necho {version} >>'{order}'\nexit 1\n")
    assert machine.find_python().returncode == 1
    assert order.read_text().split() == ["3.13.10", "3.13.9", "3.13.2", "3.12.9"]


def test_uv_is_asked(machine: Machine) -> None:
    """A Python that uv keeps is found, and uv is told not to fetch one."""
    executable(
        machine.bin / "uv",
        f'#!/bin/sh\n[ "$UV_PYTHON_DOWNLOADS $*" = "never python find --system >=3.12" ] && echo {shlex.quote(BASE)}\n',
    )
    assert same_python(machine.find_python().stdout)


def test_common_places_are_searched(machine: Machine) -> None:
    """Folders outside PATH are looked into last, patterns included."""
    link(machine.folder / "opt" / "python3.x" / "bin" / "python3.12", BASE)
    result = machine.find_python(FIND_PYTHON_PLACES=f"/nowhere:{machine.folder}/opt/python*/bin")
    assert same_python(result.stdout), result.stderr


def test_virtual_environment_is_looked_through(machine: Machine) -> None:
    """Of a Python inside a virtual environment its base is printed: the environment may be remade."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("not in a virtual environment")
    result = machine.find_python(PYTHON=sys.executable)
    assert same_python(result.stdout)
    assert not Path(result.stdout).is_relative_to(sys.prefix)


# A Python for scripts/setup: answers questions as this one does, but only notes what it is told to make or
# install. A copy of itself becomes the environment's interpreter.
STUB: Final = """#!/bin/sh
case "$*" in
    '-m venv '*)
        echo venv >>{log}
        mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
    '-m pip --version') ;;
    '-m pip '*)
        echo "pip ${{*##* }}" >>{log}
        [ -e {pause} ] && sleep 1
        if [ -e {offline} ]; then echo 'no route to anywhere' >&2; exit 1; fi ;;
    *ensurepip*) echo "$0" ;;
    *) exec {python} "$@" ;;
esac
"""


class Checkout:
    """A checkout with the real scripts, and a Python that only notes what it is asked to do."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.folder = machine.folder / "a checkout"
        self.log = machine.folder / "log"
        self.offline = machine.folder / "offline"
        self.pause = machine.folder / "pause"
        for name in ("setup", "find-python", "run", "test", "make-ca", "constraints.txt", "hashes.txt"):
            (self.folder / "scripts").mkdir(parents=True, exist_ok=True)
            shutil.copy(SCRIPTS / name, self.folder / "scripts" / name)
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        link(machine.bin / "chmod", shutil.which("chmod") or "/bin/chmod")
        quoted = {key: shlex.quote(str(getattr(self, key))) for key in ("log", "offline", "pause")}
        executable(machine.bin / "python3.13", STUB.format(python=shlex.quote(sys.executable), **quoted))

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run(self.folder / "scripts" / "setup", *arguments, **environment)

    def done(self) -> list[str]:
        """What was made and installed since the last call."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(machine: Machine) -> Checkout:
    return Checkout(machine)


def test_setup_is_done_once(checkout: Checkout) -> None:
    """The first setup makes and installs; the second finds all in place, at once and in silence."""
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert checkout.done() == ["venv", "pip scripts/hashes.txt", "pip ."]
    started = time.monotonic()
    second = checkout.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert checkout.done() == []
    assert time.monotonic() - started < 2  # a loaded machine; 0.1 s otherwise


def test_setup_adds_extras(checkout: Checkout) -> None:
    """Extras come on top of what is there, and fewer of them need nothing."""
    checkout.setup("test")
    assert checkout.done()[-1] == "pip .[test]"
    checkout.setup("test,dev")
    assert checkout.done() == ["pip scripts/hashes.txt", "pip .[dev,test]"]
    for extras in ("", "test", "dev", "dev,test"):
        checkout.setup(extras)
    assert checkout.done() == []


def test_setup_follows_a_changed_project(checkout: Checkout) -> None:
    """A changed pyproject.toml is installed again, into the same environment."""
    checkout.setup("test")
    checkout.done()
    with (checkout.folder / "pyproject.toml").open("a") as project:
        project.write("\n# changed\n")
    checkout.setup()
    assert checkout.done() == ["pip scripts/hashes.txt", "pip ."]
    checkout.setup("test")
    assert checkout.done() == ["pip scripts/hashes.txt", "pip .[test]"]


def test_setup_follows_a_moved_checkout(checkout: Checkout) -> None:
    """An environment that came along with a moved checkout would run the code of the old place."""
    checkout.setup()
    checkout.done()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    checkout.setup()
    assert checkout.done()[-1] == "pip ."


def test_setup_remakes_a_broken_environment(checkout: Checkout) -> None:
    """An interpreter that no longer runs is replaced with its environment."""
    checkout.setup()
    checkout.done()
    python = checkout.folder / ".venv" / "bin" / "python"
    python.unlink()
    link(python, "/nowhere/python3.13")
    assert checkout.setup().returncode == 0
    assert checkout.done() == ["venv", "pip scripts/hashes.txt", "pip ."]


def test_failed_install_is_told_and_tried_again(checkout: Checkout) -> None:
    """When pip fails its words are shown, ours say what to do, and the next call goes on."""
    checkout.offline.touch()
    failed = checkout.setup()
    assert failed.returncode == 1
    assert "no route to anywhere" in failed.stderr
    assert "pip could not install" in failed.stderr
    checkout.done()
    checkout.offline.unlink()
    assert checkout.setup().returncode == 0
    assert checkout.done() == ["pip scripts/hashes.txt", "pip ."]


def test_no_python_is_told_by_setup(checkout: Checkout) -> None:
    """Without a Python the message is that of find-python, and nothing is made."""
    (checkout.machine.bin / "python3.13").unlink()
    result = checkout.setup()
    assert result.returncode == 1
    assert result.stderr.startswith("ollama-cache needs Python >= 3.12")
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.parametrize("lock", ["flock", "mkdir"])
def test_two_setups_at_once_install_once(checkout: Checkout, lock: str) -> None:
    """Of setups that start together one works and the others wait for it."""
    if lock == "mkdir":
        (checkout.machine.bin / "flock").unlink(missing_ok=True)
    elif not (checkout.machine.bin / "flock").exists():
        pytest.skip("needs the flock command")
    checkout.pause.touch()
    command = [str(checkout.folder / "scripts" / "setup")]
    started = [
        subprocess.Popen(command, env=checkout.machine.environment, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    assert [status for _, status in outcomes] == [0, 0, 0], outcomes
    assert checkout.done() == ["venv", "pip scripts/hashes.txt", "pip ."]
    assert not (checkout.folder / ".venv.lock.d").exists()


def test_lock_of_a_dead_setup_is_taken_over(checkout: Checkout) -> None:
    """A setup that was killed while it held the lock does not stop the next one."""
    (checkout.machine.bin / "flock").unlink(missing_ok=True)
    with subprocess.Popen(["true"]) as gone:
        pass
    lock = checkout.folder / ".venv.lock.d"
    lock.mkdir()
    (lock / "pid").write_text(f"{gone.pid}\n")
    assert checkout.setup().returncode == 0
    assert not lock.exists()


@pytest.mark.parametrize(
    ("script", "program", "arguments", "expected"),
    [
        pytest.param("run", "ollama-cache", ["--set", "a=b c"], ["run", "--set", "a=b c"], id="run"),
        pytest.param("make-ca", "ollama-cache", ["renew"], ["ca", "renew"], id="make-ca"),
    ],
)
def test_script_starts_its_program(
    checkout: Checkout, script: str, program: str, arguments: list[str], expected: list[str]
) -> None:
    """From any folder and through a symlink, a script sets up and becomes its program, arguments as given."""
    checkout.setup()
    executable(checkout.folder / ".venv" / "bin" / program, '#!/bin/sh\nfor a do echo "$a"; done\nexit 7\n')
    through = link(checkout.machine.folder / "elsewhere" / "shortcut", Path("..") / "a checkout" / "scripts" / script)
    result = checkout.machine.run(through, *arguments)
    assert result.stdout.splitlines() == [part.format(root=checkout.folder.resolve()) for part in expected]
    assert result.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "marks", "rest"),
    [
        pytest.param([], "not long", "", id="quick"),
        pytest.param(["--long"], "", "", id="long"),
        pytest.param(["-k", "a b", "--long"], "", "-k a b", id="long-among-others"),
    ],
)
def test_test_script_selects(checkout: Checkout, arguments: list[str], marks: str, rest: str) -> None:
    """`scripts/test` leaves the long tests out unless asked, and hands on the rest and pytest's status."""
    checkout.setup("test")
    python = checkout.folder / ".venv" / "bin" / "python"
    real = python.read_text(encoding="utf-8")
    answer = """case "$1 $2" in '-m pytest') shift 2; echo "[$2]"; shift 2; echo "[$*]"; exit 5 ;; esac\n"""
    python.write_text(real.replace("#!/bin/sh\n", f"#!/bin/sh\n{answer}"), encoding="utf-8")
    result = checkout.machine.run(checkout.folder / "scripts" / "test", *arguments)
    parallel = "--numprocesses auto --maxprocesses 4 --dist worksteal"
    assert result.stdout.splitlines() == [f"[{marks}]", f"[{f'{parallel} {rest}'.strip()}]"]
    assert result.returncode == 5


@pytest.mark.parametrize("name", ["bench", "find-python", "make-ca", "run", "setup", "test"])
def test_script_is_executable_shell(name: str) -> None:
    """Each script may be run as it is, and its shell can parse it."""
    script = SCRIPTS / name
    assert os.access(script, os.X_OK)
    assert script.read_bytes().startswith(b"#!/bin/sh\n")
    checked = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
