"""eviction: what the start says of a disk on which nothing can be recorded. tests/e2e/test_disk.py has the evicting."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pullthrough.library.eviction import room_problem


@pytest.mark.parametrize(
    ("min_free", "problem"),
    [
        (40, ""),
        (41, "little will be recorded: 40 B of the disk of .* is free, and min_free keeps 41 B"),
        (99, "little will be recorded"),
        (100, "nothing will be recorded: min_free keeps 100 B, and the whole disk of .* has 100 B"),
    ],
)
def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_free: int, problem: str) -> None:
    """Each bound has its words, and what to set instead."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100, free=40))
    said = room_problem(tmp_path, min_free)
    assert re.match(problem, said) and bool(said) is bool(problem)
    assert not said or "min_free" in said.partition(";")[2]
