"""The authorities with which a store was served before: clients that were set up then still trust those.

Invariant: an earlier authority that can still sign is reported at every start with another one, but not if the other
one replaced it in its own folder.
"""

import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import Final

from pullthrough.core.errors import AuthorityError
from pullthrough.pki.authority import Authority
from pullthrough.pki.rollover import Rollover

NAME: Final = "authorities"
"""A file in the store's folder: a JSON object with each authority's folder and last day, by fingerprint."""


def note_authorities(store: Path, rollover: Rollover, *, now: datetime) -> list[str]:
    """Record the authorities that serve the store from now on; return what to tell the operator of earlier ones.

    Raises:
        OSError: the file cannot be written.
    """
    file, known = store / NAME, {}
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        known = dict(json.loads(file.read_text(encoding="utf-8")))
    current = {authority.fingerprint for authority in rollover.all}
    others = {}
    for fingerprint, seen in known.items():
        with contextlib.suppress(AuthorityError, KeyError, TypeError):
            if (
                fingerprint not in current
                and Authority.load(Path(seen["folder"]), (), now=now).fingerprint == fingerprint
            ):
                others[fingerprint] = seen
    mine = {"folder": str(rollover.current.certificate_file.parent.absolute()), "last": f"{now:%Y-%m-%d}"}
    noted = others | dict.fromkeys(sorted(current), mine)
    if noted != known:
        partial = file.with_name(f".{NAME}.new")
        partial.write_text(json.dumps(noted, indent=1), encoding="utf-8")
        partial.replace(file)
    return [
        f"until {seen['last']} this store was served with another authority, SHA-256 {fingerprint} in "
        f"{seen['folder']}: clients that were set up by then trust that one, and pull no more until they are set up "
        f"again; to go on with it, start with --set ollama_cache_certs={seen['folder']}"
        for fingerprint, seen in others.items()
    ]
