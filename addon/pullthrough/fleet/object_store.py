"""One folder of an object store (S3, GCS, Azure), through obstore, with our own errors.

Invariant: no call outlasts its limits, and an upload holds no more than a few parts in memory. Calls wait for the
network: the daemon makes them in threads, and makes no asynchronous ones, because what those leave running can abort
the interpreter's exit (obstore 0.12.1). No message quotes a query, which may be signed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

from yarl import URL

from pullthrough.config.settings import PREFIX
from pullthrough.core.errors import SettingsError, TierError
from pullthrough.fleet.documents import CHECKSUM

CONNECT_S: Final = 1.0
QUICK_S: Final = 4.0
"""The limit for calls that a client may wait for."""
PATIENT_S: Final = 10.0
"""The limit for one part of an upload, tried twice: the daemon waits for it before it stops."""
PART: Final = 8 << 20
MAX_PARTS: Final = 9_000
"""S3 allows 10,000."""
PARTS_AT_ONCE: Final = 2
MAX_DOCUMENT: Final = 12 << 20
"""A manifest (`upstream.MAX_CONTROL_BODY`) in base64."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object: its size, and the sha256 from its upload, None if there is none."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """An object in a listing; `changed` in Unix seconds."""

    key: str
    size: int
    changed: float


class Writer(Protocol):
    """An upload: the object appears only with `close`."""

    def write(self, data: bytes, /) -> int: ...

    def close(self) -> None: ...


class ObjectStore:
    """The folder that a URL such as s3://bucket/prefix names. Every call that fails raises TierError."""

    def __init__(self, url: str) -> None:
        """Raise SettingsError if obstore is missing, or if the URL and the environment do not describe a store."""
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise SettingsError(
                f"option {PREFIX}object_store: the package obstore is not installed; "
                "`scripts/setup object-store` installs it, or the extra of that name"
            ) from error
        self._api: Any = obstore
        try:
            self._quick, self._patient = (
                from_url(
                    url,
                    # Whether it is HTTPS the endpoint says, which the environment names.
                    client_options={"connect_timeout": f"{CONNECT_S}s", "timeout": f"{limit_s}s", "allow_http": True},
                    retry_config={"max_retries": retries},
                )
                for limit_s, retries in ((QUICK_S, 0), (PATIENT_S, 1))
            )
        except Exception as error:  # each kind of store raises errors of its own
            raise SettingsError(f"option {PREFIX}object_store: expected an object store, got {_brief(error)}") from None

    def find(self, key: str) -> Found | None:
        """Return the object, None if there is none."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            result = self._api.get(self._quick, key, options={"head": True})
            return Found(result.meta["size"], result.attributes.get(CHECKSUM))
        return None

    def read(self, key: str) -> bytes | None:
        """Return a small object's bytes, None if there is none."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            result = self._api.get(self._quick, key)
            if result.meta["size"] > MAX_DOCUMENT:
                raise TierError(f"{key}: expected at most {MAX_DOCUMENT} bytes, got {result.meta['size']}")
            return bytes(result.bytes())
        return None

    def read_part(self, key: str, start: int, size: int) -> bytes:
        """Return the next part from `start` of an object of `size` bytes."""
        with self._told():
            try:
                return bytes(self._api.get_range(self._patient, key, start=start, end=min(start + PART, size)))
            except FileNotFoundError as error:
                raise TierError(f"{key}: expected an object, got none any more") from error

    def list(self, prefix: str) -> list[Listed]:
        """Return all objects under `prefix`."""
        with self._told():
            return [
                Listed(item["path"], item["size"], item["last_modified"].timestamp())
                for page in self._api.list(self._quick, prefix)
                for item in page
            ]

    def create(self, key: str, data: bytes, *, sha256: str | None = None) -> bool:
        """Create an object; return whether it was new. A store without conditional writes always says that it was."""
        with self._told():
            try:
                self._api.put(self._quick, key, data, mode="create", attributes=_attributes(sha256))
            except self._api.exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object, replacing any that is there."""
        with self._told():
            self._api.put(self._quick, key, data)

    def delete(self, key: str) -> None:
        """There is no such object from now on."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            self._api.delete(self._quick, key)

    def writer(self, key: str, *, size: int, sha256: str) -> Writer:
        """Return an upload of `size` bytes in parts, in place of whatever is there; it is given up by forgetting it."""
        part = max(PART, -(-size // MAX_PARTS))
        with self._told():
            upload: Writer = self._api.open_writer(
                self._patient,
                key,
                attributes=_attributes(sha256),
                buffer_size=part,
                max_concurrency=PARTS_AT_ONCE,
            )
        return upload

    def write(self, writer: Writer, data: bytes) -> None:
        with self._told():
            writer.write(data)

    def finish(self, writer: Writer) -> None:
        with self._told():
            writer.close()

    def sign(self, key: str, *, lifetime_s: float) -> str:
        """Return an address at which anybody may GET the object until it expires."""
        with self._told():
            address: str = self._api.sign(self._quick, "GET", key, timedelta(seconds=lifetime_s))
            return address

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (self._api.exceptions.BaseError, OSError, ValueError) as error:
            raise TierError(f"object store: {_brief(error)}") from None


def endpoint(address: str) -> tuple[str, int]:
    """(host, port) of an address."""
    url = URL(address, encoded=True)
    return url.host or "", url.port or 0


def _attributes(sha256: str | None) -> dict[str, str]:
    return {CHECKSUM: sha256} if sha256 is not None else {}


def _brief(error: Exception) -> str:
    """Return the first line, without any query: behind it obstore prints what it holds."""
    return str(error).partition("\n")[0].partition("?")[0][:300]
