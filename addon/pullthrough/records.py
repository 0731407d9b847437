"""What is known of blobs and manifests, as values.

Invariant: all are tuples, because a start makes them by the hundred thousand, and names are looked up for each
request. Knows neither how they are stored nor what follows from them.
"""

import json
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Final, NamedTuple, Self

from pullthrough.digest import Digest, trusted
from pullthrough.errors import InvalidRequest

DEFAULT_HOST: Final = "registry.ollama.ai"
"""Of models that are typed without a host."""

_TENSOR: Final = b"application/vnd.ollama.image.tensor"

Version = tuple[int, ...]
"""An Ollama's, as its User-Agent tells it."""


class BlobRecord(NamedTuple):
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

    def is_file(self, size: int, mtime_ns: int, inode: int) -> bool:
        """Whether these are of the file that was verified."""
        return self.held and (size, mtime_ns, inode) == (self.size, self.mtime_ns, self.inode)


class Name(NamedTuple):
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
    def place(self) -> tuple[str, str]:
        """(host, repository)."""
        return self.host, self.repository

    @property
    def forms(self) -> tuple[str, str, str]:
        """In full, without the host, and without `library/` too."""
        full = str(self)
        short = full.removeprefix(f"{self.host}/")
        return full, short, short.removeprefix("library/")

    @property
    def typed(self) -> str:
        """What a user types for it, and Ollama shows."""
        full = str(self)
        return full.removeprefix(f"{DEFAULT_HOST}/").removeprefix("library/") if self.host == DEFAULT_HOST else full

    def is_among(self, patterns: Iterable[str]) -> bool:
        """Whether one of the patterns names it."""
        return any(map(self.matches, patterns))

    def matches(self, pattern: str) -> bool:
        """Whether a shell pattern names it: in full, without the host, or as users type it (`llama3.2:*`)."""
        return any(fnmatchcase(form, pattern) for form in self.forms)


class ManifestRecord(NamedTuple):
    """A stored manifest: upstream's bytes, untouched, and when upstream last confirmed them (Unix seconds)."""

    body: bytes
    digest: str
    """The sha256 of the bytes, bare hexadecimal."""
    content_type: str
    confirmed: float
    listed: str
    """The blobs it lists, `<digest> …`: a text, because most are stored and never looked at."""
    claimed: str
    """The sizes it claims for them, `<bytes> …`."""
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
        claimed = " ".join(map(str, sizes.values()))
        return cls(body, sha256(body).hexdigest(), content_type, now, " ".join(sizes), claimed)

    @property
    def sizes(self) -> dict[Digest, int]:
        """The blobs it lists, and the sizes it claims for them; each call makes them anew."""
        return dict(zip(self.digests, map(int, self.claimed.split()), strict=True))

    @property
    def digests(self) -> list[Digest]:
        """The blobs it lists."""
        return list(map(trusted, self.listed.split()))

    @property
    def size(self) -> int:
        """What they take together, as it claims."""
        return sum(map(int, self.claimed.split()))

    @property
    def is_of_tensors(self) -> bool:
        """Whether x/transfer pulls it, by hundreds of blobs (x/transfer/download.go, v0.14.0 to today)."""
        return _TENSOR in self.body

    def is_within(self, digests: Container[str]) -> bool:
        """Whether all that it lists are among these."""
        return all(map(digests.__contains__, self.listed.split()))

    def lists(self, digest: Digest) -> bool:
        """Whether it lists the blob; quick."""
        return digest in self.listed
