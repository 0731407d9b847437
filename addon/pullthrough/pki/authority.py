"""The certificate authority on disk, and the leaf certificates it issues for the names we intercept.

Invariant: the authority is useless for any other server. A CA without critical name constraints (RFC 5280 section
4.2.1.10) is neither made nor loaded. The key file is the commit point and contains the certificate, too: both appear
in one step or not at all, an existing key is never written to, and the certificate files are copies that are written
again when missing.

Does not know who trusts the certificate or what terminates TLS. The constraints bind a verifier that applies those
of a trust anchor, which RFC 5280 section 6.1 leaves open. Verifiers leave two gaps: OpenSSL does not apply them to a
wildcard CN when there is no SAN (openssl/openssl#30346; no constraint that Go accepts closes it), and
x509.verification accepts a wildcard one level above a permitted name.
"""

import contextlib
import ipaddress
import os
import re
import secrets
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pullthrough.core.errors import AuthorityError

KEY_NAME: Final = "ollama-cache-ca-key.pem"
CERTIFICATE_NAME: Final = "ollama-cache-ca-cert.pem"
DER_NAME: Final = "ollama-cache-ca-cert.cer"  # Windows opens this extension in its certificate dialogue
LIFETIME: Final = timedelta(days=3650)
"""Ten years, like mitmproxy's own CA: it is installed by hand on every client, and the constraints limit the harm."""
LEAF_LIFETIME: Final = timedelta(days=90)
"""As with Let's Encrypt; Apple refuses leaves of more than 825 days even from a CA that the user installed."""
BACKDATE: Final = timedelta(days=1)  # how far a client's clock may be behind ours

_NO_ADDRESSES: Final = tuple(x509.IPAddress(ipaddress.ip_network(text)) for text in ("0.0.0.0/0", "::/0"))
"""Permitted DNS names alone would leave every address permitted: each name form has its own list. The other forms are
not listed: Go refuses a critical extension that contains a directoryName, there is no agreed way to exclude all of
rfc822Name or URI, and EKU serverAuth keeps the certificate from uses that match those."""
_CA_USAGE: Final = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates, CRLs
_LEAF_USAGE: Final = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # handshakes
_SERVER_AUTH: Final = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
_LABEL: Final = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST: Final = re.compile(rf"(?!.{{254}})(?:{_LABEL}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){_LABEL}")
"""A lower-case host name; a number as the last label would make it an address (WHATWG URL section 3.5)."""
_MEND: Final = "move the ollama-cache-ca-* files away to make a new CA"
_Extensions = Iterable[tuple[x509.ExtensionType, bool]]  # (extension, whether it is critical)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate for `host` with its own key. `pem` is key, leaf, CA, as mitmproxy's option `certs` reads them.

    Times are aware; `issued_at` is the time of issue, not the back-dated notBefore.
    """

    host: str
    pem: bytes = field(repr=False)
    issued_at: datetime
    not_after: datetime


def has_authority(directory: Path) -> bool:
    """Return whether there is an authority, or any file of one."""
    return any((directory / name).exists() for name in (KEY_NAME, CERTIFICATE_NAME, DER_NAME))


def is_due(leaf: Leaf, now: datetime) -> bool:
    """Return whether to issue the next leaf: less than a third of this one's life is left, or it is not valid yet.

    The latter happens if the clock was set back.
    """
    lifetime = leaf.not_after - leaf.issued_at
    return leaf.not_after - now < lifetime / 3 or now < leaf.issued_at - BACKDATE


class Authority:
    """A CA that can sign for `permitted` and nothing else. Made by `load` and `load_or_create`.

    A permitted name includes all its subdomains: RFC 5280 section 4.2.1.10 has no form for "this host only".
    `fingerprint` is SHA-256 of the DER certificate as "AB:CD:…", as OpenSSL and browsers show it; `not_after` is aware.
    """

    def __init__(self, certificate_file: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate
        self.certificate_file = certificate_file
        self.permitted = _permitted_names(certificate)
        self._start, self.not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        self.fingerprint = certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    @classmethod
    def load_or_create(cls, directory: Path, permitted: Sequence[str], *, now: datetime) -> "Authority":
        """Return the CA in `directory`, made for exactly `permitted` if there is none yet.

        Any number of processes may call this at once: one makes the CA, and all return it. Raises as `load` does.
        """
        names = tuple(dict.fromkeys(_parse_host(name) for name in permitted))
        if not names:
            # Without a permitted dNSName every DNS name is permitted (RFC 5280 section 4.2.1.10).
            raise AuthorityError("certificate authority: expected at least one name to permit, got none")
        with _reporting(directory, "a folder to make a CA in", "choose another folder"):
            # A certificate without its key counts as an authority: clients may trust it, so it is not replaced.
            if not has_authority(directory):
                _create(directory, names, now)
        return cls.load(directory, names, now=now)

    @classmethod
    def load(cls, directory: Path, permitted: Sequence[str], *, now: datetime) -> "Authority":
        """Return the CA in `directory`, which must permit every name of `permitted` and may permit more.

        Missing certificate files are written again. Raises AuthorityError if the files are missing, unreadable, expired
        or do not belong together, if the CA is not constrained like ours, or if others can read the key.
        """
        certificate_file, der_file = directory / CERTIFICATE_NAME, directory / DER_NAME
        key, certificates = _read_key(directory / KEY_NAME)
        with _reporting(certificate_file, "the certificate of the key beside it"):
            if certificate_file.exists():
                certificates = x509.load_pem_x509_certificates(certificate_file.read_bytes())
            elif not certificates:
                raise FileNotFoundError("no such file")
            certificate = certificates[0]
            _check_bounds(certificate)
            if certificate.public_key() != key.public_key():
                raise ValueError(f"one of another key: {certificate.subject.rfc4514_string()}")
            authority = cls(certificate_file, key, certificate)
            if not certificate_file.exists():
                pem = certificate.public_bytes(Encoding.PEM)
                os.replace(_write_partial(certificate_file, pem, 0o644), certificate_file)
        # A mere convenience for installing the CA by hand: a folder mounted read-only may lack it.
        with contextlib.suppress(OSError):
            der = certificate.public_bytes(Encoding.DER)
            if not der_file.exists() or der_file.read_bytes() != der:
                os.replace(_write_partial(der_file, der, 0o644), der_file)
        authority._check_time(now)
        if missing := [name for name in dict.fromkeys(map(_parse_host, permitted)) if not authority.permits(name)]:
            raise AuthorityError(
                f"{certificate_file}: expected a CA that permits {', '.join(missing)}, got one that permits "
                f"{', '.join(authority.permitted)}; `ollama-cache ca renew {' '.join(missing)}` makes one beside it"
            )
        return authority

    def permits(self, host: str) -> bool:
        """Return whether the lower-case `host` is a permitted name or below one (RFC 5280 section 4.2.1.10)."""
        return any(host == name or host.endswith(f".{name}") for name in self.permitted)

    def issue(self, host: str, *, now: datetime, lifetime: timedelta = LEAF_LIFETIME) -> Leaf:
        """Return a leaf for `host` with a new P-256 key, valid for `lifetime` but no longer than the CA.

        Raises AuthorityError if the CA does not permit `host` or is not valid at `now`.
        """
        name = _parse_host(host)
        if not self.permits(name):
            raise AuthorityError(f"expected a host that the CA permits ({', '.join(self.permitted)}), got {host!r}")
        self._check_time(now)
        now = now.replace(microsecond=0)
        not_after = min(now + lifetime, self.not_after)
        key = ec.generate_private_key(ec.SECP256R1())
        # The organisation shows people where the certificate comes from, and fills the subject if the name is too long
        # for a CN (64, RFC 5280 appendix A.1): with an empty subject the SAN would have to be critical.
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ollama-cache")]
        if len(name) <= 64:
            subject.append(x509.NameAttribute(NameOID.COMMON_NAME, name))
        issuer_key_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        extensions = (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_LEAF_USAGE, True),
            (_SERVER_AUTH, False),
            (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key_id), False),
        )
        builder = _builder(x509.Name(subject), key, max(now - BACKDATE, self._start), not_after, extensions)
        certificate = builder.issuer_name(self.certificate.subject).sign(self._key, hashes.SHA256())
        pem = _key_pem(key) + certificate.public_bytes(Encoding.PEM) + self.certificate.public_bytes(Encoding.PEM)
        return Leaf(name, pem, now, not_after)

    def _check_time(self, now: datetime) -> None:
        if not self._start <= now < self.not_after:
            raise AuthorityError(
                f"{self.certificate_file}: expected a CA that is valid at {now}, got "
                f"one from {self._start} to {self.not_after}; set the clock, or {_MEND}"
            )


def _create(directory: Path, names: Iterable[str], now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    # Random rather than this machine's name, which every client would see: an old CA and its successor must differ in
    # subject, because verifiers look issuers up by it.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ollama-cache CA {secrets.token_hex(4)}")])
    builder = _builder(subject, key, now - BACKDATE, now + LIFETIME, _bounds(names))
    pem = builder.issuer_name(subject).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    # Open to others, as far as the umask allows: the certificate is meant to be copied, and the key has its own mode.
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    partial = _write_partial(directory / KEY_NAME, _key_pem(key) + pem, 0o600)
    # Except on Windows, renaming would replace a key that another process has just made.
    publish = os.rename if sys.platform == "win32" else os.link
    try:
        publish(partial, directory / KEY_NAME)
    except FileExistsError:
        return
    finally:
        partial.unlink(missing_ok=True)
    # Windows cannot open a folder; NTFS journals names itself.
    if sys.platform != "win32":
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _bounds(names: Iterable[str]) -> list[tuple[x509.ExtensionType, bool]]:
    """Return the extensions that make a CA harmless to every server but `names`."""
    return [
        (x509.NameConstraints([x509.DNSName(name) for name in names], _NO_ADDRESSES), True),
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_SERVER_AUTH, False),
        (_CA_USAGE, True),
    ]


def _check_bounds(certificate: x509.Certificate) -> None:
    """Raise ValueError unless the certificate is constrained as by `_create`, to any names."""
    found = {type(extension.value): extension for extension in certificate.extensions}
    names = _permitted_names(certificate)
    if not names or not all(map(_HOST.fullmatch, names)):
        subject = certificate.subject.rfc4514_string()
        raise ValueError(f"{subject} with name constraints that permit {names or 'everything'}")
    if x509.SubjectKeyIdentifier not in found:
        raise ValueError("one without the subject key identifier that leaves refer to")
    for expected, critical in _bounds(names):
        got = found.get(type(expected))
        if got is None or got.value != expected or (critical and not got.critical):
            raise ValueError(f"one that has {got} instead of {'critical' if critical else 'the'} {expected}")


def _permitted_names(certificate: x509.Certificate) -> tuple[str, ...]:
    found = (extension.value for extension in certificate.extensions)
    constraints = [value.permitted_subtrees or [] for value in found if isinstance(value, x509.NameConstraints)]
    return tuple(str(name.value) for names in constraints for name in names)


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, stop: datetime, extensions: _Extensions
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(stop)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _parse_host(name: str) -> str:
    """Return `name` in lower case. Raises AuthorityError if it is an address, a wildcard or no host name at all."""
    if not name.isascii() or not _HOST.fullmatch(name.lower()):
        raise AuthorityError(f"expected a host name, neither an address nor a wildcard, got {name!r}")
    return name.lower()


def _read_key(path: Path) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    """Return the key and the certificates in its file."""
    with _reporting(path, "the private key of the CA, EC and not encrypted"), path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        # Windows has no such bits: there the access list of the user's own folder protects the key.
        if sys.platform != "win32" and mode & 0o077:
            mend = f"chmod 600 {shlex.quote(str(path))}"
            raise AuthorityError(f"{path}: expected mode 0600 (a private key), got {mode:04o}; run `{mend}`")
        raw = file.read()
        key = serialization.load_pem_private_key(raw, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"a key of type {type(key).__name__}")
        return key, x509.load_pem_x509_certificates(raw) if b"-----BEGIN CERTIFICATE" in raw else []


def _write_partial(path: Path, data: bytes, mode: int) -> Path:
    """Write a new durable file beside `path`, never accessible beyond `mode`, and return its path."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(partial, flags, mode), "wb") as file:
        if sys.platform != "win32":
            os.fchmod(file.fileno(), mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return partial


@contextlib.contextmanager
def _reporting(path: Path, expected: str, mend: str = _MEND) -> Iterator[None]:
    try:
        yield
    # What cryptography raises for input that it cannot read; TypeError for a key with a password.
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
            x509.UnsupportedGeneralNameType) as error:  # fmt: skip
        raise AuthorityError(f"{path}: expected {expected}, got: {error}; {mend}") from error
