"""The doctor for a client: a script that needs no Python, and that the plain port serves to everyone.

Invariant: a script depends only on the settings, never on the client that requests it. Its checks and judgements are in
`client/`: one script for POSIX shells, one for PowerShell.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final

from pullthrough.config.settings import Settings
from pullthrough.core.errors import CacheError
from pullthrough.core.records import BYPASSING
from pullthrough.doctor.rules import Finding
from pullthrough.pki.client_setup import TEXT, SetupDocument, Template

SCRIPTS: Final = ("doctor.sh", "doctor.ps1")
_PATIENCE_S: Final = 90.0
"""Longer than all checks of a script together may take."""


def scripts(settings: Settings) -> Mapping[str, SetupDocument]:
    """Return both scripts by the path at which they are served."""
    first, last = (".".join(map(str, version)) for version in BYPASSING)
    published = settings.advertise.port if settings.advertise is not None else 0
    values = {
        "hosts": " ".join(settings.intercepted),
        "port": str(published or settings.listen[0][1]) if settings.listen else "",
        "first": first,
        "last": last,
    }
    folder = resources.files("pullthrough.doctor") / "client"
    return {
        f"/{name}": SetupDocument(
            TEXT, Template((folder / name).read_text(encoding="utf-8")).substitute(values).encode()
        )
        for name in SCRIPTS
    }


def examine(settings: Settings) -> list[Finding]:
    """Run the script for this machine's system.

    Raises:
        CacheError: it cannot be run, exits with an unknown status, or does not end in time.
    """
    windows = sys.platform == "win32"
    name, shell = ("doctor.ps1", "powershell") if windows else ("doctor.sh", "sh")
    program = shutil.which(shell)
    if program is None:
        raise CacheError(f"expected {shell} to run {name} by, got none")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(scripts(settings)[f"/{name}"].body)
        words = [str(file), "--fields"]
        if windows:
            words = ["-NoProfile", "-ExecutionPolicy", "Bypass", "-File", str(file), "-Fields"]
        try:
            done = subprocess.run(  # noqa: S603
                [program, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace").strip()
            raise CacheError(
                f"{name} has not come to an end in {_PATIENCE_S:.0f} s: something that it asks or reads hangs, as a "
                f"disk on the network or a name server may{f' ({said})' if said else ''}; `sh -x` in front of what "
                "the cache gives at /doctor.sh shows where"
            ) from None
        except OSError as error:
            raise CacheError(f"{shell} cannot be run: {error}") from error
    if done.returncode not in (0, 1):
        raise CacheError(f"{name} ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    sys.stderr.write(done.stderr.decode(errors="replace"))
    return [_parse(line) for line in done.stdout.decode(errors="replace").splitlines()]


def _parse(line: str) -> Finding:
    try:
        grave, what, why, mend = line.split("\t", 3)
    except ValueError:
        raise CacheError(f"expected a finding of four fields from the script, got {line!r}") from None
    return Finding(what, why, mend, grave == "yes")
