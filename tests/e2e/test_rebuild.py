"""The index is lost under the cache, or the store is a copy: an offline site goes on, private models stay closed."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import add_model, get, to_registry, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy
from tests.support.storefiles import blob_files

NewClient = Callable[..., A2Client]
MIB = 1 << 20


def without_index(proxy: Proxy) -> None:
    shutil.rmtree(proxy.store / "index")


def with_a_damaged_index(proxy: Proxy) -> None:
    path = proxy.store / "index" / "cache.db"
    data = bytearray(path.read_bytes())
    data[4096:8192] = os.urandom(4096)
    path.write_bytes(data)


def without_index_and_proofs(proxy: Proxy) -> None:
    """What a copy is that keeps no times."""
    without_index(proxy)
    for path in blob_files(proxy.store):
        os.utime(path, (1, 1))


@pytest.mark.parametrize("end", [pytest.param("stopped", marks=pytest.mark.long), "killed"])
@pytest.mark.parametrize(
    "lose",
    [
        without_index,
        pytest.param(with_a_damaged_index, marks=pytest.mark.long),
        pytest.param(without_index_and_proofs, marks=pytest.mark.long),
    ],
)
def test_an_offline_site_goes_on(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, lose: Callable[[Proxy], None], end: str
) -> None:
    """Every public model is pulled without a byte from upstream; a private one is nobody's."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="0s")
    models = [add_model(origin, unique(size)) for size in (3 * MIB, 20_000)]
    closed = add_model(origin, unique(10_000))
    client = new_client(proxy)
    for model in (*models, closed):
        client.pull(model.name)
        proxy.wait_for_line(model.recorded)
    origin.set_private(closed.repository, private=True)
    with to_registry(proxy) as connection:
        assert get(connection, closed.manifest_target)[0] in (401, 403)
    if end == "stopped":
        assert proxy.stop() == 0
    else:
        proxy.kill()
    lose(proxy)
    origin.stop()
    proxy.start()
    before = origin.counters.cdn_bytes
    for model in models:
        client = new_client(proxy)
        client.pull(model.name)
        assert_complete(client, model)
    assert origin.counters.cdn_bytes == before
    with to_registry(proxy) as connection:
        for target in (closed.manifest_target, closed.blob_target):
            status, _, body = get(connection, target)
            assert status >= 400
            assert closed.layer.encode() not in body


def by_cp(store: Path, copy: Path) -> None:
    subprocess.run(["cp", "-a", store, copy], check=True)


def by_rsync(store: Path, copy: Path) -> None:
    """Times are kept, owners and modes are the new machine's own, and the index is left out."""
    if shutil.which("rsync") is None:
        pytest.skip("NOT TESTED: a store copied by rsync, for want of rsync")
    subprocess.run(["rsync", "-rt", "--exclude=/index/", "--exclude=/control.sock", f"{store}/", copy], check=True)


def from_a_backup(store: Path, copy: Path) -> None:
    """An archive of an hour ago, unpacked where a store has been lost."""
    archive = copy.with_name("backup.tar")
    subprocess.run(["tar", "--exclude=./control.sock", "-C", store, "-cf", archive, "."], check=True)
    copy.mkdir()
    subprocess.run(["tar", "-C", copy, "-xf", archive], check=True)


@pytest.mark.skipif(os.name == "nt", reason="these programs are POSIX's")
@pytest.mark.parametrize(
    "copy", [by_cp, pytest.param(by_rsync, marks=pytest.mark.long), pytest.param(from_a_backup, marks=pytest.mark.long)]
)
def test_a_copy_is_as_good(
    origin: Origin,
    start_proxy: Callable[..., Proxy],
    new_client: NewClient,
    tmp_path: Path,
    copy: Callable[[Path, Path], None],
) -> None:
    """Every public model is pulled from it without a byte from upstream, and nothing is hashed for that."""
    proxy = start_proxy()
    models = [add_model(origin, unique(size)) for size in (3 * MIB, 20_000)]
    for model in models:
        new_client(proxy).pull(model.name)
        proxy.wait_for_line(model.recorded)
    proxy.stop()
    copy(proxy.store, tmp_path / "copy")
    origin.stop()
    proxy = start_proxy(ollama_cache_dir=tmp_path / "copy", ollama_cache_offline="true")
    before = origin.counters.cdn_bytes
    for model in models:
        client = new_client(proxy)
        client.pull(model.name)
        assert_complete(client, model)
    assert origin.counters.cdn_bytes == before
    assert not [line for line in proxy.output if "recorded " in line]
