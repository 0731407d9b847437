"""What is stored, as models: rows, one model in detail, and sums.

Invariant: the same values give the same answer in the daemon and on the command line; keys do not change, because
scripts read them. Sizes are bytes, times Unix seconds or None for never.
"""

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from functools import cached_property
from itertools import chain
from typing import Any, Final

from pullthrough.core import manifest_json
from pullthrough.core.digest import Digest
from pullthrough.core.errors import NoSuchModel
from pullthrough.core.humanize import size_text
from pullthrough.core.manifest_json import Child, Layer
from pullthrough.core.records import BlobRecord, ManifestRecord, Name, by_model, listed_by
from pullthrough.store.usage import Totals, settled

JSON = dict[str, Any]

_EPOCH: Final = date(1970, 1, 1)
_BEYOND: Final = {
    "private_bytes": "private blobs",
    "unfinished_bytes": "unfinished recordings",
    "quarantined_bytes": "quarantine",
}
SHOWN: Final = 5
"""The most models that an error names."""


@dataclass(frozen=True)
class View:
    """The contents of a store at one moment."""

    manifests: Mapping[Name, ManifestRecord]
    blobs: Mapping[Digest, BlobRecord]
    """All known blobs, held or not."""
    pins: tuple[str, ...]
    """The pins of the option and of the store."""
    days: Mapping[int, Totals]
    children: Mapping[Digest, ManifestRecord] = field(default_factory=dict)
    """The manifests that stored lists refer to, as far as their bytes are stored."""
    unfinished: int = 0
    """Bytes of disk that recordings take, running or left over."""
    quarantined: int = 0
    """Bytes that did not match their digest."""

    @cached_property
    def models(self) -> dict[Name, list[ManifestRecord]]:
        """The representations of each model; if some are public, only those."""
        return {
            name: [record for record in records if not record.denied] or records
            for name, records in by_model(self.manifests).items()
        }

    @cached_property
    def held(self) -> dict[Digest, int]:
        """The sizes of the held blobs."""
        return {digest: record.size or 0 for digest, record in self.blobs.items() if record.held}


def find(text: str, names: Iterable[Name]) -> Name:
    """Return the stored model that a user means by `text`. Raises NoSuchModel if there is none, or several."""
    name = find_or_none(text, names := list(names))
    if name is not None:
        return name
    base = _tagged(text).rpartition(":")[0]
    near = [name for name in _models(names) if base in {form.rpartition(":")[0] for form in name.forms}]
    raise NoSuchModel(f"{not_found(text)}; " + (f"stored is {_shown(near)}" if near else "see `ollama-cache ls`"))


def find_or_none(text: str, names: Iterable[Name]) -> Name | None:
    """Return the stored model that a user means by `text`, if there is one. Raises NoSuchModel if there are several."""
    wanted = _tagged(text)
    found = [name for name in _models(names) if wanted in name.forms]
    for name in found:
        if wanted in (str(name), name.typed):
            return name
    if len(found) > 1:
        raise NoSuchModel(f"'{text}' may be any of {_shown(found)}: write the one in full")
    return found[0] if found else None


def not_found(text: str) -> str:
    """Return Ollama's message for a model that does not exist (server/routes.go)."""
    return f"model '{text}' not found"


def _tagged(text: str) -> str:
    return text if "@" in text or ":" in text.rpartition("/")[2] else f"{text}:latest"


def _models(names: Iterable[Name]) -> list[Name]:
    return list(dict.fromkeys(name.model for name in names))


def _shown(names: list[Name]) -> str:
    texts = sorted(name.typed for name in names)
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def listing(view: View, shown: Collection[Name] | None = None) -> list[JSON]:
    """Return a row for each model, or only for those in `shown`, the most recently pulled first."""
    rows = [_row(view, name, view.models[name]) for name in (view.models if shown is None else shown)]
    return sorted(rows, key=lambda row: (-(row["pulled"] or 0.0), row["name"]))


class Order(StrEnum):
    """A criterion to sort rows by."""

    NAME = "name"
    SIZE = "size"
    PULLED = "pulled"


def chosen(rows: Iterable[JSON], pattern: str = "", order: Order = Order.PULLED) -> list[JSON]:
    """Return the rows whose names begin with `pattern`, as for `ollama list`, or match it if it has wildcards.

    Names are sorted from A to Z, sizes from the largest, pulls from the latest.
    """
    found = [row for row in rows if not pattern or _is_meant(row, pattern)]
    if order is Order.NAME:
        return sorted(found, key=lambda row: row["name"])
    return sorted(found, key=lambda row: (-(row[order] or 0), row["name"]))


def _is_meant(row: JSON, pattern: str) -> bool:
    name = Name(row["host"], row["repository"], row["reference"])
    if is_pattern(pattern):
        return name.is_among((pattern, f"{pattern}:latest"))
    return any(form.lower().startswith(pattern.lower()) for form in name.forms)


def is_pattern(text: str) -> bool:
    """Return whether a user's text has wildcards."""
    return any(character in text for character in "*?[")


def models_of(manifests: Mapping[Name, ManifestRecord], digests: Set[Digest]) -> dict[Digest, Name]:
    """Return a model that lists the blob, for each blob that has one."""
    found: dict[Digest, Name] = {}
    for name, record in manifests.items():
        found |= dict.fromkeys(filter(record.lists, digests), name.model)
    return found


def _row(view: View, name: Name, records: Sequence[ManifestRecord]) -> JSON:
    digest = records[0].digest
    return {
        "name": name.typed,
        "host": name.host,
        "repository": name.repository,
        "reference": name.reference,
        "id": digest[:12],
        "digest": f"sha256:{digest}",
        "size": size_of(view, records),
        "held": "complete" if is_whole(view, records) else "partial",
        "pulled": max(record.pulled for record in records) or None,
        "pinned": name.is_among(view.pins),
        "visibility": "private" if records[0].denied else "public",
    }


def size_of(view: View, records: Sequence[ManifestRecord]) -> int:
    """Return the total size of a model's blobs, each counted once, as far as known."""
    if len(records) == 1 and not records[0].is_list:
        return records[0].size
    sizes: dict[Digest, int | None] = {}
    for record in records:
        sizes |= {digest: size for digest, size in record.sizes.items() if sizes.get(digest) is None}
    return sum(view.held.get(digest, 0) if size is None else size for digest, size in sizes.items())


def is_whole(view: View, records: Sequence[ManifestRecord]) -> bool:
    """Return whether clients that take lists and those that do not find here what their manifests need.

    A child that is also stored as the plain manifest counts as held, even if nobody has asked for it as a blob.
    """
    held: Container[str] = view.held
    if any(record.is_list for record in records):
        held = {*view.held, *(Digest(record.digest) for record in records)}
    return all(record.is_whole(view.children, held) for record in records)


def detail(view: View, text: str) -> JSON:
    """Return one model: its row, when upstream confirmed it, its layers in order, and those of its children.

    `layers` are those of the manifest for clients that accept no lists, `children` the manifests in the list.
    """
    name = find(text, view.manifests)
    records = view.models[name]
    layers: list[JSON] = []
    children: list[JSON] = []
    for record in records:
        if record.is_list:
            children = [_child(view, child, records) for child in manifest_json.children_of(record.body)]
        elif not layers:
            layers = _layers(view, manifest_json.parse(record.body).layers)
    confirmed = max(record.confirmed for record in records) or None
    digests = [f"sha256:{record.digest}" for record in records if record.is_list]
    listed = {"list": digests[0] if digests else None, "children": children}
    return {**_row(view, name, records), "confirmed": confirmed, "layers": layers, **listed}


def _layers(view: View, layers: Iterable[Layer]) -> list[JSON]:
    return [
        {
            "media_type": layer.media_type,
            "digest": str(layer.digest),
            "size": layer.size,
            "held": layer.digest in view.held,
        }
        for layer in layers
    ]


def _child(view: View, child: Child, records: Iterable[ManifestRecord]) -> JSON:
    """Return a child; a reference has a digest, and its layers are known only if its manifest is stored."""
    layers, held = child.layers, True
    if child.digest is not None:
        known = view.children.get(child.digest)
        held = child.digest in view.held or child.digest.hex in {record.digest for record in records}
        layers = manifest_json.parse(known.body).layers if known is not None else ()
    return {
        "runner": child.runner,
        "format": child.format,
        "digest": str(child.digest) if child.digest is not None else None,
        "held": held,
        "layers": _layers(view, layers),
    }


def beyond_models(view: View) -> dict[str, int]:
    """Return what is on the disk but in no listing of models."""
    private = sum(record.size or 0 for record in view.blobs.values() if record.held and not record.public)
    return {"private_bytes": private, "unfinished_bytes": view.unfinished, "quarantined_bytes": view.quarantined}


def beyond_text(sums: JSON) -> str:
    """Return the non-zero sums of `beyond_models`, for people."""
    found = [(name, sums[key]) for key, name in _BEYOND.items() if sums.get(key)]
    return ", ".join(f"{name} {size_text(size)}" for name, size in found)


def statistics(view: View) -> JSON:
    """Return sums over everything; `deduplicated_bytes` is what separate copies for each model would take in addition.

    `private_bytes` are the part of `bytes` that upstream has granted to nobody without a login.
    """
    listed = Counter(chain.from_iterable(map(listed_by, view.models.values())))
    shared = sum((count - 1) * view.held.get(digest, 0) for digest, count in listed.items() if count > 1)
    days = settled(view.days)
    served = sum(totals.served for totals in days.values())
    fetched = sum(totals.fetched for totals in days.values())
    saved = sum(totals.saved or 0 for totals in days.values())
    return {
        "models": len(view.models),
        "blobs": len(view.held),
        "bytes": sum(view.held.values()),
        "deduplicated_bytes": shared,
        **beyond_models(view),
        "served": served,
        "fetched": fetched,
        "saved": saved,
        "ratio": saved / served if served else None,
        "days": [
            {"day": str(_EPOCH + timedelta(days=day)), **asdict(totals)}
            for day, totals in sorted(days.items(), reverse=True)
        ],
    }
