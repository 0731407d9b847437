"""The certificate authority in use, and the one that is to follow it.

A CA lasts as long as clients trust it, and each client is set up by hand: so the next one is made beside the one in
use, in `next/`, long before anybody depends on it. Until it is switched to, it signs only for names that the one in use
does not permit, and that nobody could pull before.

Invariant: a client that trusts only the authority in use never meets another for a name which that permits. A switch is
one rename: before it the former counts, after it the next. Does not know who trusts which.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from pullthrough.core.errors import AuthorityError
from pullthrough.pki.authority import CERTIFICATE_NAME, DER_NAME, KEY_NAME, Authority, Leaf

NEXT: Final = "next"
"""The folder beside the files of the authority in use."""


@dataclass(frozen=True, slots=True)
class Rollover:
    """What signs, and what clients are told to trust."""

    current: Authority
    following: Authority | None

    @classmethod
    def load_or_create(cls, directory: Path, names: Sequence[str], *, now: datetime) -> "Rollover":
        """As `load`, but made where there is none."""
        if not _has_next(directory):
            return cls(Authority.load_or_create(directory, names, now=now), None)
        return cls.load(directory, names, now=now)

    @classmethod
    def load(cls, directory: Path, names: Sequence[str], *, now: datetime) -> "Rollover":
        """Those of `directory`, of which one permits each of `names`. AuthorityError."""
        if not _has_next(directory):
            return cls(Authority.load(directory, names, now=now), None)
        current = Authority.load(directory, (), now=now)
        beyond = [name for name in names if not current.permits(name)]
        return cls(current, Authority.load(directory / NEXT, beyond, now=now))

    @property
    def all(self) -> tuple[Authority, ...]:
        """The one in use first."""
        return (self.current,) if self.following is None else (self.current, self.following)

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """What clients are to trust."""
        return tuple(authority.certificate for authority in self.all)

    @property
    def permitted(self) -> tuple[str, ...]:
        """What they can vouch for together."""
        return tuple(dict.fromkeys(name for authority in self.all for name in authority.permitted))

    def of(self, host: str) -> Authority:
        """The authority whose leaf `host` gets."""
        return next((authority for authority in self.all if authority.permits(host)), self.current)

    def issue(self, host: str, *, now: datetime) -> Leaf:
        """As Authority.issue."""
        return self.of(host).issue(host, now=now)


def renew(directory: Path, names: Sequence[str], *, now: datetime) -> Authority:
    """Make the next authority, for `names` and what the one in use permits; the same again if it is there.

    AuthorityError where there is none in use, or where the next one was made for fewer names.
    """
    current = Authority.load(directory, (), now=now)
    return Authority.load_or_create(directory / NEXT, [*current.permitted, *names], now=now)


def switch(directory: Path, *, now: datetime) -> Authority:
    """Let the next authority be the one in use, and keep the former in a folder of its own. AuthorityError, OSError."""
    if not _has_next(directory):
        raise AuthorityError(
            f"expected an authority in {directory / NEXT}, got none; make it with `ollama-cache ca renew`"
        )
    current = Authority.load(directory, (), now=now)
    Authority.load(directory / NEXT, (), now=now)
    former = directory / f"former-{current.fingerprint[:11].replace(':', '').lower()}"
    former.mkdir(mode=0o700, exist_ok=True)
    for name in (KEY_NAME, CERTIFICATE_NAME):
        shutil.copy2(directory / name, former)
    # Copies of what the key file carries, made again from whichever that is.
    for name in (CERTIFICATE_NAME, DER_NAME):
        (directory / name).unlink(missing_ok=True)
    os.replace(directory / NEXT / KEY_NAME, directory / KEY_NAME)
    shutil.rmtree(directory / NEXT)
    return Authority.load(directory, (), now=now)


def _has_next(directory: Path) -> bool:
    return (directory / NEXT / KEY_NAME).exists()
