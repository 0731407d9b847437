"""The benchmark measures, and writes its page of the documentation."""

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
PAGE: Final = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_quick_run(tmp_path: Path) -> None:
    """One row in its smoke form: a table on stdout, JSON beside it, and a page made from that JSON."""
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
        report.page(PAGE, document)
    document["quick"] = False
    made = report.page(PAGE, document)
    assert report.figures_block(document) in made and report.page(made, document) == made
    assert made.partition("<!--")[0] == PAGE.partition("<!--")[0]
