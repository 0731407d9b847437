"""A blob's name: sha256 and 64 hexadecimal digits. Parsed once, trusted after.

Invariant: a `Digest` holds lower-case hexadecimal, so two spellings of one name are equal and share one file.
Knows no bytes: hashing and comparing is the store's work.
"""

import re
from dataclasses import dataclass
from typing import Self

from pullthrough.errors import InvalidRequest

# Ollama sends `sha256:` on the wire and uses `sha256-` in file names; clients accept both with either case of
# hexadecimal (server/modelpath.go, types/model; v0.33).
_FORM = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The sha256 of a blob, normalised."""

    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`sha256:<64 hex>` or `sha256-<64 hex>` in any case; InvalidRequest otherwise."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise InvalidRequest(f"expected sha256:<64 hexadecimal digits>, got {text[:100]!r}")
        return cls(match[1].lower())

    def __hash__(self) -> int:
        # The generated one makes a tuple first, and digests are looked up by the hundred thousand.
        return hash(self.hex)

    def __str__(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def file_name(self) -> str:
        """The name used in folders, where a colon is not portable."""
        return f"sha256-{self.hex}"

    @property
    def short(self) -> str:
        """The twelve digits that `ollama pull` shows in its progress lines."""
        return self.hex[:12]
