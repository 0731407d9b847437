"""The benchmark measures and tells; the README says of its rows what they say of themselves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.bench import report

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_lists_the_rows() -> None:
    """What each row does, and what limits it, is in the README as in the code."""
    assert report.with_block(README, "rows", report.rows_block()) == README


@pytest.mark.long
def test_quick_run(tmp_path: Path) -> None:
    """One row in its smoke form: a table on stdout, JSON beside it, and a README made from that JSON."""
    if sys.platform != "linux" or shutil.which("nginx") is None:
        pytest.skip("needs Linux and nginx on PATH")
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench.py", "--quick", "--json", file, "hit"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'addon'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert "hit" in done.stdout and list(document["rows"]) == ["hit"]
    for figure in document["rows"]["hit"]["figures"]:
        assert list(figure["sides"]) == ["the cache", "stock mitmdump", "nginx"]
        assert all(sample["MB/s"] > 0 and sample["peak RSS MiB"] > 0 for sample in figure["sides"].values())
        assert list(figure["ratios"]) == ["stock mitmdump", "nginx"]
    with pytest.raises(ValueError, match="full run"):
        report.readme(README, document)
    document["quick"] = False
    made = report.readme(README, document)
    assert report.figures_block(document) in made and report.readme(made, document) == made
    assert made.partition("## How fast")[0] == README.partition("## How fast")[0]
