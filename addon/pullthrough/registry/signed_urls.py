"""The registry's own signed addresses of blobs, as they were handed out to clients, and their recognition.

A signed address is a bearer credential. The addresses themselves stay in memory, if an anonymous request got them too;
on disk there is an HMAC of each, so that a client which was sent there goes on after a restart.

Invariant: an address is recognised only if this store has handed out exactly it, to the byte; one that took a caller's
credentials is never given to another caller. Times are Unix seconds, and `now` is a parameter.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from yarl import URL

from pullthrough.core.digest import Digest
from pullthrough.store.ledger import Ledger
from pullthrough.upstream.data_stream import Source

LIMIT: Final = 20_000
"""How many addresses are recognised: those of a thousand models, twice a day for a week."""

GRACE_S: Final = 24 * 3600.0
"""How long an expired address is still recognised while its blob is public: a pull may take longer than a day."""

RECORDABLE_S: Final = 60.0
"""The lifetime an address must have left for a recording to begin with it; the recording obtains another when it
expires."""

Obtain = Callable[[], Awaitable[Source]]


@dataclass(frozen=True, slots=True)
class HandedOut:
    """A signed address that has come back."""

    digest: Digest
    source: Source
    """The address itself: once recognised as ours, a recording may use it."""
    obtain: Obtain | None
    """Asks the registry for another address, for the same caller; None after a restart."""


class SignedUrls:
    """The addresses handed out by one store."""

    def __init__(
        self, secret: bytes, ledger: Ledger, is_public: Callable[[Digest], bool], *, limit: int = LIMIT
    ) -> None:
        """`secret` is the store's; the ledger keeps the HMACs of at most `limit` addresses.

        `is_public` says whether everybody may have a blob by now.
        """
        self._secret = secret
        self._ledger = ledger
        self._is_public = is_public
        self._limit = limit
        self._obtain: dict[str, Obtain] = {}
        self._shared: dict[Digest, tuple[str, float, str]] = {}
        """(address, when it expires, its HMAC) of blobs that an anonymous request got."""

    def add(self, digest: Digest, address: str, *, expires: float, public: bool, obtain: Obtain, now: float) -> None:
        """Recognise the address from now on; a `public` one may be given to other callers too."""
        key = self._key(URL(address, encoded=True))
        self._ledger.put_address(key, digest, expires)
        self._obtain[key] = obtain
        if public:
            self._shared[digest] = address, expires, key
        self._forget(now)

    def shared(self, digest: Digest, *, left_s: float, now: float) -> str | None:
        """Return an address for any caller who may have the blob, valid for at least `left_s` more seconds."""
        address, expires, _ = self._shared.get(digest, ("", 0.0, ""))
        return address if expires - now >= left_s else None

    def source(self, digest: Digest, *, now: float) -> Source | None:
        """Return a source of the blob that was obtained before, for a recording that begins."""
        address = self.shared(digest, left_s=RECORDABLE_S, now=now)
        return Source(address) if address is not None else None

    def recognise(self, host: str, target: str, *, now: float) -> HandedOut | None:
        """Return what a request for `https://<host><target>` names, if that was handed out here."""
        if "?" not in target:
            return None
        try:
            address = URL(f"https://{host}{target}", encoded=True)
            key = self._key(address)
        except ValueError:
            return None
        digest, expires = self._ledger.addresses.get(key, (None, 0.0))
        if digest is None or (now >= expires and (now >= expires + GRACE_S or not self._is_public(digest))):
            return None
        return HandedOut(digest, Source(str(address)), self._obtain.get(key))

    def _key(self, address: URL) -> str:
        """Return the HMAC of host and target: the part of an address that reaches the server."""
        message = f"signed address {(address.host or '').lower()}{address.raw_path_qs}"
        return hmac.new(self._secret, message.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    def _forget(self, now: float) -> None:
        """Forget expired addresses, and the oldest beyond the limit."""
        known = self._ledger.addresses
        while known:
            key, (digest, expires) = next(iter(known.items()))
            if len(known) <= self._limit and now < expires + GRACE_S:
                return
            self._ledger.drop_address(key)
            self._obtain.pop(key, None)
            # An address that would not be recognised is not handed out again.
            if self._shared.get(digest, ("", 0.0, ""))[2] == key:
                del self._shared[digest]
