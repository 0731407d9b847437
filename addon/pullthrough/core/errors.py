"""The exceptions of the package, and the HTTP status each ends in when it reaches a client.

    CacheError
    ├── SettingsError          an option cannot be understood: the start stops
    ├── AuthorityError         the certificate authority cannot be used: the start stops
    ├── StoreError             the store cannot be used: the start stops
    │   └── StoreUnwritable    a write to the store failed: pulls go on without it
    │       └── SourceDistrusted   what came had another digest, twice: pulls go on without the store for a while
    ├── NoSuchModel            a verb names a model that is not stored, or several (404)
    ├── ModelPinned            a model to be removed is pinned (409)
    ├── ControlError           the daemon could not do what the command line asked
    │   └── NoDaemon           nothing listens at the store's control socket
    ├── InvalidRequest         the client sent what no client may send (400)
    ├── Misdirected            the names on an intercepted connection disagree (421)
    ├── TransferRefused        what is to be imported or exported is incomplete, wrong or not to be had
    ├── DigestMismatch         recorded bytes do not hash to their name: quarantined, never a hit
    ├── TierError              the fleet's object store could not be used: pulls go on without it
    ├── ForgedDocument         what lies in the object store was not written by this fleet: ignored
    └── UpstreamError          upstream could not be used (502)
        ├── UpstreamUnreachable    no answer at all: DNS, connect, TLS, reset
        │   ├── Offline            the options forbid asking upstream (504)
        │   └── NotTheRegistry     something else answered in the registry's place: a portal, a filter, a gateway
        ├── UpstreamTimeout        no answer in time (504)
        ├── UpstreamRefused        an answer to be relayed as final (its own status)
        ├── UnexpectedResponse     an answer that does not fit what was asked; never recorded
        │   ├── ValidatorChanged   the source serves another version than before
        │   ├── Disagreement       an answer to an anonymous request that is not the blob as far as it is known
        │   └── LengthContradicted another complete length than was expected
        ├── SourceExpired          the blob's address is no longer good; obtain it again
        └── AddressRefused         the address policy forbids the connection
            └── LoopDetected       a registry's name leads back to this cache (508)

Messages say what was expected and what was got.
"""

from collections.abc import Sequence
from typing import Final

MAX_RETRY_AFTER_S: Final = 3600.0
"""The longest Retry-After that is respected: one field must not silence the cache for a day."""


class CacheError(Exception):
    """Base of all errors that this package raises on purpose."""

    status_hint = 500
    discards = False
    """Whether what a recording that fails so leaves behind is of no use to the next one."""


class SettingsError(CacheError):
    """An option has a value that cannot be used."""


class CannotListen(SettingsError):
    """An address to listen on is in use or does not exist: a later start with the same options may succeed."""


class AuthorityError(CacheError):
    """The certificate authority on disk is missing, foreign, or does not permit what is configured."""


class StoreError(CacheError):
    """The store folder cannot be used in its present state."""


class StoreUnwritable(StoreError):
    """Writing to the store failed: disk full, read-only, gone."""

    status_hint = 507
    discards = True


class SourceDistrusted(StoreUnwritable):
    """The blob's source has lately sent bytes of another digest more than once, and is not recorded from for now."""


class NoSuchModel(CacheError):
    """What the user typed names no stored model, or several."""

    status_hint = 404


class ModelPinned(CacheError):
    """A model that is to be removed is pinned."""

    status_hint = 409


class ControlError(CacheError):
    """The daemon refused, or broke off."""


class NoDaemon(ControlError):
    """No daemon can be asked."""


class InvalidRequest(CacheError):
    """The request is malformed."""

    status_hint = 400


class Misdirected(CacheError):
    """CONNECT authority, SNI and Host name different servers (RFC 9110 section 15.5.20)."""

    status_hint = 421


class TransferRefused(CacheError):
    """A model, folder or bundle cannot be imported or exported as it is."""


class DigestMismatch(CacheError):
    """The bytes do not have the digest by which they were asked for."""

    status_hint = 502

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"digest mismatch: expected {expected}, got {actual}")
        self.expected = expected
        self.actual = actual


class TierError(CacheError):
    """The object store could not be used."""

    status_hint = 502


class ForgedDocument(CacheError):
    """A document in the object store is not signed by the fleet, or was signed for another place."""


class UpstreamError(CacheError):
    """Upstream could not be used."""

    status_hint = 502


class UpstreamUnreachable(UpstreamError):
    """No response came: name resolution, connect, TLS or the connection failed."""


class Offline(UpstreamUnreachable):
    """The options forbid contacting a registry."""

    status_hint = 504


class NotTheRegistry(UpstreamUnreachable):
    """Something else answered in the registry's place; the message has its status and type, and nothing of its text."""


class UpstreamTimeout(UpstreamError):
    """No response came in time."""

    status_hint = 504


class UpstreamRefused(UpstreamError):
    """Upstream answered with a status that the client must see: 401, 403, 404, 412, 429, 5xx."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], body: bytes = b"") -> None:
        super().__init__(f"upstream answered {status}")
        self.status_hint = status
        self.headers = tuple(headers)
        self.body = body

    @property
    def retry_after_s(self) -> float:
        """How long upstream asks us to wait; 0 if it does not say so in seconds (RFC 9110 section 10.2.3)."""
        for name, value in self.headers:
            if name.lower() == "retry-after" and value.isascii() and value.isdecimal():
                return min(float(value[:8]), MAX_RETRY_AFTER_S)
        return 0.0


class UnexpectedResponse(UpstreamError):
    """A response that is not what was asked for: status, Content-Range, validator, encoding or length."""


class ValidatorChanged(UnexpectedResponse):
    """The source serves another version of the blob than it did before: the two are never mixed."""

    def __init__(self, expected: str, validator: str | None) -> None:
        super().__init__(f"expected the validator {expected}, got {validator}")
        self.validator = validator


class Disagreement(UnexpectedResponse):
    """What an anonymous request got is not the blob: another length, or other bytes than are held."""


class LengthContradicted(UnexpectedResponse):
    """The source gives another complete length than was expected, or than any that is claimed."""

    def __init__(self, expected: str, actual: int) -> None:
        super().__init__(f"expected a complete length of {expected}, got {actual}")
        self.told = actual


class SourceExpired(UpstreamError):
    """The signed address of a blob is no longer accepted (401, 403, 404 or 410 from the CDN)."""

    def __init__(self, status: int, headers: Sequence[tuple[str, str]] = (), *, what: str = "") -> None:
        """`what` describes an answer that does not look like a registry's refusal."""
        super().__init__(f"the source answered {status}")
        self.status = status
        self.headers = tuple(headers)
        self.what = what


class AddressRefused(UpstreamError):
    """The address is one that this cache does not connect to."""


class LoopDetected(AddressRefused):
    """The connection would come back to this cache (RFC 5842 section 7.2)."""

    status_hint = 508
