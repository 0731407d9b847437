"""The second tier: the object store that a fleet of caches shares, as one cache reads it.

Invariant: its documents are trusted only with the fleet's signature, and its bytes are verified like upstream's; a
failing object store is left alone for a while and never fails a pull. Only public blobs are looked up.
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pullthrough.config.settings import PREFIX
from pullthrough.core.digest import Digest
from pullthrough.core.errors import AddressRefused, ForgedDocument, SettingsError, TierError
from pullthrough.core.records import ManifestRecord, Name
from pullthrough.fleet import documents
from pullthrough.fleet.circuit_breaker import CircuitBreaker
from pullthrough.fleet.object_store import ObjectStore, endpoint
from pullthrough.net.address_policy import check_address
from pullthrough.runtime.clock import lasting
from pullthrough.runtime.executors import Threads
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.data_stream import Source
from pullthrough.upstream.reachability import OBJECT_STORE

_log = logging.getLogger(__name__)

MIN_SECRET: Final = 32
SIGNED_S: Final = 6 * 3600.0
"""The lifetime of an address that a recording reads from; an expired one is signed anew."""


def load_secret(path: Path) -> bytes:
    """Return the fleet's secret from a file that only its owner may read. Raises SettingsError if it is unusable."""
    option = f"option {PREFIX}fleet_secret_file"
    try:
        others = path.stat().st_mode & 0o077
        secret = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{option}: expected a readable file, got {path}: {error.strerror}") from error
    if others and os.name == "posix":
        raise SettingsError(f"{option}: expected a file for its owner alone (chmod 600), got {path}, which is not")
    if len(secret) < MIN_SECRET:
        raise SettingsError(f"{option}: expected at least {MIN_SECRET} bytes in {path}, got {len(secret)}")
    return secret


@dataclass
class Counts:
    """What this daemon has used the tier for since its start."""

    manifests: int = 0
    """Manifests adopted from it."""
    blobs: int = 0
    """Blobs that recordings found there."""
    uploaded: int = 0
    uploaded_bytes: int = 0
    forged: int = 0
    """Documents without this fleet's signature."""
    corrupt: int = 0
    """Blobs that did not match their digest."""
    failures: int = 0


class Tier:
    """The object store, behind a circuit breaker."""

    def __init__(self, objects: ObjectStore, secret: bytes, threads: Threads, upstream: Upstream) -> None:
        """`secret` is the fleet's."""
        self.objects = objects
        self.secret = secret
        self.counts = Counts()
        self.suspects: set[Digest] = set()
        """Blobs whose object must not be read, and is to be replaced once there are good bytes."""
        self.there: set[Digest] = set()
        """Blobs that it is known to have, with the checksum from their upload."""
        self._addresses: dict[Digest, tuple[str, float]] = {}
        self._is_private = False
        """The object store was found at a private address, which has been logged."""
        self._threads = threads
        self._upstream = upstream
        self._breaker = CircuitBreaker()

    @property
    def is_open(self) -> bool:
        """Whether it has failed and is left alone."""
        return self._breaker.is_open(time.monotonic())

    async def ask[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one call to the object store, in a thread. Raises TierError if it fails, or has failed lately."""
        if not self._breaker.permits(time.monotonic()):
            raise TierError("object store: expected it to answer, got failures lately")
        try:
            with self._upstream.reachability.asking(OBJECT_STORE):
                result = await self._threads.network(work, *args, **kwargs)
        except TierError as error:
            self.counts.failures += 1
            self._breaker.failed(time.monotonic())
            if self.is_open:
                _log.warning("%s; doing without it for a while", error)
            raise
        self._breaker.succeeded()
        self._upstream.reachability.answered(OBJECT_STORE)
        return result

    async def knock(self) -> None:
        """Look up one object, to see whether the object store answers. Raises TierError if it does not."""
        await self.ask(self.objects.find, documents.blob_key(Digest("0" * 64)))

    async def source(self, digest: Digest) -> Source | None:
        """Return where the tier has the blob; None if it has not, or cannot be asked."""
        if digest in self.suspects:
            return None
        try:
            if not await self.look(digest):
                return None
            address = await self.ask(self.objects.sign, documents.blob_key(digest), lifetime_s=SIGNED_S)
        except TierError as error:
            _log.debug("%s: %s", digest.short, error)
            return None
        self.counts.blobs += 1
        self._upstream.admit(*endpoint(address))
        return Source(address, near=True)

    async def look(self, digest: Digest, size: int | None = None) -> bool:
        """Return whether the blob is there, with this size if one is given, and was hashed at its upload."""
        found = await self.ask(self.objects.find, documents.blob_key(digest))
        sound = found is not None and found.sha256 == digest.hex and size in (None, found.size)
        (self.there.add if sound else self.there.discard)(digest)
        return sound

    async def prepare(self, digest: Digest) -> bool:
        """Return whether clients may be redirected to the blob; then `address` returns the URL, for the next hours.

        They may not where the object store has a private address: an Ollama refuses to be redirected to one.
        """
        if digest not in self.there or digest in self.suspects:
            return False
        if self.address(digest) is None:
            try:
                signed = await self.ask(self.objects.sign, documents.blob_key(digest), lifetime_s=SIGNED_S)
                await self._threads.network(_check_public, *endpoint(signed))
            except TierError as error:  # counted and logged where it is raised
                _log.debug("%s: %s", digest.short, error)
                return False
            except AddressRefused as error:
                if not self._is_private:
                    self._is_private = True
                    _log.warning("object store: %s; clients are not redirected to it (offload)", error)
                return False
            self._addresses[digest] = signed, lasting() + SIGNED_S / 2
        return True

    def address(self, digest: Digest) -> str | None:
        """Return the URL at which a client finds the blob for the next hours; None if it was not prepared."""
        address, until = self._addresses.get(digest, ("", 0.0))
        usable = digest not in self.suspects and not self.is_open and lasting() < until
        return address if usable else None

    async def manifest(self, name: Name) -> ManifestRecord | None:
        """Return the manifest as a cache of the fleet recorded it; None if there is none."""
        try:
            data = await self.ask(self.objects.read, documents.manifest_key(name))
            record = documents.unseal_manifest(data, name, self.secret) if data is not None else None
        except TierError as error:
            _log.debug("%s: %s", name, error)
            return None
        except ForgedDocument as error:
            self.refuse(error)
            return None
        self.counts.manifests += record is not None
        return record

    def refuse(self, error: ForgedDocument) -> None:
        """Count and log a document that is not the fleet's."""
        self.counts.forged += 1
        _log.warning("object store: %s; ignored", error)

    def mistrust(self, digest: Digest) -> None:
        """Stop using a blob's object: a recording that may have read it got bytes that do not match the digest."""
        self.counts.corrupt += 1
        self.suspects.add(digest)


def _check_public(host: str, port: int) -> None:
    """Check that every address of the host is public. Raises AddressRefused; TierError if the name has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TierError(f"object store: {host} has no address: {error.strerror}") from error
    for entry in found:
        check_address(str(entry[4][0]))
