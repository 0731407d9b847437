"""What is known of blobs and manifests, as values.

Knows neither how they are stored nor what follows from them.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Final, NamedTuple, Self

from pullthrough.digest import Digest
from pullthrough.errors import InvalidRequest

DEFAULT_HOST: Final = "registry.ollama.ai"
"""Of models that are typed without a host."""

Version = tuple[int, ...]
"""An Ollama's, as its User-Agent tells it."""


class BlobRecord(NamedTuple):
    """What is known of one digest. A tuple, because a start reads them by the hundred thousand."""

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

    def is_file(self, size: int, mtime_ns: int, inode: int) -> bool:
        """Whether these are of the file that was verified."""
        return self.held and (size, mtime_ns, inode) == (self.size, self.mtime_ns, self.inode)


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """(host, repository, reference): under which a manifest is asked for."""

    host: str
    repository: str
    reference: str

    def __str__(self) -> str:
        separator = "@" if ":" in self.reference else ":"
        return f"{self.host}/{self.repository}{separator}{self.reference}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The model that a user types, as Ollama completes it (types/model/name.go). InvalidRequest if it is none."""
        model, at, digest = text.partition("@")
        *before, last = model.split("/")
        base, colon, tag = last.partition(":")
        reference = digest if at else tag if colon else "latest"
        host, *namespace = before if len(before) > 1 else (DEFAULT_HOST, *(before or ["library"]))
        parts = (*namespace, base, reference)
        if not all(parts) or not host or any(character.isspace() or character in "*?[]" for character in text):
            raise InvalidRequest(f"expected a model such as llama3.2 or me/model:tag, got {text!r}")
        return cls(host, "/".join((*namespace, base)), reference)

    @property
    def forms(self) -> tuple[str, str, str]:
        """In full, without the host, and without `library/` too."""
        full = str(self)
        short = full.removeprefix(f"{self.host}/")
        return full, short, short.removeprefix("library/")

    @property
    def typed(self) -> str:
        """What a user types for it, and Ollama shows."""
        return self.forms[2] if self.host == DEFAULT_HOST else self.forms[0]

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern names it: in full, without the host, or as users type it (`llama3.2:*`)."""
        return any(fnmatchcase(form, pattern) for form in self.forms)


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
