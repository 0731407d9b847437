"""A store of a few models with the names and sizes of real ones, and the days of traffic behind it.

The blobs are sparse files that hash to nothing: for looking at, not for pulling. A cache that is started with `PATCH`
remembers clients and their pulls, too.
"""

import json
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Final

from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.store import Store
from pullthrough.store.usage import DAY_S, Totals

MODELS: Final = {
    "library/llama3.2:latest": (2_019_377_376, 3 * 60),
    "library/llama3.2:1b": (1_321_082_688, 2 * DAY_S),
    "library/qwen3:8b": (5_225_374_496, 40 * 60),
    "library/gemma3:12b": (8_149_178_080, 5 * 3600),
    "library/nomic-embed-text:latest": (274_290_656, 26 * 3600),
    "acme/support-assistant-for-the-field-service:q4_k_m": (4_920_734_048, 9 * DAY_S),
}
"""The size of each one's weights, and how long ago it was pulled."""
PATCH: Final = """
import time
from pullthrough.core.records import Name
from pullthrough.net import client_table, pull_history

def remember(table, *, limit=1000, make=client_table.ClientTable.__init__):
    make(table, limit=limit)
    for address, way, version, models, size, ago in (
        ("10.0.0.23", "HTTPS_PROXY", (0, 36, 1), ["gemma3:12b"], 0, 5 * 3600),
        ("10.0.0.12", "gateway", (0, 34, 4), ["gemma3:12b", "qwen3:8b"], 13_374_000_000, 2400),
        ("fd12:3456:789a::c0ff:ee", "plain port", None, ["llama3.2:latest"], 2_019_000_000, 900),
        ("10.0.0.7", "HTTPS_PROXY", (0, 41, 0), ["qwen3:8b", "llama3.2:latest"], 7_245_000_000, 180),
    ):
        now = time.time() - ago
        way = client_table.Way(way)
        table.ask(address, way, version, bypasses=version == (0, 36, 1), now=now)
        for model in models:
            table.pull(address, Name.parse(model), now=now)
        table.send(address, size, now=now)

def recall(history, *arguments, make=pull_history.PullHistory.__init__, **options):
    make(history, *arguments, **options)
    for address, model, size, cached, ago, seconds in (
        ("10.0.0.7", "llama3.2:latest", 2_019_000_000, True, 180, 19),
        ("fd12:3456:789a::c0ff:ee", "llama3.2:latest", 2_019_000_000, False, 900, 183),
        ("10.0.0.12", "qwen3:8b", 5_225_000_000, True, 2400, 46),
        ("10.0.0.7", "qwen3:8b", 5_225_000_000, False, 3000, 470),
    ):
        began = time.time() - ago - seconds
        parts = (size, 0) if cached else (0, size)
        name = Name.parse(model)
        history.recent.append(pull_history.Pull(address, name, size, *parts, began, seconds, is_whole=True))

client_table.ClientTable.__init__ = remember
pull_history.PullHistory.__init__ = recall
"""
_SMALL: Final = (("license", 12_403), ("template", 1_481), ("params", 96))
_GB: Final = 10**9
_WEEK: Final = ((41, 11), (33, 4), (58, 9), (27, 3), (36, 2), (4, 0), (0, 0))
"""Gigabytes served and fetched, by day of the week."""


def fill(folder: Path) -> None:
    """Make the store in `folder`."""
    now = time.time()
    store = Store.open(folder)
    staging = folder / "ingest" / "showcase"
    for text, (size, ago) in MODELS.items():
        repository, _, tag = text.partition(":")
        layers = [_layer(store, staging, text, kind, length, now - ago) for kind, length in (("model", size), *_SMALL)]
        record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "", now=now - min(ago, 300))
        assert record is not None
        store.put_manifest(Name("registry.ollama.ai", repository, tag), record._replace(pulled=now - ago))
    today = int(now // DAY_S)
    traffic = {today - back: _WEEK[back % 7] for back in range(26) if back not in (15, 16)}
    store.ledger.put_days({day: Totals(gb * _GB, fetched * _GB) for day, (gb, fetched) in traffic.items() if gb})
    store.ledger.pin("llama3.2:*")
    store.close()


def _layer(store: Store, staging: Path, model: str, kind: str, size: int, now: float) -> dict[str, object]:
    digest = Digest(sha256(f"{model} {kind} {size}".encode()).hexdigest())
    with staging.open("wb") as file:
        os.truncate(file.fileno(), size)
    store.publish(digest, store.place(digest, staging), now=now)
    store.confirm_public("registry.ollama.ai", model.partition(":")[0], digest)
    return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": str(digest), "size": size}
