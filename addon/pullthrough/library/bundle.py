"""A bundle: models in one tar file, in an order that lets it be read and written as a stream.

    SHA256SUMS                                      one line `<hex>  <path>` for each member that follows, in order
    manifests/<host>/<namespace>/<model>/<tag>      all manifests, and anchors of lists (see ollama_dir)
    manifests-v2/<host>/<namespace>/<model>/<tag>   all lists, as bytes: there are no links
    blobs/sha256-<hex>                              all blobs that they list, the lists too

Unpacked it is a models folder of Ollama, which `sha256sum -c SHA256SUMS` checks. Headers are ustar (POSIX.1-1988; sizes
from 8 GiB in base 256, as GNU tar and bsdtar write and read them); owner, time and padding are zeros. Invariant: a
header is accepted only if it is byte for byte what `header` writes for that name and size: so there are no links,
devices, extensions or other places to hide something.
"""

import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from pullthrough.core.digest import Digest
from pullthrough.core.errors import TransferRefused
from pullthrough.core.records import Name
from pullthrough.store.ollama_dir import document_path, manifest_path, parse_blob_path, parse_manifest_path

SUMS: Final = "SHA256SUMS"
BLOCK: Final = tarfile.BLOCKSIZE
END: Final = bytes(2 * BLOCK)
LONGEST_SUMS: Final = 64 << 20
"""Bytes of SHA256SUMS: some 300 000 members."""
_USTAR_LIMIT: Final = 8 << 30
_PACKED: Final = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\x03\x04")
"""The first bytes of gzip, zstd, xz, bzip2 and zip."""
_LINE: Final = re.compile(r"([0-9a-f]{64})  (\S+)")


def header(path: str, size: int) -> bytes:
    """Return the header of a member. Raises TransferRefused for a path that ustar cannot hold."""
    info = tarfile.TarInfo(path)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT if size < _USTAR_LIMIT else tarfile.GNU_FORMAT, "ascii", "strict")
    except ValueError as error:
        raise TransferRefused(f"expected a path that fits the header of a tar member, got {path!r}") from error


def padding(size: int) -> bytes:
    """Return the bytes that fill the last block of a member of that size."""
    return bytes(-size % BLOCK)


def sums(members: Mapping[str, str]) -> bytes:
    """Return the text of SHA256SUMS, the first member, from path → hexadecimal sha256, in order."""
    return "".join(f"{digest}  {path}\n" for path, digest in members.items()).encode("ascii")


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a bundle, and where its bytes are."""

    path: str
    sha256: str
    """The digest in SHA256SUMS."""
    offset: int
    size: int
    name: Name | None
    """The name of the model, if the member is a manifest or list."""
    digest: Digest | None
    """The digest, if the member is a blob."""

    @property
    def is_document(self) -> bool:
        """Whether it is in the new tree: a list, not a manifest or an anchor."""
        return self.name is not None and self.path == document_path(self.name)


def read_members(file: BinaryIO) -> list[Member]:
    """Return the members of a seekable bundle, reading only headers, padding and sums. Raises TransferRefused if it is
    not a complete bundle.
    """
    length = file.seek(0, 2)
    file.seek(0)
    if file.read(max(map(len, _PACKED))).startswith(_PACKED):
        raise TransferRefused("expected a bundle, got a compressed file: unpack it first, as with gunzip or zstd -d")
    file.seek(0)
    path, size = _next(file, length) or ("nothing", 0)
    if path != SUMS:
        raise TransferRefused(f"expected a bundle, whose first member is {SUMS}, got {path!r:.200}; unpack it first")
    if size > LONGEST_SUMS:
        raise TransferRefused(f"expected {SUMS} of at most {LONGEST_SUMS} bytes, got {size}")
    expected = _parse_sums(file.read(size))
    _skip_padding(file, size)
    members = []
    for wanted, digest in expected.items():
        path, size = _next(file, length) or ("the end", 0)
        if path != wanted:
            raise TransferRefused(f"expected {wanted} next, as in {SUMS}, got {path!r:.200}")
        blob = parse_blob_path(path)
        members.append(Member(path, digest, file.tell(), size, _name_of(path), blob))
        file.seek(size, 1)
        _skip_padding(file, size)
    if (extra := _next(file, length)) is not None:
        raise TransferRefused(f"expected the end of the bundle, got {extra[0]!r:.200}, which is not in {SUMS}")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise TransferRefused("expected nothing behind the end of the bundle, got more bytes")
    return members


def _parse_sums(text: bytes) -> dict[str, str]:
    try:
        lines = text.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise TransferRefused(f"{SUMS}: expected ASCII, got byte {text[error.start]:#x}") from None
    if lines.pop() != "":
        raise TransferRefused(f"{SUMS}: expected a newline at the end, got none")
    members: dict[str, str] = {}
    seen: set[str] = set()
    for line in lines:
        match = _LINE.fullmatch(line)
        path = match[2] if match else ""
        blob = parse_blob_path(path)
        if match is None or (blob is None and _name_of(path) is None):
            raise TransferRefused(f"{SUMS}: expected a sum and the path of a manifest or blob, got {line!r:.200}")
        # On a file system that ignores case two spellings are one file.
        if path.lower() in seen:
            raise TransferRefused(f"{SUMS}: expected each path once, got {path!r:.200} again")
        if blob is not None and blob.hex != match[1]:
            raise TransferRefused(f"{SUMS}: expected {path} to have the sum of its name, got {match[1]}")
        seen.add(path.lower())
        members[path] = match[1]
    return members


def _name_of(path: str) -> Name | None:
    """Return the model whose manifest or list has this path; None for a path in another spelling."""
    name = parse_manifest_path(path)
    return name if name is not None and path in (manifest_path(name), document_path(name)) else None


def _next(file: BinaryIO, length: int) -> tuple[str, int] | None:
    """Return (path, size) of the member that begins here; None at the end."""
    offset = file.tell()
    block = file.read(BLOCK)
    if block == END[:BLOCK]:
        if file.read(BLOCK) != END[:BLOCK]:
            raise TransferRefused(f"expected two zero blocks at the end, got one at byte {offset}: it is truncated")
        return None
    if len(block) < BLOCK:
        raise TransferRefused(f"expected a header of {BLOCK} bytes at byte {offset}, got {len(block)}: it is truncated")
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        if offset == 0:
            raise TransferRefused("expected a bundle as `export` makes them, got a file that is no tar") from None
        raise TransferRefused(f"expected the header of a tar member at byte {offset}, got none ({error})") from None
    if info.type != tarfile.REGTYPE:
        kind = _KINDS.get(info.type, f"type {info.type!r}")
        raise TransferRefused(f"expected regular files only, got {info.name!r:.200}, {kind}")
    if info.size < 0 or block != header(info.name, info.size):
        raise TransferRefused(f"expected the plain header of {info.name!r:.200}, got one with other fields")
    if file.tell() + info.size > length:
        rest = length - file.tell()
        raise TransferRefused(f"expected {info.size} bytes of {info.name!r:.200}, got {rest}: it is truncated")
    return info.name, info.size


_KINDS: Final = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
    tarfile.GNUTYPE_LONGNAME: "a long name",
    tarfile.GNUTYPE_LONGLINK: "a long link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def _skip_padding(file: BinaryIO, size: int) -> None:
    found = file.read(-size % BLOCK)
    if found != padding(size):
        raise TransferRefused(f"expected zeros up to the next block at byte {file.tell()}, got something else")


def check_whole(listed: Iterable[Digest], present: Iterable[Digest]) -> None:
    """Check that a bundle has all blobs that its manifests list, and no others. Raises TransferRefused."""
    wanted, found = set(listed), set(present)
    for digest in sorted(wanted ^ found):
        here, there = ("it", "no such member") if digest in wanted else ("only what a manifest lists", "it too")
        raise TransferRefused(f"blob {digest}: expected {here} in the bundle, got {there}")
