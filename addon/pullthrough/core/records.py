"""What is known of blobs and manifests, as values.

Invariant: all are tuples, because a start creates hundreds of thousands, and every request looks up names.
"""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from pullthrough.core import manifest_json
from pullthrough.core.digest import Digest, trusted
from pullthrough.core.errors import InvalidRequest

DEFAULT_HOST: Final = "registry.ollama.ai"
"""The host of models that are typed without one."""
ALIASES: Final = {"registry.ollama.com": DEFAULT_HOST}
"""Other names of a registry, and the name under which everything from it is stored."""

_TENSOR: Final = b"application/vnd.ollama.image.tensor"

Version = tuple[int, ...]
"""The version of an Ollama, from its User-Agent."""

BYPASSING: Final = ((0, 35, 0), (0, 40, 2))
"""The first and the last Ollama known to fetch parts without any proxy. Only messages depend on it."""

_OLLAMA: Final = re.compile(r"ollama/(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


def version_of(agent: str) -> Version | None:
    """Return the Ollama version in a User-Agent; None for other clients and for 0.0.0, a build from source."""
    match = _OLLAMA.match(agent)
    version = tuple(int(number) for number in match.groups()) if match else (0, 0, 0)
    return version if any(version) else None


class BlobRecord(NamedTuple):
    """What is known of one digest."""

    size: int | None = None
    """None until upstream or the bytes have shown it."""
    held: bool = False
    """The bytes are stored; verified, unless `mtime_ns` is 0."""
    public: bool = False
    """An anonymous request for it succeeded upstream."""
    mtime_ns: int = 0
    inode: int = 0
    """0 if the file has been copied since."""
    recorded: float = 0.0
    """When the bytes were verified, Unix seconds."""

    def is_file(self, size: int, mtime_ns: int, inode: int) -> bool:
        """Return whether these belong to the file that was verified."""
        return self.held and (size, mtime_ns) == (self.size, self.mtime_ns) and self.inode in (inode, 0)


def canonical(host: str) -> str:
    """Return the name under which a registry's answers are stored."""
    return ALIASES.get(host, host)


class Name(NamedTuple):
    """The name by which a manifest is requested: a model, and one of its two representations.

    The registry answers clients that accept manifest lists (Ollama since 0.40) and others differently. Both
    representations of a tag are one model.
    """

    host: str
    repository: str
    reference: str
    takes_lists: bool = False
    """Whether this is the representation for clients that accept manifest lists; it may still be a plain manifest."""

    def __str__(self) -> str:
        separator = "@" if ":" in self.reference else ":"
        return f"{self.host}/{self.repository}{separator}{self.reference}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a model that a user types, completed as by Ollama (types/model/name.go). Raises InvalidRequest."""
        model, at, digest = text.partition("@")
        *before, last = model.split("/")
        base, colon, tag = last.partition(":")
        reference = digest if at else tag if colon else "latest"
        host, *namespace = before if len(before) > 1 else (DEFAULT_HOST, *(before or ["library"]))
        parts = (*namespace, base, reference)
        if not all(parts) or not host or any(character.isspace() or character in "*?[]" for character in text):
            raise InvalidRequest(f"invalid model name '{text}': one looks like llama3.2 or me/model:tag")
        return cls(canonical(host), "/".join((*namespace, base)), reference)

    @property
    def model(self) -> "Name":
        """The name of the model, the same for both representations."""
        return self._replace(takes_lists=False) if self.takes_lists else self

    @property
    def twin(self) -> "Name":
        """The name of the other representation."""
        return self._replace(takes_lists=not self.takes_lists)

    @property
    def place(self) -> tuple[str, str]:
        """(host, repository)."""
        return self.host, self.repository

    @property
    def forms(self) -> tuple[str, str, str]:
        """The name in full, without the host, and without both host and `library/`."""
        full = str(self)
        short = full.removeprefix(f"{self.host}/")
        return full, short, short.removeprefix("library/")

    @property
    def typed(self) -> str:
        """The name as users type it and Ollama shows it."""
        full = str(self)
        return full.removeprefix(f"{DEFAULT_HOST}/").removeprefix("library/") if self.host == DEFAULT_HOST else full

    def is_among(self, patterns: Iterable[str]) -> bool:
        """Return whether one of the patterns names it."""
        return any(map(self.matches, patterns))

    def matches(self, pattern: str) -> bool:
        """Return whether a shell pattern names it: in full, without the host, or as users type it (`llama3.2:*`)."""
        host, slash, rest = pattern.partition("/")
        return any(fnmatchcase(form, f"{canonical(host)}{slash}{rest}") for form in self.forms)


class Series(NamedTuple):
    """The blobs of one manifest, in the order in which clients ask for them."""

    key: str
    """A key that tells the manifest from the others of its repository."""
    body: bytes
    """The document that contains the manifest."""
    digests: Collection[Digest]

    @property
    def is_of_tensors(self) -> bool:
        """Whether x/transfer pulls it, in hundreds of blobs (x/transfer/download.go, since v0.14.0)."""
        return _TENSOR in self.body

    def behind(self, digest: Digest) -> list[Digest]:
        """Return the blobs that are asked for after `digest`."""
        digests = list(self.digests)
        return digests[digests.index(digest) + 1 :]


class ManifestRecord(NamedTuple):
    """A stored manifest or list: upstream's bytes, untouched, and when upstream last confirmed them (Unix seconds)."""

    body: bytes
    digest: str
    """The sha256 of the bytes, bare hexadecimal."""
    content_type: str
    confirmed: float
    listed: str
    """The blobs it lists, `<digest> …`: a text, because most records are stored and never looked at.

    For a list: the children that are references, and the blobs of all known children."""
    claimed: str
    """The sizes it claims for them, `<bytes> …`; `-` if unknown, as for a child that nobody has asked for."""
    oldest: Version | None = None
    """The oldest client version to which upstream has granted these bytes; None if no client sent one."""
    denied: bool = False
    """Upstream now refuses it to anonymous requests: nobody gets it until upstream grants it again."""
    pulled: float = 0.0
    """When a client last asked for it, Unix seconds."""
    references: str | None = None
    """The children of a list that are blobs, `<digest> …`; None for a manifest."""
    brought: float = 0.0
    """When it last came without a client: warmed, imported, or found as a file. Unix seconds."""

    @classmethod
    def parse(cls, body: bytes, content_type: str, *, now: float) -> Self | None:
        """Return the record of a document; None if the bytes are none (a captive portal answers 200, too)."""
        try:
            document = manifest_json.parse(body)
        except ValueError:
            return None
        sizes: dict[Digest, int | None] = {}
        children = document.children or ()
        for child in children:
            if child.digest is not None:
                sizes.setdefault(child.digest)
            sizes |= {layer.digest: layer.size for layer in child.layers}
        sizes |= {layer.digest: layer.size for layer in document.layers}
        references = None
        if document.children is not None:
            references = " ".join(dict.fromkeys(child.digest for child in children if child.digest is not None))
        record = cls(body, sha256(body).hexdigest(), content_type, now, "", "", references=references)
        return record._listing(sizes)

    @property
    def used(self) -> float:
        """When it was last pulled or brought (Unix seconds, 0 for never); the least recently used is removed first."""
        return max(self.pulled, self.brought)

    @property
    def is_list(self) -> bool:
        return self.references is not None

    @property
    def children(self) -> list[Digest]:
        """The children of a list that are blobs."""
        return list(map(trusted, (self.references or "").split()))

    @property
    def sizes(self) -> Mapping[Digest, int | None]:
        """The blobs it lists and the sizes it claims for them, None if unknown."""
        return _sizes(self.listed, self.claimed)

    @property
    def digests(self) -> list[Digest]:
        """The blobs it lists."""
        return list(map(trusted, self.listed.split()))

    @property
    def size(self) -> int:
        """The total of the known sizes."""
        return sum(int(size) for size in self.claimed.split() if size != _UNKNOWN)

    def needed(self, known: Container[Digest]) -> list[Digest]:
        """Return the blobs that it needs to be whole: all but the children of a list that are not `known`."""
        absent = {child for child in self.children if child not in known}
        return [digest for digest in self.digests if digest not in absent]

    def is_whole(self, known: Container[Digest], held: Container[str]) -> bool:
        """Return whether all blobs that it needs are held; a list must have at least one known child."""
        if not self.is_list:
            return all(map(held.__contains__, self.listed.split()))
        needed = self.needed(known)
        return bool(needed) and all(map(held.__contains__, needed))

    def lists(self, digest: Digest) -> bool:
        """Return whether it lists the blob (fast)."""
        return digest in self.listed

    def claim(self, digest: Digest) -> int | None:
        """Return the size that it claims for a blob; None if it does not list the blob or has no size for it."""
        return self.sizes[digest] if self.lists(digest) else None

    def grown(self, child: "ManifestRecord") -> Self:
        """Return the list with the blobs of `child` added."""
        sizes = dict(self.sizes)
        for digest, size in {Digest(child.digest): len(child.body), **child.sizes}.items():
            if sizes.get(digest) is None:
                sizes[digest] = size
        return self._listing(sizes)

    def series(self, known: Mapping[Digest, "ManifestRecord"]) -> list[Series]:
        """Return the blobs of each manifest it stands for: itself, or those of its children that are `known`."""
        if not self.is_list:
            return [Series(self.digest, self.body, self.sizes)]
        found = []
        for number, child in enumerate(manifest_json.children_of(self.body)):
            if child.digest is None:
                digests = [layer.digest for layer in child.layers]
                found.append(Series(f"{self.digest} {number}", self.body, digests))
            elif child.digest in known:
                found += known[child.digest].series(known)
        return found

    def _listing(self, sizes: Mapping[Digest, int | None]) -> Self:
        claimed = " ".join(_UNKNOWN if size is None else str(size) for size in sizes.values())
        return self._replace(listed=" ".join(sizes), claimed=claimed)


_UNKNOWN: Final = "-"


@lru_cache(maxsize=16)
def _sizes(listed: str, claimed: str) -> Mapping[Digest, int | None]:
    """Return the blobs and their sizes. The last few are kept: each request for a blob of a model needs them."""
    return MappingProxyType(dict(zip(map(trusted, listed.split()), map(_parse_size, claimed.split()), strict=True)))


def _parse_size(text: str) -> int | None:
    return None if text == _UNKNOWN else int(text)


def by_model(manifests: Mapping[Name, ManifestRecord]) -> dict[Name, list[ManifestRecord]]:
    """Return the representations of each model: first the one for clients that take no lists."""
    found: dict[Name, list[ManifestRecord]] = {}
    for name, record in manifests.items():
        found.setdefault(name.model, []).insert(len(manifests) if name.takes_lists else 0, record)
    return found


def listed_by(records: Iterable[ManifestRecord]) -> set[Digest]:
    """Return all blobs that these manifests list."""
    return {digest for record in records for digest in record.digests}
