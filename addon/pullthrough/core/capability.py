"""The signed query of a canonical blob address: whoever holds it may read that one blob until it expires.

Invariant: a query verifies only if this very secret signed this digest, size and expiry. Like the presigned
object-store URL that it stands in for, it is a bearer right and is cut from logs.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass

from pullthrough.core.digest import Digest

LIFETIME_S = 24 * 3600
"""The lifetime of the registry's own signatures (X-Amz-Expires=86400 since 2024-08)."""

_QUERY = re.compile(r"size=(\d{1,16})&expires=(\d{1,12})(&offload=1)?&access=([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Capability:
    """The right to read the blob `digest` of `size` bytes until `expires` (Unix seconds)."""

    digest: Digest
    size: int
    expires: int
    offload: bool = False
    """The holder may be redirected to the fleet's object store."""

    def to_query(self, secret: bytes) -> str:
        """Return the query string, without the question mark."""
        offload = "&offload=1" if self.offload else ""
        return f"size={self.size}&expires={self.expires}{offload}&access={self._signature(secret)}"

    def _signature(self, secret: bytes) -> str:
        message = f"{self.digest} {self.size} {self.expires}{' offload' if self.offload else ''}".encode()
        return hmac.new(secret, message, hashlib.sha256).hexdigest()


def is_claimed(query: str) -> bool:
    """Return whether `query` has the form of a capability, valid or not."""
    return _QUERY.fullmatch(query) is not None


def verify(query: str, digest: Digest, *, secret: bytes, now: float) -> Capability | None:
    """Return the capability in `query`; None if it is foreign, altered, expired or for another blob than `digest`."""
    match = _QUERY.fullmatch(query)
    if match is None:
        return None
    capability = Capability(digest, int(match[1]), int(match[2]), offload=match[3] is not None)
    if not hmac.compare_digest(capability._signature(secret), match[4]) or now >= capability.expires:
        return None
    return capability
