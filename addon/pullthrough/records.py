"""What is known of blobs and manifests, as values.

Knows neither how they are stored nor what follows from them.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Self

from pullthrough.digest import Digest
from pullthrough.errors import InvalidRequest

Version = tuple[int, ...]
"""An Ollama's, as its User-Agent tells it."""


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """What is known of one digest."""

    size: int | None = None
    """None until upstream or its bytes have told."""
    held: bool = False
    """Its bytes are here, verified."""
    public: bool = False
    """An anonymous request for it succeeded upstream."""
    mtime_ns: int = 0
    inode: int = 0
    recorded: float = 0.0
    """When it was verified, Unix seconds."""


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """(host, repository, reference): under which a manifest is asked for."""

    host: str
    repository: str
    reference: str

    def __str__(self) -> str:
        separator = "@" if ":" in self.reference else ":"
        return f"{self.host}/{self.repository}{separator}{self.reference}"

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern names it: in full, without the host, or as users type it (`llama3.2:*`)."""
        full = str(self)
        forms = (full, full.removeprefix(f"{self.host}/"), full.removeprefix(f"{self.host}/library/"))
        return any(fnmatchcase(form, pattern) for form in forms)


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """A stored manifest: upstream's bytes, untouched, and when upstream last confirmed them (Unix seconds)."""

    body: bytes
    content_type: str
    confirmed: float
    sizes: dict[Digest, int]
    """The blobs it lists, and the sizes it claims for them."""
    oldest: Version | None = None
    """The oldest client version that upstream has granted these bytes to; None if nobody has told one."""
    denied: bool = False
    """Upstream refuses it to an anonymous request by now: it is nobody's until upstream grants it again."""
    pulled: float = 0.0
    """When a client last asked for it, Unix seconds."""

    @classmethod
    def parse(cls, body: bytes, content_type: str, *, now: float) -> Self | None:
        """The record of a manifest's bytes; None if they are none (a captive portal also answers 200)."""
        try:
            manifest = json.loads(body)
            layers = manifest["layers"] or []
            descriptors = [*layers, *([manifest["config"]] if manifest.get("config") else [])]
            sizes = {Digest.parse(item["digest"]): item["size"] for item in descriptors}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest):
            return None
        if not isinstance(layers, list) or any(type(size) is not int or size < 0 for size in sizes.values()):
            return None
        return cls(body, content_type, now, sizes)

    @property
    def digest(self) -> str:
        """The sha256 of the bytes, bare hexadecimal."""
        return sha256(self.body).hexdigest()
