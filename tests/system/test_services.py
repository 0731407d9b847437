"""The systemd unit, as systemd itself judges it; no systemd runs here that could start it."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

pytestmark = pytest.mark.long

UNIT: Final = Path(__file__).parents[2] / "scripts/services/ollama-cache.service"
EXPOSURE: Final = 1.5
"""Of 10. What is left: the network, Python's callbacks in memory, and system calls that set priorities."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit as it is installed."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs the program systemd-analyze")
    path = tmp_path / UNIT.name
    text = UNIT.read_text().replace("@PROGRAM@", str(shutil.which("true")))
    path.write_text(text.replace("@DOCS@", str(UNIT.parents[2] / "docs")))
    return path


def test_unit_is_understood(unit: Path) -> None:
    """Every line means something to systemd."""
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, [])


def test_unit_is_hardened(unit: Path) -> None:
    """The service may do little more than its work."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("needs systemd-analyze 250 or newer")
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level and float(level[1]) <= EXPOSURE, done.stdout
