"""What each verb of the command line says, at three widths of a terminal: kept as text in tests/unit/cli/screens.

`python -m tests.documents` writes the files anew; tests/unit/cli/test_screens.py fails while one has another text. The
help is laid out by us and wrong calls are not among the cases, so that the version of typer does not matter.
"""

import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from typer.testing import CliRunner

from pullthrough.cli import app as cli
from pullthrough.core.digest import Digest
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.store import Store
from pullthrough.store.usage import Totals
from tests.documents import commands

FILES: Final = Path(__file__).parent / "unit/cli/screens"
WIDTHS: Final = (60, 80, 200)
MODELS: Final = {
    "llama3.2:1b": ((b"one", b"both"), 3600.0),
    "me/x": ((b"two", b"both", b"gone"), 86400.0),
    "hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M": ((b"three",), 14 * 86400.0),
    "gemma3": ((b"four",), 0.0),
}
"""The parts of each model, and how long ago a client pulled it; 0 for never."""
PS: Final[list[dict[str, Any]]] = [
    {
        "model": "llama3.2-vision:11b-instruct-q4_K_M",
        "digest": f"sha256:{'11eb4c' * 10}abcd",
        "size": 5_963_057_088,
        "present": 2_100_000_000,
        "rate": 84_000_000,
        "readers": 3,
        "since": -25.0,
    },
    {
        "model": None,
        "digest": f"sha256:{'a80c4f' * 10}abcd",
        "size": None,
        "present": 0,
        "rate": 0,
        "readers": 1,
        "since": 0.0,
    },
]
"""What a daemon answers; `since` is told from now."""
WARM: Final = {"model": "gemma3:latest", "size": 3_300_000_000, "missing": 1_100_000_000}


def digest(data: bytes) -> Digest:
    return Digest(sha256(data).hexdigest())


def make_store(folder: Path) -> None:
    """Make a store of MODELS, of which a part is missing, with a blob of no model and two days of traffic."""
    store, now = Store.open(folder), time.time()
    parts = {part for each, _ in MODELS.values() for part in each} - {b"gone"} | {b"alone"}
    for data in sorted(parts):
        ingest = store.ingest(digest(data))
        ingest.begin(len(data))
        ingest.write_at(0, data)
        ingest.close()
        store.publish(ingest.digest, store.place(ingest.digest, ingest.partial_path), now=now)
        ingest.forget()
    for text, (listed, ago) in MODELS.items():
        layers = [{"mediaType": MEDIA_TYPE, "digest": str(digest(part)), "size": len(part)} for part in listed]
        record = ManifestRecord.parse(json.dumps({"layers": layers}).encode(), "application/json", now=now - 60)
        assert record is not None
        store.put_manifest(Name.parse(text), record)
        if ago:
            store.touch(Name.parse(text), now - ago - 1)
        if text != "me/x":
            for part in listed:
                store.confirm_public(*Name.parse(text).place, digest(part))
    store.ledger.put_days({20000: Totals(2_000_000, 500_000), 20001: Totals(1, 1)})
    store.close()


MEDIA_TYPE: Final = "application/vnd.ollama.image.model"
CALLS: Final = (
    "ls",
    "ls llama",
    "ls '*Q4*'",
    "ls --sort size",
    "ls --sort name",
    "ls nothing",
    "show me/x",
    "show llama3.2",
    "show nope",
    "stats",
    "config",
    "pin llama3.2:1b",
    "pin 'qwen*'",
    "pin nope",
    "pin 'gemma*'",
    "rm llama3.2:1b",
    "rm --unpin llama3.2:1b",
    "rm gemma3 --force",
    "rm nope",
    "unpin 'qwen*'",
    "unpin qwen",
    "prune --age 0 --dry-run",
    "prune --age 0",
    "ps",
    "warm nope",
    "connect",
    "connect --for macos",
    "connect --for windows",
    "connect --undo",
    "connect --undo --for windows",
    "verify",
    "export me/x --to OUT/x.tar",
    "export nope --to OUT/x.tar",
    "export hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M --to OUT/x.tar.gz",
    "export hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M --to OUT/x.tar",
    "export hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M --to OUT/x.tar",
    "export hf.co/bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M --to OUT/x.tar --force",
    "import OUT/x.tar",
    "import OUT/none",
    "ca",
    "ca show",
    "--version",
)
"""Without a daemon, in this order on one store."""


def screens(width: int) -> str:
    """Return what all calls say on a terminal of this width."""
    with tempfile.TemporaryDirectory() as name, surroundings(Path(name), width) as say:
        said = [say("--help"), *(say(f"{verb} --help") for verb in commands())]
        said += [say(call) for call in CALLS]
        with patch("pullthrough.cli.models.ask", _daemon):
            said += [say(call) for call in ("ps", "warm gemma3 nope", "warm gemma3 --dry-run")]
        with patch("pullthrough.cli.models.ask", lambda *_, **__: []):
            said.append(say("ps"))
    return "\n".join(said)


@contextmanager
def surroundings(folder: Path, width: int) -> Iterator[Callable[[str], str]]:
    """Run calls on a store of their own, with no settings but ours; the answer is what a terminal shows."""
    make_store(folder / "store")
    (folder / "out").mkdir()
    own = {"OLLAMA_CACHE_DIR": str(folder / "store"), "OLLAMA_CACHE_CERTS": str(folder / "certs")}
    env = {name: value for name, value in os.environ.items() if not re.match(r"(?i)ollama", name)}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {**env, **own, "COLUMNS": str(width)}, clear=True))
        stack.enter_context(patch("pullthrough.cli.common.terminal_width", lambda: width))
        stack.enter_context(patch("pullthrough.runtime.platform.lan_address", lambda: "10.0.0.1"))
        stack.enter_context(patch("pullthrough.runtime.platform.own_addresses", lambda: frozenset({"10.0.0.1"})))
        stack.enter_context(patch("pullthrough.config.paths.own_program", lambda: "ollama-cache"))

        def say(call: str) -> str:
            words = [word.replace("OUT", str(folder / "out")) for word in shlex.split(call)]
            result = CliRunner().invoke(cli.app, words, prog_name="ollama-cache")
            assert result.exception is None or isinstance(result.exception, SystemExit), (call, result.exception)
            code = f"[exit code {result.exit_code}]\n" if result.exit_code else ""
            return f"$ ollama-cache {call}\n{_masked(result.output, folder)}{code}"

        yield say


def _daemon(_: Path, verb: str, arguments: Mapping[str, Any], **__: Any) -> Any:
    if verb == "ps":
        return [{**row, "since": time.time() + row["since"]} for row in PS]
    if arguments["models"] == ["nope"]:
        return [{"model": "nope", "error": "pull model manifest: file does not exist (the registry answered 404)"}]
    return [WARM]


def _masked(text: str, folder: Path) -> str:
    """Put words for what is another each time: folders, sums, dates, and how fast it went."""
    for path, word in ((folder / "store", "STORE"), (folder / "certs", "CERTS"), (folder / "out", "OUT")):
        text = text.replace(str(path), word)
    text = re.sub(r"\b[0-9a-f]{64}\b", "SUM", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID..........", text)
    text = re.sub(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", "AB:CD:...", text)
    text = re.sub(r"valid until( +)[0-9-]+", r"valid until\1YEAR-MM-DD", text)
    return re.sub(r"in [0-9.]+ s, .*/s", "in SECONDS, RATE/s", text)


def write() -> None:
    """Write the files anew."""
    FILES.mkdir(exist_ok=True)
    for width in WIDTHS:
        (FILES / f"{width}.txt").write_text(screens(width), encoding="utf-8")
