"""What differs between operating systems: positioned reads and writes, durability, locks, boot identity, addresses.

Invariant: every function works everywhere that Python does; where a system lacks a call the fallback is slower or
weaker, and the docstring says so.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import ipaddress
import math
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import psutil

from pullthrough.config.settings import Network

_FICLONE = 0x40049409  # linux/fs.h
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A flag of os.open: fail if the last part of the path is a link. 0 on Windows."""

# Without pread and pwrite (Windows) a descriptor's position is shared state: calls on it must not overlap. One lock
# for all descriptors is enough, because the disk serialises the calls anyway.
_HAS_POSITIONED_IO = hasattr(os, "pread") and hasattr(os, "pwrite")
_position = threading.Lock()


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Read up to `size` bytes at `offset`; may block on the disk."""
    if sys.platform != "win32" and _HAS_POSITIONED_IO:
        return os.pread(descriptor, size, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` from `offset`; returns the byte count, 0 at the end of the file. May block on the disk."""
    if sys.platform != "win32" and hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = read_at(descriptor, offset, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `offset`; may block on the disk. Raises OSError if the system refuses."""
    view = memoryview(data)
    while view:
        count = _write_some(descriptor, offset, view)
        offset += count
        view = view[count:]


def _write_some(descriptor: int, offset: int, view: memoryview) -> int:
    if sys.platform != "win32" and _HAS_POSITIONED_IO:
        return os.pwrite(descriptor, view, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def open_descriptor(path: Path, flags: int) -> int:
    """Call os.open for binary data; a new file is readable and writable by the owner, readable by the group."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0), 0o640)


def cores() -> int:
    """Return how many cores this process may use; if the system does not tell, how many there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_regular(path: Path) -> int:
    """Open an existing file to read. Raises OSError if it is a link (ELOOP) or another non-regular file (EINVAL).

    Windows has neither O_NOFOLLOW nor O_NONBLOCK: there only the check beforehand finds a link.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "expected a regular file, got a link", str(path))
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = open_descriptor(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "expected a regular file, got another kind", str(path))
    return descriptor


def reflink(source: int, target: int) -> bool:
    """Make the file `target` share the blocks of `source` (copy-on-write); False if that is not possible.

    Linux on btrfs, XFS and bcachefs within one file system (FICLONE, ioctl_ficlone(2)); elsewhere False.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        # The reason does not matter: the caller's copy works, or reports what is wrong.
        return False
    return True


def sync_data(descriptor: int) -> None:
    """Make the file's bytes durable (F_FULLFSYNC on macOS, where fsync only reaches the drive's cache)."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make renames within the folder durable, if the file system can (some FUSE drivers cannot).

    Does nothing on Windows, which cannot open folders: NTFS journals its metadata itself.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def lock_exclusively(file: BinaryIO) -> bool:
    """Try to lock the open file for this process until it is closed; False if another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)  # it locks the byte at the position
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_folder(path: Path) -> int | None:
    """Return a descriptor of the folder for locking; None on Windows, which cannot open folders."""
    if sys.platform == "win32":
        return None
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def lock_folder(descriptor: int) -> bool:
    """Lock the open folder until it is closed; False if another process has it.

    True without a lock if the file system cannot lock folders (NFS).
    """
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def sync_all() -> None:
    """Make everything written to any disk durable. Does nothing on Windows, where files are flushed one by one."""
    if hasattr(os, "sync"):
        os.sync()


def become_owner(path: Path) -> None:
    """Switch from root to the user who owns the existing path: that user's links then lead us only where the user may
    go, and the files we make belong to the user."""
    if sys.platform == "win32" or os.geteuid() != 0 or not path.exists():
        return
    status = path.stat()
    if status.st_uid != 0:
        os.setgroups([])
        os.setegid(status.st_gid)
        os.seteuid(status.st_uid)


def release_memory() -> None:
    """Collect garbage, and return free memory to the system. Takes some tens of milliseconds.

    Only glibc keeps free memory until told otherwise (malloc_trim(3)); elsewhere collecting is enough.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


def allow_descriptors(wanted: int) -> int:
    """Raise this process's limit on open files as far towards `wanted` as allowed; returns how many it may have.

    Many systems allow only 1024 by default. Windows has no such limit.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < allowed:
        # macOS reports no hard limit, but has one.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def descriptors() -> int:
    """Return how many files and sockets this process may have open."""
    if sys.platform == "win32":
        return 8192
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def free_memory() -> int:
    """Return the bytes that programs can get without swapping; in a control group, at most its limit."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available


@functools.cache
def boot_id() -> str:
    """Return an id that changes with every boot of the machine.

    Outside Linux this is the boot time, which setting the clock may shift: a partial then counts only as far as it was
    flushed.
    """
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{psutil.boot_time():.0f}"


def lower_priority() -> None:
    """Lower the priority of the calling thread.

    Only on Linux, where each thread has its own nice value, which also counts for disk reads (ioprio_set(2)); elsewhere
    it belongs to the process, and this does nothing. 10 still leaves a tenth of a busy core: a thread with hardly any
    CPU time might hold the GIL for long.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread)))


def in_container() -> bool:
    """Return whether this process runs in a container, as far as Docker, Podman, Kubernetes, LXC and systemd tell.

    A container that shares its host's network looks the same as one with its own.
    """
    if any(Path(path).exists() for path in ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")):
        return True
    with contextlib.suppress(OSError):
        # Under cgroups version 1 the file names the container; under version 2 it reads "0::/".
        groups = Path("/proc/1/cgroup").read_text()
        return any(word in groups for word in ("docker", "kubepods", "libpod", "containerd", "lxc"))
    return False


def address_towards(host: str, port: int) -> str | None:
    """Return this machine's address on the route to another one; None if there is no route. Sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return None


def own_addresses() -> frozenset[str]:
    """Return the IP addresses of this machine's interfaces."""
    return frozenset(
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    )


def lan_address() -> str:
    """Return the address of the interface that leads to other networks, or loopback if none does."""
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Nothing is sent to these addresses, which are for documentation (RFC 5737, RFC 3849).
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((elsewhere, 9))
            return str(sock.getsockname()[0])
    return "127.0.0.1"


def local_networks() -> tuple[Network, ...]:
    """Return the networks this machine's interfaces are on, without point-to-point and malformed entries."""
    networks: list[Network] = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6) or not entry.netmask or entry.ptp:
                continue
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                mask = ipaddress.ip_address(entry.netmask)
                prefix = int(mask).bit_count()
                gapless = int(mask) == (1 << mask.max_prefixlen) - (1 << (mask.max_prefixlen - prefix))
                # A prefix that short is no real network: a /0 would admit the whole Internet.
                if mask.version == address.version and gapless and prefix >= (8 if address.version == 4 else 32):
                    networks.append(ipaddress.ip_network(f"{address}/{prefix}", strict=False))
    return tuple(networks)


class LocalNetworks:
    """The networks of this machine's interfaces, which come and go: a new prefix, a lease, a VPN."""

    def __init__(
        self, read: Callable[[], tuple[Network, ...]] = local_networks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` returns monotonic seconds."""
        self._read = read
        self._clock = clock
        self._known: tuple[Network, ...] = ()
        self._read_at = -math.inf

    def known(self, *, age_s: float) -> tuple[Network, ...]:
        """Return the networks as they were at most `age_s` seconds ago."""
        if (now := self._clock()) - self._read_at > age_s:
            self._known, self._read_at = self._read(), now
        return self._known


def allocated(status: os.stat_result) -> int:
    """Return the disk space that a file takes (bytes): less than its size if it has holes."""
    if sys.platform == "win32":  # does not tell
        return status.st_size
    # st_blocks counts 512-byte units, whatever the file system's block size.
    return status.st_blocks * 512
