"""The command line on a big store, and what is hashed on every core.

**Invariant**: a verb is timed as a user waits for it, Python's own start included; both sides of a comparison hash the
same files, which the page cache holds. Knows the index's rows only through `bigstore`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pullthrough.store.store import Store
from tests.bench.figures import OURS, Bench, Figure, Sample, workplace
from tests.support.bigstore import fill
from tests.support.origin import Synthetic
from tests.support.proxy import ADDON, Proxy, environment

MODELS: Final = 10_000
LAYERS: Final = 7
VERBS: Final = (("ls",), ("stats",), ("prune", "--dry-run"), ("prune", "--all", "--age", "0", "--dry-run"))
BLOBS: Final = 8
SIZE: Final = 256 << 20
MAIN: Final = "from pullthrough.cli import main; main()"
_PIECE: Final = 1 << 20


def _run(folder: Path, home: Path, *arguments: str) -> float:
    """A verb on the store in `folder`; the seconds that it took."""
    env = {**environment(home), "PYTHONPATH": str(ADDON.parent), "OLLAMA_CACHE_DIR": str(folder)}
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", MAIN, *arguments], env=env, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def keep(bench: Bench) -> Iterator[Figure]:
    """Verbs that look, on a store of ten thousand models and sixty thousand blobs; and how long that takes to open."""
    models = MODELS // 20 if bench.is_quick else MODELS
    with workplace() as new:
        home, directory, empty = new("home"), new("proxy"), new("empty")
        folder = directory / "store"
        fill(folder, models=models, layers=LAYERS, day=1000.0)

        def looked(verb: tuple[str, ...]) -> Sample:
            return {"s": _run(folder, home, *verb)}

        for verb in VERBS:
            yield Figure.single(f"`{' '.join(verb)}` without a cache", [looked(verb) for _ in range(bench.pairs)])
        with Proxy(directory):
            for verb in VERBS:
                what = f"`{' '.join(verb)}` beside the running cache"
                yield Figure.single(what, [looked(verb) for _ in range(bench.pairs)])
        yield Figure.single("the store is opened", [_opened(folder) for _ in range(bench.pairs)])
        sides = {OURS: _started(directory), "with an empty store": _started(empty)}
        yield bench.compare("the cache is started", sides)


def _opened(folder: Path) -> Sample:
    begun = time.perf_counter()
    store = Store.open(folder)
    took = time.perf_counter() - begun
    store.close()
    return {"s": took}


def _started(directory: Path) -> Callable[[int], Sample]:
    def measure(_round: int) -> Sample:
        begun = time.perf_counter()
        with Proxy(directory):
            return {"s": time.perf_counter() - begun}

    return measure


def hashed(bench: Bench) -> Iterator[Figure]:
    """`import` of a models folder and `verify` of the store, against sha256sum as often at once as there are cores."""
    size = bench.size(SIZE)
    with workplace() as new:
        home, tree, folder = new("home"), new("models"), new("stores") / "store"
        _write_tree(tree, size)
        blobs = tree / "blobs"

        def summed(_round: int) -> Sample:
            names = sorted(path.name for path in blobs.iterdir())
            begun = time.perf_counter()
            subprocess.run(
                ["xargs", "-n1", f"-P{os.cpu_count()}", "sha256sum"],
                input="\n".join(names).encode(),
                cwd=blobs,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            return {"MB/s": BLOBS * size / (time.perf_counter() - begun) / 1e6}

        def imported(_round: int) -> Sample:
            shutil.rmtree(folder, ignore_errors=True)
            return {"MB/s": BLOBS * size / _run(folder, home, "import", str(tree)) / 1e6}

        def verified(_round: int) -> Sample:
            return {"MB/s": BLOBS * size / _run(folder, home, "verify") / 1e6}

        what = f"of {BLOBS} blobs of {size >> 20} MiB"
        yield bench.compare(f"`import` {what}", {OURS: imported, "sha256sum": summed})
        yield bench.compare(f"`verify` {what}", {OURS: verified, "sha256sum": summed})


def _write_tree(tree: Path, size: int) -> None:
    """A models folder of Ollama: a model of one layer for each blob."""
    (tree / "blobs").mkdir()
    for number in range(BLOBS):
        blob, hasher = Synthetic(size, number), hashlib.sha256()
        path = tree / "blobs" / "new"
        with path.open("wb") as file:
            for start in range(0, size, _PIECE):
                data = blob.read(start, min(start + _PIECE, size))
                hasher.update(data)
                file.write(data)
        path.rename(path.with_name(f"sha256-{hasher.hexdigest()}"))
        layer = {"digest": f"sha256:{hasher.hexdigest()}", "size": size}
        manifest = tree / "manifests" / "registry.ollama.ai" / "library" / f"m{number}" / "latest"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
