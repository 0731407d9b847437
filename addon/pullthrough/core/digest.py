"""A blob's name: sha256 and 64 hexadecimal digits. Parsed once, trusted after.

Invariant: a `Digest` holds lower-case hexadecimal, so two spellings of one name are equal and share one file.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Final, Self

from pullthrough.core.errors import InvalidRequest

# Ollama sends `sha256:` on the wire and uses `sha256-` in file names; clients accept both with either case of
# hexadecimal (server/modelpath.go, types/model; v0.33).
_FORM = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


LETTERS: Final = 71
"""The length of a digest's hexadecimal."""


class Digest(str):
    """The sha256 of a blob, normalised: the text `sha256:<64 hex>`.

    A subclass of str, because digests are hashed and compared by the hundred thousand.
    """

    __slots__ = ()

    def __new__(cls, hexadecimal: str) -> Self:
        """`hexadecimal` is 64 lower-case digits."""
        return super().__new__(cls, f"sha256:{hexadecimal}")

    def __getnewargs__(self) -> tuple[str]:
        return (self.hex,)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `sha256:<64 hex>` or `sha256-<64 hex>`, in any case. Raises InvalidRequest."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise InvalidRequest(f"expected sha256:<64 hexadecimal digits>, got {text[:100]!r}")
        return cls(match[1].lower())

    @property
    def hex(self) -> str:
        """The bare hexadecimal, as hashlib gives it."""
        return self[7:]

    @property
    def file_name(self) -> str:
        """The name of the blob's file: a colon is not portable in one."""
        return f"sha256-{self.hex}"

    @property
    def short(self) -> str:
        """The twelve digits that `ollama pull` shows in its progress lines."""
        return self[7:19]


trusted: Final[Callable[[str], Digest]] = partial(str.__new__, Digest)
"""The digest of a text that is known to be one: fast and unchecked."""

EMPTY: Final = Digest("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
"""The digest of no bytes: the only one whose size is known, and whose blob may be empty."""
