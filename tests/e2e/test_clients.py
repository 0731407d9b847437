"""Foreign clients that know nothing of us, as pip installs them."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, add_model, unique
from tests.support.origin import Origin
from tests.support.proxy import Proxy


def program(name: str) -> Path:
    """An installed console script; its absence is no silent pass."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed in {path.parent}: install the extra `test`")
    return path


def gguf(size: int) -> bytes:
    """The smallest file that is a GGUF (magic, version 3, no tensors, no keys), padded."""
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + unique(size - 24).read(0, size - 24)


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
    model = add_model(origin, data)
    for name in ("cold", "warm"):
        ramalama(proxy, tmp_path / name, model.name)
    proxy.wait_for_line(model.recorded)
    origin.stop()
    ramalama(proxy, tmp_path / "offline", model.name)
    for name in ("cold", "warm", "offline"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.stat().st_size == len(data)]
        assert any(path.read_bytes() == data for path in files)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == len(data)
