"""What is stored, told as models: rows, one model in detail, and sums.

Invariant: the same values give the same answer, whether the daemon or the command line looks; keys stay as they are,
as scripts read them. Sizes are bytes, times Unix seconds or None for never. Knows neither disk nor terminal.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from itertools import chain
from typing import Any, Final

from pullthrough.digest import Digest
from pullthrough.errors import NoSuchModel
from pullthrough.records import BlobRecord, ManifestRecord, Name
from pullthrough.traffic import Totals

JSON = dict[str, Any]

_EPOCH: Final = date(1970, 1, 1)
SHOWN: Final = 5
"""How many models an error names at most."""


@dataclass(frozen=True)
class View:
    """What a store holds at one moment."""

    manifests: Mapping[Name, ManifestRecord]
    blobs: Mapping[Digest, BlobRecord]
    """All that are known, held or not."""
    pins: tuple[str, ...]
    """Of the option and of the store."""
    days: Mapping[int, Totals]

    @cached_property
    def held(self) -> dict[Digest, int]:
        """The sizes of the blobs that are here."""
        return {digest: record.size or 0 for digest, record in self.blobs.items() if record.held}


def find(text: str, names: Iterable[Name]) -> Name:
    """The stored model that a user means by `text`. NoSuchModel if there is none, or more than one."""
    wanted = text if "@" in text or ":" in text.rpartition("/")[2] else f"{text}:latest"
    every = list(names)
    found = [name for name in every if wanted in name.forms]
    for name in found:
        if wanted in (str(name), name.typed):
            return name
    if len(found) == 1:
        return found[0]
    if found:
        raise NoSuchModel(f"expected one model, got {text!r}, which may be {_shown(found)}")
    base = wanted.rpartition(":")[0]
    near = [name for name in every if base in {form.rpartition(":")[0] for form in name.forms}]
    raise NoSuchModel(
        f"expected a stored model, got {text!r}"
        + (f"; stored is {_shown(near)}" if near else "; see `ollama-cache ls`")
    )


def _shown(names: list[Name]) -> str:
    texts = sorted(name.typed for name in names)
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def listing(view: View, shown: Mapping[Name, ManifestRecord] | None = None) -> list[JSON]:
    """A row for each model, or only for those that are `shown`, the one pulled last first."""
    rows = [_row(view, name, record) for name, record in (view.manifests if shown is None else shown).items()]
    return sorted(rows, key=lambda row: (-(row["pulled"] or 0.0), row["name"]))


def _row(view: View, name: Name, record: ManifestRecord) -> JSON:
    digest = record.digest
    return {
        "name": name.typed,
        "host": name.host,
        "repository": name.repository,
        "reference": name.reference,
        "id": digest[:12],
        "digest": f"sha256:{digest}",
        "size": record.size,
        "held": "complete" if record.is_within(view.held) else "partial",
        "pulled": record.pulled or None,
        "pinned": name.is_among(view.pins),
        "visibility": "private" if record.denied else "public",
    }


def detail(view: View, text: str) -> JSON:
    """One model: its row, when upstream confirmed it, and its layers in the manifest's order."""
    name = find(text, view.manifests)
    record = view.manifests[name]
    manifest = json.loads(record.body)
    sizes = record.sizes
    descriptors = [*(manifest["layers"] or []), *([manifest["config"]] if manifest.get("config") else [])]
    layers = []
    for item in descriptors:
        digest = Digest.parse(item["digest"])
        layers.append(
            {
                "media_type": str(item.get("mediaType", "")),
                "digest": str(digest),
                "size": sizes[digest],
                "held": digest in view.held,
            }
        )
    return {**_row(view, name, record), "confirmed": record.confirmed or None, "layers": layers}


def statistics(view: View) -> JSON:
    """Sums over everything; `deduplicated_bytes` is what copies for each model would take beyond what is held."""
    listed = Counter(chain.from_iterable(record.digests for record in view.manifests.values()))
    shared = sum((count - 1) * view.held.get(digest, 0) for digest, count in listed.items() if count > 1)
    served = sum(totals.served for totals in view.days.values())
    fetched = sum(totals.fetched for totals in view.days.values())
    return {
        "models": len(view.manifests),
        "blobs": len(view.held),
        "bytes": sum(view.held.values()),
        "deduplicated_bytes": shared,
        "served": served,
        "fetched": fetched,
        "saved": max(0, served - fetched),
        "ratio": max(0, served - fetched) / served if served else None,
        "days": [
            {"day": str(_EPOCH + timedelta(days=day)), "served": totals.served, "fetched": totals.fetched}
            for day, totals in sorted(view.days.items(), reverse=True)
        ],
    }
