"""The table of traps: each has a test that exists or a reason, and the README shows the same."""

import ast
from itertools import product, starmap
from pathlib import Path

import pytest

from tests import faults, security
from tests.gotchas import GOTCHAS, markdown

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")


def test_all_of_them() -> None:
    """Thirty-eight traps, each answered."""
    assert len(GOTCHAS) == 38
    assert all(gotcha.tests or gotcha.why for gotcha in GOTCHAS)


@pytest.mark.parametrize("test", sorted({test for gotcha in GOTCHAS for test in gotcha.tests}))
def test_proof_exists(test: str) -> None:
    """No row names a test that has gone."""
    path, _, name = test.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_readme_shows_them() -> None:
    """The README's table is this one; `python -m tests.gotchas` prints it."""
    assert markdown() in README


def test_readme_shows_the_troubles() -> None:
    """And what each may cost; `python -m tests.faults` prints it."""
    assert faults.markdown() in README


def test_readme_shows_who_gets_what() -> None:
    """And what tests/security.py promises; `python -m tests.security` prints it."""
    assert security.markdown() in README


def test_every_request_has_its_row() -> None:
    """Each model that can be here in each state, each request and caller; what is nowhere is only asked for cold."""
    kinds = product(security.MODELS, security.REQUESTS, security.STATES, security.LINES, security.CALLERS)
    assert set(security.table()) == {
        cell for cell in starmap(security.Cell, kinds) if cell.model != "unknown" or cell.state == "cold"
    }
