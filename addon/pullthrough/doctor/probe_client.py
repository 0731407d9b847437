"""Finding out about this machine's Ollama daemon what `rules` judges: its environment, and whom it trusts.

Invariant: nothing is changed, and nothing of an environment is shown but what concerns proxies. Does not know what is
wrong. What a daemon trusts is told for Linux, where Go reads files; elsewhere the system decides.
"""

import contextlib
import http.client
import json
import shlex
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil

from pullthrough.config.settings import Endpoint
from pullthrough.core.errors import SettingsError
from pullthrough.core.records import Version, version_of
from pullthrough.doctor.probe_server import PATIENCE_S, local_host, try_leg, tunnel
from pullthrough.doctor.rules import ClientFacts
from pullthrough.net.proxy_env import ParentProxies

_LISTS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_FOLDERS: Final = "/etc/ssl/certs:/etc/pki/tls/certs"
"""Of lists Go takes the first, of folders all (crypto/x509/root_linux.go)."""


def client_facts(hosts: tuple[str, ...]) -> ClientFacts:
    """`hosts` are the registry and the blob host."""
    configured = _configured()
    daemon = _running(configured)
    proxy, leg, trusted = None, None, ""
    roots = _roots_problem(daemon or {})
    with contextlib.suppress(SettingsError):  # which `rules` finds, from the same environment
        proxy = ParentProxies.parse(daemon or {}).https
    if proxy is not None:
        endpoint = Endpoint(proxy.scheme, proxy.host, proxy.port)
        leg = try_leg(endpoint, hosts[0])
        if leg.issuer and not roots:
            trusted = _trust_problem(endpoint, hosts[0], daemon or {})
    return ClientFacts(
        daemon=daemon,
        configured=configured,
        version=_version(daemon or {}),
        leg=leg,
        trusted=trusted,
        roots=roots,
        hosts=hosts,
    )


def _version(environment: Mapping[str, str]) -> Version | None:
    """What the daemon says of itself (server/routes.go, GET /api/version); None where it does not."""
    try:
        where = urlsplit(f"//{environment.get('OLLAMA_HOST', '').rpartition('//')[2]}")
        connection = http.client.HTTPConnection(
            local_host(where.hostname or ""), where.port or 11434, timeout=PATIENCE_S
        )
        with contextlib.closing(connection):
            connection.request("GET", "/api/version")
            told = json.loads(connection.getresponse().read(1 << 16))
        return version_of(f"ollama/{told['version']}")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None


def _configured() -> dict[str, str]:
    """What systemd is to start the service with."""
    if shutil.which("systemctl") is None:
        return {}
    command = ["systemctl", "show", "ollama.service", "--property", "Environment", "--value"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)  # noqa: S603
    return dict(word.split("=", 1) for word in shlex.split(done.stdout) if "=" in word)


def _running(configured: dict[str, str]) -> dict[str, str] | None:
    """The environment of `ollama serve`; what it is to be where we may not look."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] in ("ollama", "ollama.exe") and "serve" in (process.info["cmdline"] or ()):
            try:
                return process.environ()
            except psutil.AccessDenied:
                return configured
            except psutil.NoSuchProcess:
                continue
    return None


def _roots_problem(environment: Mapping[str, str]) -> str:
    file = environment.get("SSL_CERT_FILE", "")
    if not file or sys.platform != "linux":
        return ""
    try:
        if not Path(file).stat().st_mode & 0o004:
            return f"expected a file that everybody can read, got {file}, which the daemon's user may not"
        ssl.create_default_context(cafile=file)
    except OSError as error:
        return f"{file}: {error.strerror or error}"
    return ""


def _trust_problem(proxy: Endpoint, host: str, environment: Mapping[str, str]) -> str:
    if sys.platform != "linux":
        return ""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    lists = [environment["SSL_CERT_FILE"]] if environment.get("SSL_CERT_FILE") else _LISTS
    if file := next((file for file in lists if Path(file).is_file()), None):
        context.load_verify_locations(cafile=file)
    # OpenSSL finds in a folder only what was hashed there, which the systems' tools do.
    for folder in (environment.get("SSL_CERT_DIR") or _FOLDERS).split(":"):
        if Path(folder).is_dir():
            context.load_verify_locations(capath=folder)
    try:
        with tunnel(proxy, host, context):
            return ""
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except (OSError, http.client.HTTPException) as error:
        return str(error)
