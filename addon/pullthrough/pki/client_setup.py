"""What sets up a client: scripts and descriptions that make an Ollama trust our authority and use our proxy.

The templates lie in `connect/`. A script carries the certificates and takes the proxy's address as an argument, so that
its checksum is the same whatever this machine is called, and whoever has fetched one file has fetched all.

Invariant: a document depends on the certificates and the configured address alone, never on what a client says.
Does not know who serves the documents.
"""

import ipaddress
import string
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from pullthrough.config.parsers import is_address
from pullthrough.config.settings import Endpoint, Settings
from pullthrough.runtime import platform

TEXT: Final = "text/plain; charset=utf-8"
YAML: Final = "application/yaml"
"""RFC 9512."""
TEMPLATES: Final = {
    "linux.sh": TEXT,
    "macos.sh": TEXT,
    "windows.ps1": TEXT,
    "compose.yaml": YAML,
    "kubernetes.yaml": YAML,
}

SYSTEMS: Final = {"linux": "linux.sh", "macos": "macos.sh", "windows": "windows.ps1"}
"""Those with a script."""
KINDS: Final = SYSTEMS | {"compose": "compose.yaml", "kubernetes": "kubernetes.yaml"}
"""What a client may be, and the document that sets it up."""

_FETCH_AND_RUN: Final = {
    "linux": """cd "$(mktemp -d)" && curl -fsSO --noproxy '*' {url} \
&& echo "{sum}  linux.sh" | sha256sum -c && $(command -v sudo) sh linux.sh {proxy}""",
    "macos": """cd "$(mktemp -d)" && curl -fsSO --noproxy '*' {url} \
&& echo "{sum}  macos.sh" | shasum -a 256 -c && sh macos.sh {proxy}""",
    "windows": """$f = "$(New-TemporaryFile).ps1"; curl.exe -fsSo $f --noproxy '*' {url}; \
if ((Get-FileHash $f).Hash -eq '{sum}') {{ powershell -ExecutionPolicy Bypass -File $f {proxy} }} \
else {{ 'expected the script of this cache, got another' }}""",
    "compose": """curl -fsSO --noproxy '*' {url} && echo "{sum}  compose.yaml" | sha256sum -c \
&& docker compose -f compose.yaml up -d""",
    "kubernetes": """curl -fsSO --noproxy '*' {url} && echo "{sum}  kubernetes.yaml" | sha256sum -c \
&& kubectl apply -f kubernetes.yaml""",
}

UNDO: Final = {
    "linux": "$(command -v sudo) sh /etc/ollama-cache/client.sh --undo",
    "macos": """sh "$HOME/Library/Application Support/ollama-cache/client.sh" --undo""",
    "windows": r"""powershell -ExecutionPolicy Bypass -File "$env:LOCALAPPDATA\ollama-cache\client.ps1" -Undo""",
    "compose": "docker compose -f compose.yaml down",
    "kubernetes": "kubectl delete -f kubernetes.yaml",
}
"""What takes it back on the client: each script leaves itself there."""


@dataclass(frozen=True, slots=True)
class SetupDocument:
    """A file for clients."""

    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class SetupGuide:
    """What a person needs to set up clients."""

    documents: Mapping[str, SetupDocument]
    """By the path they are served at."""
    commands: Mapping[str, str]
    """The one line for each of KINDS."""
    sums: Mapping[str, str]
    """The SHA-256 of what each line fetches."""
    proxy: str
    """A URL, for those who set HTTPS_PROXY by hand."""
    fingerprints: tuple[str, ...]
    """SHA-256 of the certificates to be trusted, as openssl prints them."""


class Template(string.Template):
    delimiter = "@@"  # which no shell gives a meaning to


def documents(
    certificates: Sequence[x509.Certificate], names: Sequence[str], proxy: str
) -> Mapping[str, SetupDocument]:
    """Return all documents by the path they are served at.

    `certificates` are to be trusted, the one in use first, and permit `names`; `proxy` is a URL for those documents
    that have nobody to tell them one.
    """
    pem = "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)
    fingerprints = [certificate.fingerprint(hashes.SHA256()) for certificate in certificates]
    values = {
        "certificates": pem.strip(),
        "indented": textwrap.indent(pem, " " * 6).strip(),
        "fingerprints": " ".join(fingerprint.hex(":").upper() for fingerprint in fingerprints),
        "hashes": " ".join(fingerprint.hex().upper() for fingerprint in fingerprints),
        "names": ", ".join(names),
        "proxy": proxy,
    }
    folder = resources.files("pullthrough.pki") / "connect"
    rendered = {
        f"/connect/{name}": SetupDocument(
            content_type, Template((folder / name).read_text(encoding="utf-8")).substitute(values).encode()
        )
        for name, content_type in TEMPLATES.items()
    }
    return {
        "/ca.crt": SetupDocument("application/pem-certificate-chain", pem.encode()),
        "/ca.cer": SetupDocument("application/pkix-cert", certificates[0].public_bytes(Encoding.DER)),
        **rendered,
    }


def clients_host(settings: Settings) -> str:
    """Return the name or address of this machine for clients: what `advertise` says, else our address towards
    others.
    """
    return settings.advertise.host if settings.advertise is not None else platform.lan_address()


def clients_origin(settings: Settings, host: str) -> str:
    """Return where clients that know this machine by `host` find the plain port; where it is off, an origin of port
    0.
    """
    published = settings.advertise.port if settings.advertise is not None else 0
    listening = settings.listen[0][1] if settings.listen else 0
    return Endpoint("http", host, published or listening).origin


def clients_page(settings: Settings) -> str:
    """Return the address of the status page, where the plain port is open."""
    host = settings.listen[0][0]
    is_one = host and not (is_address(host) and ipaddress.ip_address(host).is_unspecified)
    if settings.advertise is not None or not is_one:
        host = clients_host(settings)
    return f"{clients_origin(settings, host)}/"


def command(kind: str, document: SetupDocument, *, server: str, proxy: str) -> str:
    """Return the one line for a client's shell that fetches `document` from the origin `server`, checks it and
    applies it.
    """
    return _FETCH_AND_RUN[kind].format(
        url=f"{server}/connect/{KINDS[kind]}", sum=sha256(document.body).hexdigest(), proxy=proxy
    )


def guide(
    settings: Settings, certificates: Sequence[x509.Certificate], names: Sequence[str], proxy_port: int
) -> SetupGuide:
    """Return all documents of a running cache, and what is to be said of them; parameters as for `documents`."""
    host = clients_host(settings)
    proxy = Endpoint("http", host, proxy_port).origin
    made = documents(certificates, names, proxy)
    found = {kind: made[f"/connect/{name}"] for kind, name in KINDS.items()}
    server = clients_origin(settings, host)
    return SetupGuide(
        made,
        {kind: command(kind, document, server=server, proxy=proxy) for kind, document in found.items()},
        {kind: sha256(document.body).hexdigest() for kind, document in found.items()},
        proxy,
        tuple(each.fingerprint(hashes.SHA256()).hex(":").upper() for each in certificates),
    )
