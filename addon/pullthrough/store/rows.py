"""The rows of an index, and what they mean.

    blob <digest>                         JSON of a BlobRecord, as a list
    manifest <host> <repository> <ref>    JSON of a ManifestRecord's facts and their crc32; the key ends in ` lists` if
                                          the manifest is for clients that accept manifest lists
    child <digest>                        the same for a manifest that a stored list refers to
    body <sha256>                         a manifest's bytes
    members <host> <repository>           blobs that upstream has granted to an anonymous request there
    day <day number>                      JSON: bytes served, fetched and saved on that day
    address <hmac>                        JSON: digest, and when a signed address expires (Unix seconds)
    index version                         VERSION

All of it is derived from the files of the store, or has a safe default. Invariant: keys are text, values are text or
bytes, and nothing is ever unpickled: a pickle in an index that someone else can write to would be code that runs here.
SQLite joins the rows of blobs, days and addresses into one text each, because a hundred thousand rows as Python
objects take four times as long.
"""

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from pullthrough.core.digest import LETTERS as DIGEST_LETTERS
from pullthrough.core.digest import Digest, trusted
from pullthrough.core.errors import CacheError, StoreError
from pullthrough.core.records import ALIASES, BlobRecord, ManifestRecord, Name
from pullthrough.runtime.gc_pause import gc_paused
from pullthrough.store.usage import Totals

Sql = Callable[..., Iterable[tuple[Any, ...]]]
"""A function that runs a statement with its parameters on the index."""

UNSOUND: Final = (sqlite3.Error, CacheError, ValueError, KeyError, TypeError)
"""What reading a damaged or foreign index raises."""

_FOREIGN: Final = """
    SELECT key, raw, mode FROM Cache NOT INDEXED
    WHERE raw IS NOT 1 OR mode IS NOT 1 OR NOT (
        key GLOB 'blob *' OR key GLOB 'manifest *' OR key GLOB 'child *' OR key GLOB 'body *'
        OR key GLOB 'members *' OR key GLOB 'day *' OR key GLOB 'address *' OR key IS 'index version'
    ) LIMIT 1
"""
"""Rows that are not plain (MODE_RAW is 1: neither pickled nor in files of their own), or of no known kind."""
VERSION: Final = "2"
"""The version of the rows; an index of another version is made anew."""
VERSION_KEY: Final = "index version"
_LISTS: Final = "lists"
_SUM: Final = ', "sum": '
"""The last field of a row: a checksum of the text before it."""
_FACTS: Final = {*ManifestRecord._fields, "sum"} - {"digest"}
_TEXTS: Final = """
    SELECT group_concat(substr(key, length(?1) + 1), char(10)), group_concat(value)
    FROM Cache WHERE key >= ?1 AND key < ?2
"""
_MOST: Final = _TEXTS.replace("FROM Cache", "FROM Cache NOT INDEXED")
"""The same, faster for a kind that makes up most of the table."""
_ROWS: Final = """
    SELECT substr(key, length(?1) + 1), value FROM Cache WHERE key >= ?1 AND key < ?2
"""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that an index knows, except for the members."""

    blobs: dict[Digest, BlobRecord]
    """Including those that are not here."""
    manifests: dict[Name, ManifestRecord]
    children: dict[Digest, ManifestRecord]
    """The manifests that stored lists refer to and whose bytes are here."""
    days: dict[int, Totals]
    addresses: "Addresses"


Members = dict[tuple[str, str], str]
"""(host, repository) → the blobs that upstream has granted to an anonymous request there, `<digest> …`."""


Addresses = dict[str, tuple[Digest, float]]
"""HMAC of a signed address → the blob and when the address expires (Unix seconds)."""


def look(folder: Path) -> Contents:
    """Read a snapshot of the index in `folder`, even while a daemon writes to it. Makes, locks and changes nothing.

    Raises StoreError if there is no sound index.
    """
    path = (folder / "cache.db").absolute()
    try:
        with gc_paused(), contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")  # all reads see the same moment
            return read(connection.execute)
    except UNSOUND as error:
        raise StoreError(f"store {folder.parent}: expected an index in {folder}, got: {error}") from error


def check(sql: Sql) -> None:
    """Check that the database is whole, and that every row is one of ours. Raises UNSOUND."""
    for (problem,) in sql("PRAGMA quick_check(1)"):
        if problem != "ok":
            raise StoreError(str(problem))
    if (found := list(sql("SELECT value FROM Cache WHERE key = ?", (VERSION_KEY,)))) != [(VERSION,)]:
        raise StoreError(f"expected version {VERSION}, got {found!r:.80}")
    for key, raw, mode in sql(_FOREIGN):
        raise StoreError(f"expected plain rows of known kinds, got {key!r:.80} (raw {raw}, mode {mode})")


def rename_aliases(sql: Sql) -> None:
    """Rename rows stored under an alias of a registry; a row that already has the proper name stays. Raises UNSOUND."""
    for alias, host in ALIASES.items():
        for kind in ("manifest", "members"):
            former, prefix = _range(f"{kind} {alias}"), f"{kind} {host} "
            sql(
                "UPDATE OR IGNORE Cache SET key = ?3 || substr(key, length(?1) + 1) WHERE key >= ?1 AND key < ?2",
                (*former, prefix),
            )
            sql("DELETE FROM Cache WHERE key >= ? AND key < ?", former)


def read(sql: Sql) -> Contents:
    """Return all but the members. Raises UNSOUND."""
    keys, rows = _texts(sql(_MOST, _range("blob")))
    if not set(map(len, keys)) <= {DIGEST_LETTERS} or not set(map(len, rows)) <= {len(BlobRecord._fields)}:
        raise StoreError("expected digests with six facts each, got others")
    blobs = dict(zip(map(trusted, keys), map(tuple.__new__, repeat(BlobRecord), rows), strict=True))
    bodies: dict[str, bytes] = dict(sql(_ROWS, _range("body")))
    manifests = {}
    for key, fact in _facts(sql(_ROWS, _range("manifest"))):
        host, repository, reference, *class_ = key.split(" ")
        if class_ not in ([], [_LISTS]):
            raise StoreError(f"expected a manifest's host, repository and reference, got {key!r:.200}")
        manifests[Name(host, repository, reference, bool(class_))] = _record(key, fact, bodies)
    children = {Digest.parse(key): _record(key, fact, bodies) for key, fact in _facts(sql(_ROWS, _range("child")))}
    days = {int(day): Totals(**totals) for day, totals in zip(*_texts(sql(_TEXTS, _range("day"))), strict=True)}
    addresses: Addresses = {
        key: (Digest.parse(digest), float(until))
        for key, (digest, until) in zip(*_texts(sql(_TEXTS, _range("address"))), strict=True)
    }
    return Contents(blobs, manifests, children, days, addresses)


def read_pins(sql: Sql) -> set[str]:
    """Return the pins of an index of version 1, its rows `pin <pattern>`. Raises UNSOUND."""
    return {pattern for pattern, _ in sql(_ROWS, _range("pin"))}


def _facts(found: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's key and facts, checking its sum: wrong facts about a blob show at its file, but nothing else
    would reveal wrong facts about a manifest. Raises UNSOUND.
    """
    rows = list(found)
    facts = json.loads(f"[{','.join([text for _, text in rows])}]")
    for (key, text), fact in zip(rows, facts, strict=True):
        before, mark, total = text.rpartition(_SUM)
        if mark and total != f"{_sum(before)}}}":  # rows of version 1 have none
            raise StoreError(f"manifest {key}: expected facts that agree with their sum, got others")
        yield key, fact


def _sum(facts: str) -> int:
    return zlib.crc32(f"{facts}}}".encode())


def _record(key: str, fact: dict[str, Any], bodies: dict[str, bytes]) -> ManifestRecord:
    try:
        body = bodies[fact["body"]]
        if sha256(body).hexdigest() != fact["body"]:
            raise StoreError(f"manifest {key}: expected bytes of {fact['body']}, got others")
        # Rows from before manifest lists have no `references`, other old ones no `brought`.
        if not fact.keys() <= _FACTS:
            raise StoreError(f"manifest {key}: expected known facts, got others")
        if fact["listed"].count(" ") != fact["claimed"].count(" "):
            raise StoreError(f"manifest {key}: expected a size for each blob, got more or fewer")
        return ManifestRecord(
            body,
            fact["body"],
            fact["content_type"],
            fact["confirmed"],
            fact["listed"],
            fact["claimed"],
            tuple(fact["oldest"]) if fact["oldest"] is not None else None,
            fact["denied"],
            fact["pulled"],
            fact.get("references"),
            fact.get("brought", 0.0),
        )
    except KeyError as error:
        raise StoreError(f"manifest {key}: expected all its facts and its bytes, got none of {error}") from error


def read_members(sql: Sql) -> Members:
    """Return the members. Raises UNSOUND."""
    members: Members = {}
    for where, text in sql(_ROWS, _range("members")):
        host, repository = where.split(" ")
        members[host, repository] = text
    return members


def _range(kind: str) -> tuple[str, str]:
    """Return the bounds of the kind's keys; the first is also their prefix."""
    return f"{kind} ", f"{kind}!"


def _texts(rows: Iterable[tuple[Any, ...]]) -> tuple[list[str], list[Any]]:
    ((keys, values),) = rows
    return (keys.split("\n"), json.loads(f"[{values}]")) if keys is not None else ([], [])


# --- rows


def blob_key(digest: Digest) -> str:
    return f"blob {digest}"


def blob_value(record: BlobRecord) -> str:
    return json.dumps(record)


def manifest_key(name: Name) -> str:
    key = f"manifest {name.host} {name.repository} {name.reference}"
    return f"{key} {_LISTS}" if name.takes_lists else key


def child_key(digest: Digest) -> str:
    return f"child {digest}"


def manifest_value(record: ManifestRecord) -> str:
    """Return the facts and their sum; the manifest's bytes are a row of their own."""
    facts = record._asdict() | {"body": record.digest}
    del facts["digest"]
    text = json.dumps(facts).removesuffix("}")
    return f"{text}{_SUM}{_sum(text)}}}"


def body_key(digest: str) -> str:
    return f"body {digest}"


def members_key(host: str, repository: str) -> str:
    return f"members {host} {repository}"


def day_key(day: int) -> str:
    return f"day {day}"


def day_value(totals: Totals) -> str:
    return json.dumps(asdict(totals))


def address_key(key: str) -> str:
    return f"address {key}"


def address_value(digest: Digest, until: float) -> str:
    return json.dumps([str(digest), until])
