"""A store on the disks that people have: exFAT and FAT by FUSE drivers, one that is read-only, one that is full.

What this machine does not let us mount is skipped, and says so.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, add_model, canonical, get, to_cdn, to_registry, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import PROGRAM, Proxy, StartFailed
from tests.support.storefiles import blob_file

NewClient = Callable[..., A2Client]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts are Linux's here")


def run(*words: str | Path) -> str:
    """Run a program; its output. Skips where it cannot be had or does not do it."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"NOT TESTED: there is no {words[0]}")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: {' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


@contextmanager
def exfat(folder: Path, size: int) -> Iterator[Path]:
    """A new exFAT disk."""
    image, mounted = folder / "exfat.img", folder / "exfat"
    image.touch()
    os.truncate(image, size)
    mounted.mkdir()
    run("mkfs.exfat", image)
    device = run("losetup", "--find", "--show", image)
    try:
        run("mount.exfat-fuse", device, mounted)
        try:
            yield mounted
        finally:
            subprocess.run(["umount", "--lazy", mounted], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def poor_fat(folder: Path, size: int) -> Iterator[Path]:
    """A new FAT disk, by a driver that cannot write to a file that was renamed, and holds no database."""
    image, mounted = folder / "fat.img", folder / "fat"
    image.touch()
    os.truncate(image, size)
    mounted.mkdir()
    run("mkfs.vfat", "-F", "32", image)
    run("fusefat", "-o", "rw+", image, mounted)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


@contextmanager
def asking(proxy: Proxy, address: str) -> Iterator[list[float]]:
    """Ask for the first bytes of a blob again and again; how many seconds each answer took."""
    over, waited = threading.Event(), []

    def ask() -> None:
        while not over.wait(0.2):
            began = time.monotonic()
            with to_cdn(proxy) as connection:
                assert get(connection, address, Range="bytes=0-999")[0] == 206
            waited.append(time.monotonic() - began)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            yield waited
        finally:
            over.set()
            asked.result()


@pytest.mark.parametrize(
    ("new_disk", "size"),
    [
        pytest.param(exfat, 96 * MB, id="exFAT 96 MB", marks=pytest.mark.long),
        pytest.param(exfat, 1 << 30, id="exFAT 1 GiB", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
def test_a_disk_that_fills_gaps(
    origin: Origin,
    start_proxy: Callable[..., Proxy],
    new_client: NewClient,
    tmp_path: Path,
    new_disk: Callable[[Path, int], AbstractContextManager[Path]],
    size: int,
) -> None:
    """16 parts of a blob come at once, none of them waits for zeros to be written, and the blob is a hit afterwards.

    Whoever asks for some bytes meanwhile gets them in time, until the blob is whole and while it is put in order.
    """
    with new_disk(tmp_path, 3 * size) as disk:
        proxy = start_proxy(ollama_cache_dir=disk / "store")
        model = add_model(origin, unique(size))
        client = new_client(proxy, min_part=size // 16, max_part=size // 16)
        with asking(proxy, canonical(proxy, model)) as waited:
            report = client.pull(model.name)
            assert_complete(client, model)
            line = proxy.wait_for_line(model.recorded, timeout_s=20 + size / (5 * MB))  # it is put in order
        lines = "".join(proxy.output)
        hungry = [told for told in proxy.output if "has waited" in told]
        print(f"longest wait of a part {report.max_gap_s:.1f} s, of others {max(waited):.1f} s; {line}", *hungry)
        assert report.retries == report.stalls == 0
        assert report.max_gap_s < 10
        assert max(waited) < 10
        assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.02
        assert "fills gaps with zeros" in lines
        before = origin.counters.cdn_bytes
        client = new_client(proxy)
        client.pull(model.name)
        assert_complete(client, model)
        assert origin.counters.cdn_bytes == before
        assert os.listdir(disk / "store" / "ingest") == []  # noqa: PTH208 -- a list is compared
        proxy.stop()


@pytest.mark.long
def test_a_disk_that_is_no_use(start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """The start is refused with the reason and what to do."""
    with poor_fat(tmp_path, 64 * MB) as disk, pytest.raises(StartFailed, match=r"fuse.fusefat.*use another disk"):
        start_proxy(ollama_cache_dir=disk / "store")


def in_namespace(commands: str) -> list[str | Path]:
    """mitmdump in a mount namespace of its own, after these commands. Skips where that is refused."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    run(*unshare, "sh", "-ec", commands)
    return [*unshare, "sh", "-ec", f'{commands}; exec "$@"', "sh", *PROGRAM]


def fill(path: Path) -> None:
    """Take what the disk has left."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def refusal_of(url: str) -> bytes:
    """The text of a 503, which comes once what was seen of the disk before is old."""
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            return error.read()
        time.sleep(0.05)
    raise AssertionError(f"expected a 503 of {url}")


@pytest.mark.parametrize("disk", [pytest.param("read-only", marks=pytest.mark.long), "full"])
def test_a_disk_that_takes_nothing_at_start(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path, disk: str
) -> None:
    """What is stored is a hit, everything else is passed through; log and readiness say why."""
    store = tmp_path / "proxy" / "store"
    proxy = start_proxy()
    stored, other = add_model(origin, unique(2 * MB)), add_model(origin, unique(2 * MB))
    new_client(proxy).pull(stored.name)
    proxy.wait_for_line(stored.recorded)
    proxy.stop()
    if disk == "full":
        commands = (
            f"cp -a '{store}' '{tmp_path}/copy'; mount -t tmpfs -o size=16m,mode=755 tmpfs '{store}'; "
            f"cp -a '{tmp_path}/copy/.' '{store}'; rm -r '{tmp_path}/copy'; "
            f"(cat /dev/zero > '{store}/public/other' || true) 2>/dev/null"
        )
    else:
        commands = f"mount --bind '{store}' '{store}'; mount -o remount,bind,ro '{store}'"
    proxy = start_proxy(program=in_namespace(commands), front=True)
    proxy.wait_for_line("nothing can be written now")
    before = origin.counters.cdn_bytes
    client = new_client(proxy)
    client.pull(stored.name)
    assert_complete(client, stored)
    assert origin.counters.cdn_bytes == before
    client = new_client(proxy)
    client.pull(other.name)
    assert_complete(client, other)
    assert not blob_file(store, other.layer.replace(":", "-")).exists()
    if disk == "full":
        # What was removed meanwhile may have left a page.
        fill(Path(f"/proc/{proxy.pid}/root{store}/public/more"))
    assert b"store: " in refusal_of(f"http://127.0.0.1:{proxy.front_port}/readyz")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_share(origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path) -> None:
    """16 parts of a GiB come at once, nobody waits long, and the blob is a hit; a second cache on it is refused."""
    size = 1 << 30
    for name in ("source", "share"):
        (tmp_path / name).mkdir()
    with share_of(tmp_path / "source", tmp_path / "share"):
        options = {"ollama_cache_dir": tmp_path / "share" / "store", "ollama_cache_index_dir": tmp_path / "index"}
        proxy = start_proxy(**options)
        model = add_model(origin, unique(size))
        client = new_client(proxy, min_part=size // 16, max_part=size // 16)
        with asking(proxy, canonical(proxy, model)) as waited:
            report = client.pull(model.name)
            assert_complete(client, model)
            line = proxy.wait_for_line(model.recorded, timeout_s=60)
        print(f"longest wait of a part {report.max_gap_s:.1f} s, of others {max(waited):.1f} s; {line}")
        assert report.retries == report.stalls == 0
        assert max(report.max_gap_s, *waited) < 10
        with pytest.raises(StartFailed, match=r"in use by process \d+ on"):
            start_proxy(**options | {"ollama_cache_index_dir": tmp_path / "other index"})
        before = origin.counters.cdn_bytes
        client = new_client(proxy)
        client.pull(model.name)
        assert_complete(client, model)
        assert origin.counters.cdn_bytes == before
        assert not list((tmp_path / "source").rglob("cache.db"))
        proxy.stop()


@pytest.mark.long
def test_a_share_that_hangs(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """Its server has gone: everything else goes on, pulls go past the disk, and readiness tells; until it is back."""
    (tmp_path / "source").mkdir()
    (tmp_path / "share").mkdir()
    with share_of(tmp_path / "source", tmp_path / "share") as server:
        options = {"ollama_cache_dir": tmp_path / "share" / "store", "ollama_cache_index_dir": tmp_path / "index"}
        proxy = start_proxy(front=True, **options)
        stored, other = add_model(origin, unique(2 * MB)), add_model(origin, unique(2 * MB))
        new_client(proxy).pull(stored.name)
        proxy.wait_for_line(stored.recorded)
        ready = f"http://127.0.0.1:{proxy.front_port}/readyz"
        urllib.request.urlopen(ready, timeout=10).close()
        server.send_signal(signal.SIGSTOP)
        try:
            for model in (stored, other):
                client = new_client(proxy)
                client.pull(model.name)
                assert_complete(client, model)
            assert b"store: no answer" in refusal_of(ready)
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as tunnel:
                tunnel.sendall(b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1:9\r\n\r\n")
                assert tunnel.recv(1000).startswith(b"HTTP/1.1 403 ")  # at once, as ever
            with to_registry(proxy) as connection:
                assert get(connection, stored.manifest_target)[0] == 200
            assert time.monotonic() - began < 2
        finally:
            server.send_signal(signal.SIGCONT)
        proxy.wait_for_line("disk answers again")
        before = origin.counters.cdn_bytes
        client = new_client(proxy)
        client.pull(stored.name)
        assert_complete(client, stored)
        assert origin.counters.cdn_bytes == before
        proxy.stop()


@contextmanager
def share_of(source: Path, mounted: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The folder by a driver outside the kernel, as a share is; the process that answers for it."""
    if shutil.which("bindfs") is None:
        pytest.skip("NOT TESTED: there is no bindfs")
    server = subprocess.Popen(["bindfs", "-f", source, mounted])
    try:
        deadline = time.monotonic() + 10
        while not mounted.is_mount():
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.skip("NOT TESTED: bindfs mounts nothing here")
            time.sleep(0.05)
        yield server
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=False)
        server.terminate()
        server.wait(10)
