"""The certificate authority in use, and the one that is to follow it.

A CA is of use only while clients trust it, and each client is set up by hand. So the next one is made in `next/`,
beside the one in use, long before anybody depends on it. Until the switch it signs only for names that the one in use
does not permit, and that nobody could pull before.

Invariant: a client that trusts only the authority in use never meets another one for a name that the former permits. A
switch is one rename: before it the old authority counts, after it the next. Does not know who trusts which.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from pullthrough.core.errors import AuthorityError
from pullthrough.pki.authority import CERTIFICATE_NAME, DER_NAME, KEY_NAME, Authority, Leaf, has_authority

NEXT: Final = "next"
"""The folder of the next authority, beside the files of the one in use."""
OFFERED: Final = "offered"
"""A file in that folder: clients have been told to trust the next authority."""
EARLIEST: Final = datetime(2026, 11, 1, tzinfo=UTC)
"""This version was made then: a clock that shows an earlier time is wrong."""


@dataclass(frozen=True, slots=True)
class Rollover:
    """The authorities that sign and that clients are told to trust."""

    current: Authority
    following: Authority | None

    @classmethod
    def load_or_create(cls, directory: Path, names: Sequence[str], *, now: datetime) -> "Rollover":
        """Do as `load` does, but make an authority if there is none."""
        if not has_authority(directory):
            _check_making(names, now)
        if not _has_next(directory):
            return cls(Authority.load_or_create(directory, names, now=now), None)
        return cls.load(directory, names, now=now)

    @classmethod
    def load(cls, directory: Path, names: Sequence[str], *, now: datetime) -> "Rollover":
        """Load the authorities in `directory`; one of them must permit each of `names`. Raises AuthorityError."""
        if not _has_next(directory):
            return cls(Authority.load(directory, names, now=now), None)
        current = Authority.load(directory, (), now=now)
        beyond = [name for name in names if not current.permits(name)]
        return cls(current, Authority.load(directory / NEXT, beyond, now=now))

    @property
    def all(self) -> tuple[Authority, ...]:
        """The authorities, the one in use first."""
        return (self.current,) if self.following is None else (self.current, self.following)

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The certificates that clients are to trust."""
        return tuple(authority.certificate for authority in self.all)

    @property
    def permitted(self) -> tuple[str, ...]:
        """The names that the authorities together can sign for."""
        return tuple(dict.fromkeys(name for authority in self.all for name in authority.permitted))

    def of(self, host: str) -> Authority:
        """Return the authority whose leaf `host` gets."""
        return next((authority for authority in self.all if authority.permits(host)), self.current)

    def issue(self, host: str, *, now: datetime) -> Leaf:
        """Issue a leaf; parameters and errors as for `Authority.issue`."""
        return self.of(host).issue(host, now=now)

    def offer(self) -> None:
        """Record that clients are told of the next authority from now on: it is no longer replaced unasked."""
        # A process that cannot write there cannot replace it, either.
        if self.following is not None:
            with contextlib.suppress(OSError):
                (self.following.certificate_file.parent / OFFERED).touch()


def renew(directory: Path, names: Sequence[str], *, now: datetime, replace: bool = False) -> Authority:
    """Make the next authority, for `names` only; return the present one if it is for the same names.

    One for other names is replaced if no client can trust it yet, or with `replace`.

    Raises:
        AuthorityError: none is in use, a name must not be signed for, or clients may already trust the next one.
    """
    Authority.load(directory, (), now=now)
    _check_making(names, now)
    beside = directory / NEXT
    if _has_next(directory):
        following = Authority.load(beside, (), now=now)
        if set(following.permitted) == set(names):
            return following
        if (beside / OFFERED).exists() and not replace:
            raise AuthorityError(
                f"{beside}: there is a next authority already, for {', '.join(following.permitted)}, and clients may "
                "trust it; --replace makes another in its place, and they have to be set up again"
            )
        shutil.rmtree(beside)
    return Authority.load_or_create(beside, names, now=now)


def _check_making(names: Iterable[str], now: datetime) -> None:
    """Refuse an authority that could be used for other people's hosts, or not at all.

    Raises:
        AuthorityError: a name has other people's hosts below it, or the clock is wrong.
    """
    # Imported here because its list takes a tenth of a second to read.
    from publicsuffixlist import PublicSuffixList

    suffixes = PublicSuffixList(accept_unknown=False)
    if public := [name for name in names if suffixes.is_public(name)]:
        raise AuthorityError(
            f"expected names of registries, got {', '.join(public)}, below which anybody may have a host (a public "
            "suffix): an authority signs for all names below those that it permits"
        )
    if now < EARLIEST:
        raise AuthorityError(
            f"this machine's clock says {now:%Y-%m-%d}, which is before this version was made: set the clock first; "
            "an authority of that day would be at its end too early"
        )


def switch(directory: Path, *, now: datetime) -> Authority:
    """Put the next authority into use, and keep the old one in its own folder. Raises AuthorityError or OSError."""
    if not _has_next(directory):
        raise AuthorityError(
            f"expected an authority in {directory / NEXT}, got none; make it with `ollama-cache ca renew`"
        )
    current = Authority.load(directory, (), now=now)
    Authority.load(directory / NEXT, (), now=now)
    put_away = directory / f"former-{current.fingerprint[:11].replace(':', '').lower()}"
    put_away.mkdir(mode=0o700, exist_ok=True)
    for name in (KEY_NAME, CERTIFICATE_NAME, DER_NAME):
        if (directory / name).exists():
            shutil.copy2(directory / name, put_away)
    # These are copies of what is in the key file, and are made again from the one that is there now.
    for name in (CERTIFICATE_NAME, DER_NAME):
        (directory / name).unlink(missing_ok=True)
    os.replace(directory / NEXT / KEY_NAME, directory / KEY_NAME)
    shutil.rmtree(directory / NEXT)
    return Authority.load(directory, (), now=now)


def former(directory: Path, *, now: datetime) -> tuple[Authority, ...]:
    """Return the authorities that were in use before a switch, as far as they can still be read."""
    found = []
    for folder in sorted(directory.glob("former-*")):
        with contextlib.suppress(AuthorityError):
            found.append(Authority.load(folder, (), now=now))
    return tuple(found)


def _has_next(directory: Path) -> bool:
    return (directory / NEXT / KEY_NAME).exists()
