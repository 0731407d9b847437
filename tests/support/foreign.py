"""Clients that others wrote, as pip or the system installs them, each run as a program of its own.

Invariant: a client is told the proxy and our CA the way its users tell it, and nothing else; one that is not
installed is skipped by name, never passed over in silence. Knows nothing of what answers.
"""

import json
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest

from tests.support.proxy import Proxy, environment

REGISTRY: Final = "registry.ollama.ai"
PATIENCE_S: Final = 100.0


@dataclass(frozen=True)
class Order:
    """What a client is to fetch: one layer of a model in `library/`, into a folder of the client's own."""

    model: str
    layer: str
    folder: Path


@dataclass(frozen=True)
class Foreign:
    """A client. `command` and `variables` are what its user types; what it fetched lies in the order's folder."""

    name: str
    program: str
    command: Callable[[Path, Proxy, Order], list[str | Path]]
    variables: Callable[[Proxy, Order], Mapping[str, str]] = field(default=lambda _proxy, _order: {})

    @contextmanager
    def running(self, proxy: Proxy, order: Order) -> Iterator["subprocess.Popen[str]"]:
        """The client at work; whatever is left of it afterwards is killed."""
        order.folder.mkdir(parents=True, exist_ok=True)
        trust = {name: str(proxy.ca_file) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")}
        process = subprocess.Popen(
            [str(word) for word in self.command(_find(self.program), proxy, order)],
            env=environment(order.folder, {"HTTPS_PROXY": proxy.url, **trust, **self.variables(proxy, order)}),
            cwd=order.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def fetch(self, proxy: Proxy, order: Order) -> None:
        """Run to the end; AssertionError with its output if the client says that it failed."""
        with self.running(proxy, order) as process:
            output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, f"{self.name} ended with {process.returncode}:\n{output}"


def gguf(content: bytes) -> bytes:
    """The smallest head of a GGUF file (magic, version 3, no tensors, no keys) and then any content."""
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + content


def _find(program: str) -> Path:
    beside = Path(sys.executable).with_name(program)
    if beside.exists():
        return beside
    if found := shutil.which(program):
        return Path(found)
    pytest.skip(f"{program} is not installed: pip's extra `test` has it, or the system's packages")


class _Daemon(BaseHTTPRequestHandler):
    """As much of an Ollama as ollama-downloader asks at its end: whether the model is there now."""

    model = ""

    def do_GET(self) -> None:
        document = {"models": [{"model": self.model, "modified_at": datetime.now().astimezone().isoformat()}]}
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def ollama_daemon(model: str) -> Iterator[str]:
    """The URL of a server that lists one model."""
    handler = type("Daemon", (_Daemon,), {"model": model})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


# --- how each is used


def _ramalama(program: Path, _proxy: Proxy, order: Order) -> list[str | Path]:
    return [program, "--store", order.folder / "store", "--nocontainer", "pull", f"ollama://{order.model}"]


def _downloader(program: Path, _proxy: Proxy, order: Order) -> list[str | Path]:
    # Its settings file names the models folder and the daemon; the daemon must list the model when all is there.
    runner = f"""
        import json, pathlib, subprocess, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.support.foreign import ollama_daemon
        models = pathlib.Path("models")
        (models / "blobs").mkdir(parents=True, exist_ok=True)
        (models / "manifests").mkdir(exist_ok=True)
        with ollama_daemon({f"{order.model}:latest"!r}) as url:
            settings = {{"ollama_server": {{"url": url}}, "ollama_library": {{"models_path": str(models.resolve())}}}}
            pathlib.Path("settings.json").write_text(json.dumps(settings))
            command = [{str(program)!r}, "model-download", {f"{order.model}:latest"!r}]
            sys.exit(subprocess.run(command).returncode)
    """
    return [sys.executable, "-c", textwrap.dedent(runner)]


def _oras(_program: Path, _proxy: Proxy, order: Order) -> list[str | Path]:
    script = f"""
        import oras.client
        client = oras.client.OrasClient(hostname={REGISTRY!r})
        container = {f"{REGISTRY}/library/{order.model}:latest"!r}
        types = ["application/vnd.docker.distribution.manifest.v2+json"]
        for layer in client.get_manifest(container, allowed_media_type=types)["layers"]:
            client.download_blob(container, layer["digest"], layer["digest"][7:])
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


def _curl(program: Path, proxy: Proxy, order: Order) -> list[str | Path]:
    url = f"https://{REGISTRY}/v2/library/{order.model}/blobs/{order.layer}"
    return [program, "-sSfL", "-C", "-", "--proxy", proxy.url, "-o", order.layer[7:], url]


CLIENTS: Final = (
    Foreign("ramalama", "ramalama", _ramalama, lambda _proxy, _order: {"RAMALAMA_IN_CONTAINER": "false"}),
    Foreign(
        "ollama-downloader",
        "ollama-downloader",
        _downloader,
        lambda _proxy, _order: {"OD_SETTINGS_FILE": "settings.json"},
    ),
    Foreign("oras (Python)", "python", _oras),
    Foreign("curl -L -C -", "curl", _curl),
)
