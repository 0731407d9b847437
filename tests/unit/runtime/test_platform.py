"""platform: every fallback forced on this system, and held against the native way."""

import errno
import ipaddress
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from pullthrough.runtime import platform

DATA = b"0123456789abcdef"

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="the native way is POSIX")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux has it")


@contextmanager
def opened(path: Path, data: bytes = DATA) -> Iterator[int]:
    path.write_bytes(data)
    descriptor = platform.open_descriptor(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture(params=["native", "seeking"])
def positioned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's positioned calls, and where it has none, as on Windows."""
    if request.param == "seeking":
        monkeypatch.setattr(platform, "_HAS_POSITIONED_IO", False)
        for name in ("pread", "pwrite", "preadv", "pwritev"):
            monkeypatch.delattr(os, name, raising=False)
    elif not hasattr(os, "pread"):
        pytest.skip("no positioned calls here")
    return str(request.param)


# --- positioned reads and writes


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        pytest.param(0, 16, DATA, id="all"),
        pytest.param(4, 3, b"456", id="middle"),
        pytest.param(14, 99, b"ef", id="past the end"),
        pytest.param(16, 1, b"", id="at the end"),
        pytest.param(99, 1, b"", id="behind the end"),
        pytest.param(3, 0, b"", id="nothing"),
    ],
)
def test_read_at(tmp_path: Path, positioned: str, offset: int, size: int, expected: bytes) -> None:
    """The bytes at an offset, wherever the last read ended."""
    with opened(tmp_path / "file") as descriptor:
        assert platform.read_at(descriptor, 9, 2) == b"9a"
        assert platform.read_at(descriptor, offset, size) == expected


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        pytest.param(0, b"AB", b"AB23456789abcdef", id="start"),
        pytest.param(6, b"GHI", b"012345GHI9abcdef", id="middle"),
        pytest.param(15, b"PQ", b"0123456789abcdePQ", id="over the end"),
        pytest.param(18, b"S", b"0123456789abcdef\0\0S", id="behind the end: a hole"),
        pytest.param(18, b"", DATA, id="nothing"),
    ],
)
def test_write_at(tmp_path: Path, positioned: str, kind: type, offset: int, data: bytes, expected: bytes) -> None:
    """Bytes land at their offset, wherever the last call ended."""
    with opened(tmp_path / "file") as descriptor:
        platform.read_at(descriptor, 3, 9)
        platform.write_at(descriptor, offset, kind(data))
    assert (tmp_path / "file").read_bytes() == expected


def test_a_short_write_is_continued(tmp_path: Path, positioned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes three bytes at a time gets them all, each at its place."""
    if positioned == "native":
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    else:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    with opened(tmp_path / "file") as descriptor:
        platform.write_at(descriptor, 5, b"FGHIJKLMNOPQ")
    assert (tmp_path / "file").read_bytes() == b"01234FGHIJKLMNOPQ"


def test_a_failed_write_says_why(tmp_path: Path, positioned: str) -> None:
    """The system's own error reaches the caller, and the next call is not held up by it."""
    with opened(tmp_path / "file") as descriptor:
        reading = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            platform.write_at(reading, 0, b"x")
        assert caught.value.errno == errno.EBADF
        os.close(reading)
        with pytest.raises(OSError, match="Bad file descriptor"):
            platform.read_at(reading, 0, 1)
        platform.write_at(descriptor, 0, b"X")
        assert platform.read_at(descriptor, 0, 2) == b"X1"


def test_threads_share_a_descriptor(tmp_path: Path, positioned: str) -> None:
    """Writes and reads of several threads through one descriptor never land at each other's offset."""
    block, blocks, workers = 64, 400, 4
    start = threading.Barrier(workers)

    def expected(index: int) -> bytes:
        return index.to_bytes(4) * (block // 4)

    def work(worker: int) -> list[int]:
        start.wait()
        mine = range(worker, blocks, workers)
        for index in mine:
            platform.write_at(descriptor, index * block, expected(index))
            platform.read_at(descriptor, (blocks - 1 - index) * block, block)
        return [index for index in mine if platform.read_at(descriptor, index * block, block) != expected(index)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with opened(tmp_path / "file", b"") as descriptor, ThreadPoolExecutor(workers) as pool:
            assert [*pool.map(work, range(workers))] == [[]] * workers
    finally:
        sys.setswitchinterval(interval)
    assert (tmp_path / "file").read_bytes() == b"".join(map(expected, range(blocks)))


@pytest.mark.parametrize(("offset", "size"), [(0, 16), (4, 3), (14, 99), (99, 1)])
def test_read_into_agrees_with_read_at(tmp_path: Path, positioned: str, offset: int, size: int) -> None:
    """The same bytes at the beginning of the buffer, and how many they are."""
    with opened(tmp_path / "file") as descriptor:
        buffer = bytearray(b"?" * size)
        count = platform.read_into(descriptor, memoryview(buffer), offset)
        expected = platform.read_at(descriptor, offset, size)
    assert (count, bytes(buffer)) == (len(expected), expected.ljust(size, b"?"))


# --- descriptors and durability


@posix_only
def test_open_descriptor(tmp_path: Path) -> None:
    """Others read nothing, the group does not write, and programs we start do not inherit it."""
    umask = os.umask(0)
    try:
        descriptor = platform.open_descriptor(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    finally:
        os.umask(umask)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o640
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_open_descriptor_is_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would else translate line ends."""
    calls: list[tuple[Path, int]] = []
    monkeypatch.setattr(os, "O_BINARY", 1 << 30, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags, mode: calls.append((path, flags)))
        platform.open_descriptor(tmp_path / "file", os.O_RDONLY)
    assert [(path, bool(flags & 1 << 30)) for path, flags in calls] == [(tmp_path / "file", True)]


@pytest.mark.parametrize("way", ["fdatasync", "fsync", "F_FULLFSYNC"])
def test_sync_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The strongest call of the system, on that very descriptor."""
    fcntl = pytest.importorskip("fcntl")
    calls: list[tuple[str, int]] = []
    with opened(tmp_path / "file") as descriptor, monkeypatch.context() as patch:
        patch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        patch.setattr(fcntl, "fcntl", lambda fd, command: calls.append(("F_FULLFSYNC" if command == 51 else "?", fd)))
        patch.setattr(os, "fdatasync", lambda fd: calls.append(("fdatasync", fd)), raising=False)
        patch.setattr(os, "fsync", lambda fd: calls.append(("fsync", fd)))
        patch.setattr(sys, "platform", "darwin" if way == "F_FULLFSYNC" else "linux")
        if way == "fsync":
            patch.delattr(os, "fdatasync")
        platform.sync_data(descriptor)
        expected = [(way, descriptor)]
    assert calls == expected


@posix_only
def test_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself is flushed, by a descriptor that is closed again even if that fails."""
    synced: list[tuple[int, os.stat_result]] = []

    def fsync(descriptor: int) -> None:
        synced.append((descriptor, os.fstat(descriptor)))
        if len(synced) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    platform.sync_folder(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        platform.sync_folder(tmp_path)
    assert [os.path.samestat(stat, tmp_path.stat()) for _, stat in synced] == [True, True]
    for descriptor, _ in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_folders_cannot_be_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is not even tried: NTFS journals its names."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        platform.sync_folder(tmp_path / "absent")


# --- the lock


HOLD = """
import sys
import tempfile
from pathlib import Path
from pullthrough.runtime import platform
file = Path(sys.argv[1]).open("a+b")
print(platform.lock_exclusively(file), flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(path: Path, *, kill: bool = False) -> Iterator[str]:
    """Another process that tries to lock the file and holds it until the end of the block; what the try said."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(platform.__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        if kill:
            process.kill()


def test_another_process_has_the_lock(tmp_path: Path) -> None:
    """One holder at a time; whoever ends, however it ends, leaves the lock free."""
    path = tmp_path / "lock"
    with path.open("a+b") as file:
        with other_process(path) as got:
            assert got == "True"
            assert not platform.lock_exclusively(file)
        assert platform.lock_exclusively(file)
        with other_process(path) as got:
            assert got == "False"
    with other_process(path, kill=True) as got:
        assert got == "True"
    with path.open("a+b") as file:
        assert platform.lock_exclusively(file)


def test_the_lock_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte, without waiting; a refusal is an answer, not an error."""
    calls: list[tuple[int, int, int]] = []

    def locking(descriptor: int, mode: int, size: int) -> None:
        calls.append((descriptor, mode, size))
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with (tmp_path / "lock").open("a+b") as file:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "win32")
            results = [platform.lock_exclusively(file) for _ in range(2)]
        assert (results, calls) == ([True, False], [(file.fileno(), 2, 1)] * 2)


# --- the boot


@linux_only
def test_boot_id_of_the_kernel() -> None:
    """The kernel's own random name of this boot, without its line end."""
    assert platform.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().rstrip("\n")


def test_boot_id_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the second of the boot: the same all through a process, and for the next one after another boot."""

    def refuse(path: Path) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    boots = iter((1_790_000_000.2, 1_789_999_999.9, 1_790_000_900.0))
    monkeypatch.setattr(psutil, "boot_time", lambda: next(boots))
    found = []
    for _ in range(3):
        platform.boot_id.cache_clear()  # as another process
        found += [platform.boot_id(), platform.boot_id()]
    platform.boot_id.cache_clear()
    assert found == ["1790000000"] * 4 + ["1790000900"] * 2


# --- addresses


class Entry(NamedTuple):
    """As psutil.net_if_addrs lists one."""

    address: str
    netmask: str | None = None
    family: int = socket.AF_INET
    broadcast: str | None = None
    ptp: str | None = None


def six(address: str, netmask: str | None, **more: str) -> Entry:
    return Entry(address, netmask, socket.AF_INET6, **more)


def set_entries(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {f"eth{n}": [entry] for n, entry in enumerate(entries)})


LINK = Entry("02:fc:00:00:00:01", None, getattr(socket, "AF_PACKET", -1))


def test_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """IP addresses of all interfaces, without zones; an address needs no netmask to be ours."""
    set_entries(
        monkeypatch,
        LINK,
        Entry("127.0.0.1", "255.0.0.0"),
        Entry("192.0.2.2", None),
        Entry("10.8.0.6", "255.255.255.255", ptp="10.8.0.5"),
        six("fe80::fc:ff:fe00:1%eth0", "ffff:ffff:ffff:ffff::"),
        six("2001:db8::2", None),
    )
    expected = {"127.0.0.1", "192.0.2.2", "10.8.0.6", "fe80::fc:ff:fe00:1", "2001:db8::2"}
    assert platform.own_addresses() == expected


def test_own_addresses_of_this_machine() -> None:
    """What really is there can be parsed, and loopback is among it."""
    addresses = platform.own_addresses()
    assert all(ipaddress.ip_address(address) for address in addresses)
    assert addresses & {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        pytest.param(Entry("192.0.2.2", "255.255.255.0"), "192.0.2.0/24", id="v4"),
        pytest.param(Entry("10.1.2.3", "255.255.254.0"), "10.1.2.0/23", id="v4, not on an octet"),
        pytest.param(Entry("10.1.2.3", "255.0.0.0"), "10.0.0.0/8", id="widest v4"),
        pytest.param(Entry("10.1.2.3", "254.0.0.0"), None, id="too wide v4"),
        pytest.param(Entry("10.1.2.3", "0.0.0.0"), None, id="/0 v4"),
        pytest.param(Entry("10.1.2.3", None), None, id="no netmask v4"),
        pytest.param(Entry("10.1.2.3", ""), None, id="empty netmask v4"),
        pytest.param(Entry("10.1.2.3", "24"), None, id="malformed netmask v4"),
        pytest.param(Entry("10.1.2.3", "255.255.256.0"), None, id="netmask out of range"),
        pytest.param(Entry("10.1.2", "255.255.255.0"), None, id="malformed address v4"),
        pytest.param(Entry("", "255.255.255.0"), None, id="no address v4"),
        pytest.param(Entry("10.1.2.3", "ffff:ffff:ffff:ffff::"), None, id="netmask of the other family"),
        pytest.param(six("2001:db8::2", "ffff:ffff:ffff:ffff::"), "2001:db8::/64", id="v6"),
        pytest.param(six("fe80::1%eth0", "ffff:ffff:ffff:ffff::"), "fe80::/64", id="v6 with zone"),
        pytest.param(six("fe80::1%12", "ffff:ffff:ffff:ffff::"), "fe80::/64", id="v6 with numeric zone"),
        pytest.param(six("2001:db8::2", "ffff:ffff::"), "2001:db8::/32", id="widest v6"),
        pytest.param(six("2001:db8::2", "ffff:fffe::"), None, id="too wide v6"),
        pytest.param(six("2001:db8::2", "::"), None, id="/0 v6"),
        pytest.param(six("2001:db8::2", None), None, id="no netmask v6"),
        pytest.param(six("2001:db8::2", "ffff:ffff:ffff:ffff"), None, id="malformed netmask v6"),
        pytest.param(LINK, None, id="hardware address"),
        pytest.param(Entry("192.0.2.2", "255.255.255.0", -1), None, id="another family"),
    ],
)
def test_local_networks(monkeypatch: pytest.MonkeyPatch, entry: Entry, expected: str | None) -> None:
    """The network of one interface; none where there is none, and never the whole Internet."""
    set_entries(monkeypatch, entry)
    assert platform.local_networks() == ((ipaddress.ip_network(expected),) if expected else ())


@pytest.mark.parametrize(
    ("entry", "outsider"),
    [
        pytest.param(Entry("10.8.0.6", "255.255.255.255", ptp="10.8.0.5"), "10.8.0.5", id="v4 tunnel"),
        pytest.param(
            six("2001:db8::6", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", ptp="2001:db8::5"), "2001:db8::5", id="v6"
        ),
    ],
)
def test_point_to_point(monkeypatch: pytest.MonkeyPatch, entry: Entry, outsider: str) -> None:
    """The far end of a tunnel is not on this machine's network."""
    set_entries(monkeypatch, entry)
    assert not any(ipaddress.ip_address(outsider) in network for network in platform.local_networks())


def test_a_bad_entry_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One interface that makes no sense costs only itself."""
    good = (Entry("192.0.2.2", "255.255.255.0"), six("fd00::2", "ffff:ffff:ffff:ffff::"))
    set_entries(monkeypatch, Entry("10.1.2", "x"), good[0], Entry("10.1.2.3", "0.0.0.0"), LINK, good[1])
    expected = (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("fd00::/64"))
    assert platform.local_networks() == expected


def test_networks_come_and_go() -> None:
    """They are looked at again when they are older than the caller can bear, and not before."""
    now, there = 0.0, [(ipaddress.ip_network("192.0.2.0/24"),)]
    networks = platform.LocalNetworks(lambda: there[0], lambda: now)
    assert networks.known(age_s=10) == there[0]
    there[0] = (ipaddress.ip_network("198.51.100.0/24"),)
    now = 5.0
    assert networks.known(age_s=10) == (ipaddress.ip_network("192.0.2.0/24"),)
    assert networks.known(age_s=1) == networks.known(age_s=10) == there[0]
    there[0] = ()
    now = 15.5
    assert networks.known(age_s=10) == ()


def test_more_descriptors_are_allowed() -> None:
    """The soft limit goes up to what is wanted or to the hard one, and never down."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert platform.allow_descriptors(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert platform.allow_descriptors(200) == 200
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        if hard != resource.RLIM_INFINITY:
            assert platform.allow_descriptors(hard + 1) == hard
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"/proc/1/cgroup": "0::/\n"}, False),
        ({"/proc/1/cgroup": "0::/init.scope\n"}, False),
        ({"/.dockerenv": ""}, True),
        ({"/run/.containerenv": "engine=podman"}, True),
        ({"/run/systemd/container": "lxc"}, True),
        ({"/proc/1/cgroup": "11:memory:/kubepods/besteffort/pod1\n"}, True),
    ],
)
def test_containers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    """What each kind of container leaves in its file system; none of it elsewhere."""
    for name, text in files.items():
        path = tmp_path / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(platform, "Path", lambda name: tmp_path / name[1:])
    assert platform.in_container() is expected
