"""The table of traps: each has a test that exists or a reason, and the README shows the same."""

import ast
from pathlib import Path

import pytest

from tests import faults
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
