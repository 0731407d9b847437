"""Foreign clients that know nothing of us, as pip installs them."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, MODEL
from tests.support.origin import Origin, Synthetic
from tests.support.proxy import Proxy


def program(name: str) -> Path:
    """An installed console script; its absence is no silent pass."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed in {path.parent}: install the extra `test`")
    return path


def gguf(size: int) -> bytes:
    """The smallest file that is a GGUF (magic, version 3, no tensors, no keys), padded."""
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + Synthetic(size - 24, 1).read(0, size - 24)


def ramalama(proxy: Proxy, store: Path, model: str) -> None:
    """`ramalama pull` with the proxy and our CA, and no other settings."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(store.parent),
        "HTTPS_PROXY": proxy.url,
        "SSL_CERT_FILE": str(proxy.ca_file),
        "RAMALAMA_IN_CONTAINER": "false",
    }
    command = [program("ramalama"), "--store", store, "--nocontainer", "pull", f"ollama://{model}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ramalama(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """ramalama pulls cold, from the store, and with the registry switched off; each byte came once."""
    data = gguf(20 * MB)
    layer = origin.add_blob(data)
    origin.add_model("library/tiny", "latest", layers=[(MODEL, layer)], config=origin.add_blob(b"{}"))
    for name in ("cold", "warm"):
        ramalama(proxy, tmp_path / name, "tiny")
    proxy.wait_for_line(f"recorded {layer[7:19]}")
    origin.stop()
    ramalama(proxy, tmp_path / "offline", "tiny")
    for name in ("cold", "warm", "offline"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.stat().st_size == len(data)]
        assert any(path.read_bytes() == data for path in files)
    assert origin.counters.cdn_bytes_by_digest[layer] == len(data)
