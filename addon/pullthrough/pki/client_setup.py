"""The setup of clients: scripts and descriptions that make an Ollama trust our authority and use our proxy.

The templates are in `connect/`. A script contains the certificates and takes the proxy's address as an argument, so
that its checksum is the same whatever this machine is called, and one file is all that has to be fetched.

Invariant: a document depends only on the certificates and the configured address, never on what a client sends.
Does not know what serves the documents.
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
"""The kinds of client that have a script."""
KINDS: Final = SYSTEMS | {"compose": "compose.yaml", "kubernetes": "kubernetes.yaml"}
"""Each kind of client, and the document that sets it up."""

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
"""The command that undoes the setup on the client, where each script leaves a copy of itself."""


@dataclass(frozen=True, slots=True)
class SetupDocument:
    """A file for clients."""

    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class SetupGuide:
    """The information that a person needs to set up clients."""

    documents: Mapping[str, SetupDocument]
    """The documents, by the path at which they are served."""
    commands: Mapping[str, str]
    """The one line for each of KINDS."""
    sums: Mapping[str, str]
    """The SHA-256 of the file that each line fetches."""
    proxy: str
    """The proxy's URL, for people who set HTTPS_PROXY by hand."""
    fingerprints: tuple[str, ...]
    """The SHA-256 fingerprints of the certificates to be trusted, as openssl prints them."""


class Template(string.Template):
    delimiter = "@@"  # means nothing to any shell


def documents(
    certificates: Sequence[x509.Certificate], names: Sequence[str], proxy: str
) -> Mapping[str, SetupDocument]:
    """Return all documents, by the path at which they are served.

    `certificates` are to be trusted, the one in use first, and permit `names`; `proxy` is the URL in documents that
    take no argument.
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
    """Return the name or address by which clients reach this machine: `advertise`, else our address on the network."""
    return settings.advertise.host if settings.advertise is not None else platform.lan_address()


def clients_origin(settings: Settings, host: str) -> str:
    """Return the plain port's origin for clients that know this machine as `host`; port 0 in it if that port is off."""
    published = settings.advertise.port if settings.advertise is not None else 0
    listening = settings.listen[0][1] if settings.listen else 0
    return Endpoint("http", host, published or listening).origin


def clients_page(settings: Settings) -> str:
    """Return the address of the status page, for when the plain port is open."""
    host = settings.listen[0][0]
    is_one = host and not (is_address(host) and ipaddress.ip_address(host).is_unspecified)
    if settings.advertise is not None or not is_one:
        host = clients_host(settings)
    return f"{clients_origin(settings, host)}/"


def command(kind: str, document: SetupDocument, *, server: str, proxy: str) -> str:
    """Return the shell line with which a client fetches `document` from the origin `server`, checks and applies it."""
    return _FETCH_AND_RUN[kind].format(
        url=f"{server}/connect/{KINDS[kind]}", sum=sha256(document.body).hexdigest(), proxy=proxy
    )


def guide(
    settings: Settings, certificates: Sequence[x509.Certificate], names: Sequence[str], proxy_port: int
) -> SetupGuide:
    """Return all documents of a running cache, and what people need to know; parameters as for `documents`."""
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
