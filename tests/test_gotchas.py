"""The table of traps: each has a test that exists or a reason."""

import ast
from itertools import product, starmap
from pathlib import Path

import pytest

from tests import security
from tests.gotchas import GOTCHAS

TESTS = Path(__file__).parent


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


def test_every_request_has_its_row() -> None:
    """Each model that can be here in each state, each request and caller; what is nowhere is only asked for cold."""
    kinds = product(security.MODELS, security.REQUESTS, security.STATES, security.LINES, security.CALLERS)
    assert set(security.table()) == {
        cell for cell in starmap(security.Cell, kinds) if cell.model != "unknown" or cell.state == "cold"
    }
