"""How the command line of this installation is called."""

import shutil
import sys
from pathlib import Path


def own_program() -> str:
    """Return how the command line of this installation is called from here."""
    beside = Path(sys.executable).with_name("ollama-cache.exe" if sys.platform == "win32" else "ollama-cache")
    found = shutil.which("ollama-cache")
    if not beside.exists() or (found is not None and Path(found).resolve() == beside.resolve()):
        return "ollama-cache"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)
