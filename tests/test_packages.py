"""The packages hold: what the import contracts of pyproject.toml cannot say. `lint-imports` checks those."""

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
ADDON: Final = ROOT / "addon"
PACKAGE: Final = ADDON / "pullthrough"

LONGEST: Final = 400  # lines; past that a module has two jobs
MOST: Final = 16  # modules; past that a package has two

# Path is a value in pure modules: what it can do to a disk is forbidden by name, but for `replace`, which str has too.
OUTSIDE_CALLS: Final = {
    *("now", "today", "utcnow"),
    *("open", "read_bytes", "read_text", "touch", "write_bytes", "write_text"),
    *("cwd", "exists", "glob", "home", "is_dir", "is_file", "iterdir", "lstat", "resolve", "rglob", "stat"),
    *("mkdir", "rmdir", "unlink"),
}


def contracts() -> list[dict[str, object]]:
    """Those of import-linter."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[dict[str, object]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return found


@functools.cache
def pure() -> frozenset[str]:
    """The modules and packages that know no world outside, by their contract."""
    (found,) = (each["source_modules"] for each in contracts() if str(each["name"]).startswith("Values and policy"))
    assert isinstance(found, list)
    return frozenset(found)


def name_of(path: Path) -> str:
    """The dotted name of a module, or of a package by its `__init__`."""
    return ".".join(path.relative_to(ADDON).with_suffix("").parts).removesuffix(".__init__")


def is_pure(module: str) -> bool:
    return not pure().isdisjoint({module, module.rpartition(".")[0]})


def called_name(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def faults(module: str, source: str) -> Iterator[str]:
    """What a module does against the rules that no contract holds, one line each."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield f"{module}: expected a module docstring, got none"
    if (lines := len(source.splitlines())) > LONGEST:
        yield f"{module}: expected at most {LONGEST} lines, got {lines}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            yield f"{module}:{node.lineno}: expected an absolute import, got another one"
        elif isinstance(node, ast.Call) and is_pure(module) and called_name(node) in OUTSIDE_CALLS:
            yield f"{module}:{node.lineno}: a pure module may not call {called_name(node)}()"


PATHS: Final = sorted(PACKAGE.rglob("*.py"))
MODULES: Final = {name_of(path): path for path in PATHS}


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_its_job(module: str) -> None:
    """Every module has a docstring and a bearable length, and what is pure asks nobody outside."""
    assert list(faults(module, MODULES[module].read_text(encoding="utf-8"))) == []


def test_the_package_was_found() -> None:
    """The check above is not passing for want of modules, nor its contract for want of names."""
    assert {"pullthrough.addon", "pullthrough.core.errors", "pullthrough.store.store"} <= set(MODULES)
    assert pure() <= set(MODULES)


def test_packages_are_small_and_listed() -> None:
    """No package has more than MOST modules, and the first docstring that one reads names each."""
    picture = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    rooms = {path.parent for path in PATHS if path.parent != PACKAGE}
    for room in rooms:
        count = len([path for path in room.glob("*.py") if path.stem != "__init__"])
        assert 1 <= count <= MOST, f"{room.name}: expected at most {MOST} modules, got {count}"
        assert f"\n    {room.name} " in f"\n{picture}", f"{room.name}: expected a line in the package's docstring"


def test_nothing_else_lives_in_addon() -> None:
    """`addon/` is the first entry of sys.path: any other file there could shadow somebody's module."""
    names = {path.name for path in ADDON.iterdir() if not path.name.startswith(".")}
    assert names - {"__pycache__"} == {"ollama_cache.py", "pullthrough"}


def test_script_imports_the_addon_alone() -> None:
    """The script that mitmdump loads names the addon and nothing else; relative imports would fail there."""
    tree = ast.parse((ADDON / "ollama_cache.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["from pullthrough.addon import OllamaCache"]


@pytest.mark.parametrize(
    ("module", "body", "expected"),
    [
        ("pullthrough.config.settings", "x = open('y')", "2: a pure module may not call open()"),
        ("pullthrough.config.settings", "x = path.open()", "2: a pure module may not call open()"),
        ("pullthrough.core.capability", "x = datetime.now(UTC)", "2: a pure module may not call now()"),
        ("pullthrough.store.store", "from __future__ import annotations", "2: expected an absolute import"),
        ("pullthrough.store.store", "from . import index", "2: expected an absolute import"),
    ],
)
def test_fault_is_caught(module: str, body: str, expected: str) -> None:
    """The checker sees each kind of breach."""
    (found,) = faults(module, f'"""A job."""\n{body}\n')
    assert expected in found


def test_missing_docstring_and_length_are_caught() -> None:
    """A bare and endless module fails."""
    assert list(faults("novelty", "x = 1\n" * 401)) == [
        "novelty: expected a module docstring, got none",
        "novelty: expected at most 400 lines, got 401",
    ]


def test_what_is_not_pure_may_ask() -> None:
    """The world is open above the pure modules."""
    assert list(faults("pullthrough.upstream.client", '"""A job."""\nx = open("y")\n')) == []
