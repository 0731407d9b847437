"""The archives hold what runs and nothing else; no file of the project holds a key or one machine's paths."""

import ast
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "addon" / "pullthrough"

# A header alone is no key: code that writes or reads keys may quote it. Base64 must follow, be it across the
# quotes and escapes of a source file.
PRIVATE_KEY: Final = re.compile(
    rb"BEGIN[A-Z0-9 ]*PRIVATE KEY-----(?:[\s\"'+\\,()nr]|[A-Za-z-]{4,20}: [^\n]*\n)*[A-Za-z0-9+/]{40,}"
)
# The bracketed letters keep the patterns from finding themselves.
PACKAGE_INDEX: Final = re.compile(
    rb"[p]ypi\.|[p]ythonhosted|[i]ndex-url|[f]ind-links|[t]rusted-host|[a]rtifactory|[d]evpi", re.IGNORECASE
)
HOME: Final = re.compile(rb"/(?:[h]ome|[U]sers)/[A-Za-z0-9]|(?<![\w.])/[r]oot/|C:\\+[U]sers\\+[A-Za-z0-9]")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def found_in(pattern: re.Pattern[bytes], files: Iterable[tuple[str, bytes]]) -> list[str]:
    return [f"{name}: {match[0][:40]!r}" for name, content in files for match in pattern.finditer(content)]


def project_files() -> list[Path]:
    """What git tracks or would add, relative to the checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in listing.split("\0") if (ROOT / name).is_file()]


def project_contents() -> Iterator[tuple[str, bytes]]:
    for path in project_files():
        yield path.as_posix(), (ROOT / path).read_bytes()


def planted_key() -> bytes:
    """Something with the look of a key, made up on the spot."""
    body = base64.encodebytes(os.urandom(138)).replace(b"/", b"A")
    return b"-----BEGIN " + b"PRIVATE KEY-----\n" + body + b"-----END PRIVATE KEY-----\n"


def members(archive: Path) -> dict[str, bytes]:
    """The files of a wheel or an sdist by name; an sdist's top folder is taken off."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        content = {}
        for member in sdist.getmembers():
            if file := sdist.extractfile(member):  # a folder has none
                content[member.name.partition("/")[2]] = file.read()
        return content


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which a machine has left its keys and caches."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in project_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    for name in (
        ".venv/lib/secret.py",
        "addon/.mypy_cache/secret.json",
        "addon/pullthrough/.ruff_cache/secret",
        "addon/pullthrough/__pycache__/secret.cpython-313.pyc",
        "addon/pullthrough/secret.pem",
        "certs/ollama-cache-ca-key.pem",
        "certs/ollama-cache-ca-cert.cer",
        "certs/secret",
        "secret.txt",
        "tests/secret.key",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(planted_key())
    return copy


@pytest.fixture(scope="module")
def archives(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, by suffix."""
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    return {path.suffix: path for path in out.iterdir()}


def test_wheel_holds_the_script_and_the_package(archives: dict[str, Path]) -> None:
    """The wheel holds `ollama_cache.py` and `pullthrough`, typed, with one command, and nothing else."""
    content = members(archives[".whl"])
    code = {name for name in content if ".dist-info/" not in name}
    assert code == {
        "ollama_cache.py",
        "pullthrough/py.typed",
        *(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")),
        *(f"pullthrough/pki/connect/{path.name}" for path in (PACKAGE / "pki" / "connect").iterdir()),
        *(f"pullthrough/doctor/client/{path.name}" for path in (PACKAGE / "doctor" / "client").iterdir()),
        *(f"pullthrough/monitoring/share/{path.name}" for path in (PACKAGE / "monitoring" / "share").iterdir()),
        *(f"pullthrough/services/{name}" for name in ("install", "ollama-cache.service", "ollama-cache.plist")),
        *(f"pullthrough/docs/{path.name}" for path in (ROOT / "docs").iterdir()),
    }
    (entry_points,) = (content[name] for name in content if name.endswith("entry_points.txt"))
    assert entry_points.decode().split() == ["[console_scripts]", "ollama-cache", "=", "pullthrough.cli:main"]


def test_sdist_holds_sources_and_tests(archives: dict[str, Path]) -> None:
    """The sdist holds the tracked files, made of the named places only."""
    names = set(members(archives[".gz"]))
    assert {
        "addon/ollama_cache.py",
        "addon/pullthrough/py.typed",
        "CONTRIBUTING.md",
        "certs/README.md",
        "docs/README.md",
        "docs/status-light.png",
        "pyproject.toml",
        "scripts/constraints.txt",
        "scripts/setup",
        "tests/test_packaging.py",
    } <= names
    assert names - {path.as_posix() for path in project_files()} == {"PKG-INFO"}


@pytest.mark.parametrize("suffix", [".whl", ".gz"], ids=["wheel", "sdist"])
def test_archive_holds_no_key(archives: dict[str, Path], suffix: str) -> None:
    """The keys that lie in the checkout stay there."""
    content = members(archives[suffix])
    assert found_in(PRIVATE_KEY, content.items()) == []
    assert [name for name in content if "secret" in name or name.endswith((".pem", ".key", ".cer"))] == []


def test_project_holds_no_key() -> None:
    """No file that git has or would take holds a private key."""
    assert found_in(PRIVATE_KEY, project_contents()) == []


def test_ignored_keys_are_ignored() -> None:
    """Of `certs/` git takes the two files that belong to the project, whatever is generated there."""
    assert {path.as_posix() for path in project_files() if path.parts[0] == "certs"} == {
        "certs/.gitignore",
        "certs/README.md",
    }


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda key: key, id="pem"),
        pytest.param(lambda key: b"x = '" + key.replace(b"\n", b"\\n") + b"'", id="escaped"),
        pytest.param(lambda key: b"".join(b'    "' + line + b'\\n"\n' for line in key.splitlines()), id="quoted"),
        pytest.param(lambda key: key.replace(b"BEGIN ", b"BEGIN OPENSSH "), id="openssh"),
        pytest.param(
            lambda key: key.replace(b"KEY-----\n", b"KEY-----\r\nProc-Type: 4,ENCRYPTED\n\n", 1), id="headers"
        ),
    ],
)
def test_planted_key_is_found(checkout: Path, wrap: object) -> None:
    """The search finds a key in a copy of the project, in each form that a key takes in a file."""
    assert callable(wrap)
    (checkout / "notes.txt").write_bytes(b"before\n" + wrap(planted_key()) + b"after\n")
    files = [(path.name, path.read_bytes()) for path in checkout.iterdir() if path.is_file()]
    assert {finding.partition(":")[0] for finding in found_in(PRIVATE_KEY, files)} == {
        "notes.txt",
        "secret.txt",
    }


def test_key_header_alone_is_no_finding() -> None:
    """Code may name the header."""
    quote = b"assert pem.startswith(b'-----BEGIN " + b"PRIVATE KEY-----') and len(pem) > 100\n"
    assert found_in(PRIVATE_KEY, [("test.py", quote)]) == []


def test_project_names_no_package_index() -> None:
    """Where packages come from is each machine's own configuration."""
    assert found_in(PACKAGE_INDEX, project_contents()) == []


def test_project_names_no_home() -> None:
    """No path of the machine on which a file was written is in it."""
    here = re.compile(re.escape(str(ROOT)).encode())
    assert found_in(HOME, project_contents()) + found_in(here, project_contents()) == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        pytest.param(PACKAGE_INDEX, "--extra-" + "index" + "-url x", id="option"),
        pytest.param(PACKAGE_INDEX, "https://py" + "pi.org/simple", id="host"),
        pytest.param(HOME, "cd /ho" + "me/someone/src", id="home"),
        pytest.param(HOME, "cd /ro" + "ot/src", id="root"),
        pytest.param(HOME, "/Us" + "ers/someone", id="macos"),
        pytest.param(HOME, "C:\\Us" + "ers\\someone", id="windows"),
    ],
)
def test_planted_place_is_found(pattern: re.Pattern[bytes], text: str) -> None:
    """The two searches find what they are for."""
    assert len(found_in(pattern, [("file", text.encode())])) == 1


def test_constraints_are_plain() -> None:
    """The constraints are pins and nothing more, and cover what pyproject.toml names."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert len(pinned) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert {requirement_name(requirement) for requirement in wanted} - pinned == set()


def test_hashes_agree_with_the_constraints() -> None:
    """What runs, and what builds it, is installed by hash: the pins are the same, and each has hashes."""
    pins = set((ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").lower().splitlines())
    text = (ROOT / "scripts" / "hashes.txt").read_text(encoding="utf-8").replace(" \\\n", " ")
    hashed = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(\S+==\S+)(?: ; [^-]+?)?((?: +--hash=sha256:[0-9a-f]{64})+)", line)
        assert match is not None, line[:100]
        name, _, version = match[1].partition("==")
        hashed[normal(name)] = version
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in pins)}
    # Packages of other systems are pinned there alone.
    assert {name: version for name, version in hashed.items() if pinned.get(name, version) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {requirement_name(text) for text in project["dependencies"]} | {"hatchling"} <= hashed.keys()
    # With --require-hashes pip refuses whatever is not there.
    needed = itertools.chain(*(found.requires or () for found in distributions() if normal(found.name) in hashed))
    assert {requirement_name(text) for text in needed if ";" not in text} - hashed.keys() == set()


def test_constraints_agree_with_the_project() -> None:
    """Each pin is within the bounds of pyproject.toml, and of every package that is pinned beside it."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert outside(wanted, pins) == []
    installed = {
        normal(found.name): found for found in distributions() if found.version == pins.get(normal(found.name))
    }
    assert outside([text for found in installed.values() for text in found.requires or []], pins) == []


def test_a_pin_outside_the_bounds_is_found() -> None:
    """The comparison sees a pin that is too old, one that is too new, and one that another system alone needs."""
    wanted = ["a>=1.2.3,<2", "b>=1", "c>=3; sys_platform == 'nowhere'"]
    assert outside(wanted, {"a": "1.2.0", "b": "1.0", "c": "2"}) == ["a>=1.2.3,<2: 1.2.0"]
    assert outside(wanted, {"a": "2.0", "b": "0.9", "c": "2"}) == ["a>=1.2.3,<2: 2.0", "b>=1: 0.9"]


def outside(wanted: Iterable[str], pins: Mapping[str, str]) -> list[str]:
    """The requirements that their pins do not satisfy."""
    found = []
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(normal(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if version is not None and applies and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{text}: {version}")
    return found


def test_imports_are_declared() -> None:
    """What the package imports, pyproject.toml names; nothing is there only because another brought it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]["object-store"]
    declared = {requirement_name(requirement) for requirement in [*project["dependencies"], *optional]}
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"pullthrough"}
    distributions = packages_distributions()
    missing = {name for name in foreign if not declared & {normal(of) for of in distributions.get(name, [])}}
    assert missing == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def test_installed_wheel_runs_its_command(archives: dict[str, Path], tmp_path: Path) -> None:
    """`ollama-cache --help` runs from the installed wheel, with no checkout in sight."""
    environment = tmp_path / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")
    python = binaries / "python"
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # The dependencies are borrowed from here. A .pth file in a borrowed folder is not followed, so the
    # editable checkout stays out.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(asked.stdout.strip()) / "borrowed.pth").write_text("\n".join(sorted(borrowed)), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python)
    installed = run(*pip, "install", "--no-deps", "--no-index", archives[".whl"], cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr

    where = run(python, "-c", "import pullthrough; print(pullthrough.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(environment.resolve()), where.stderr
    helped = run(binaries / "ollama-cache", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "ca" in helped.stdout.split()
    if sys.platform == "linux":
        check_service(binaries, Path(where.stdout.strip()).parent, tmp_path)


def check_service(binaries: Path, package: Path, folder: Path) -> None:
    """`service install` and `uninstall` work from the wheel; a Python in a home folder is refused."""
    environment = {"PATH": os.environ["PATH"], "DESTDIR": str(folder), "HOME": str(folder)}

    def service(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)

    unit = folder / "etc/systemd/system/ollama-cache.service"
    done = service(binaries / "ollama-cache", "service", "install", "--json")
    if found_in(HOME, [("python", sys.base_prefix.encode() + b"/")]):
        assert done.returncode == 1 and "expected a Python that the service may see" in done.stderr
        (folder / "bin").mkdir()
        program = folder / "bin/ollama-cache"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        done = service("sh", package / "services/install", program)
    assert done.returncode == 0, done.stderr
    assert f"\nDocumentation=file:{package}/docs/operate.md" in unit.read_text()
    done = service(binaries / "ollama-cache", "service", "uninstall", "--json")
    assert json.loads(done.stdout) == {"removed": ["/etc/systemd/system/ollama-cache.service"]}
    assert not unit.exists()
