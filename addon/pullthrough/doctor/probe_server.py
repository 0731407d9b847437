"""The facts about a cache that `rules` judges: its ports, its authority, the registry, the store, the disk.

Invariant: probing changes nothing here or elsewhere, except that missing copies of a certificate are written again.
Every attempt ends within seconds, and one that fails is a fact, not an error. Judges nothing.
"""

import contextlib
import email.utils
import http.client
import math
import os
import shutil
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from pullthrough.config.settings import Endpoint, Settings
from pullthrough.core import presigned
from pullthrough.core.bounded_json import loads
from pullthrough.core.digest import Digest
from pullthrough.core.errors import AuthorityError, CacheError, StoreError
from pullthrough.core.manifest_json import DOCKER_TYPE
from pullthrough.doctor.rules import Leg, ServerFacts
from pullthrough.net.address_policy import local_ports
from pullthrough.pki.authority import CERTIFICATE_NAME, KEY_NAME
from pullthrough.pki.rollover import Rollover
from pullthrough.runtime.platform import own_addresses
from pullthrough.runtime.whereabouts import running_caches
from pullthrough.store.layout import check_marker
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import Role, State

SAMPLE: Final = "library/all-minilm"
"""A small public model, whose config is requested to see whether ranges work."""
PATIENCE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """How the registry answers us; the fields are those of ServerFacts."""

    upstream: str = ""
    displaced: str = ""
    blob_host: str = ""
    object_store: str = ""
    ranges: str = ""
    unsigned: str = ""
    bypassed: int = 0
    skew_s: float = 0.0
    refused: str = ""
    descriptors: int = 0


async def look_out(upstream: Upstream, settings: Settings, now: datetime) -> Outlook:
    """Ask the first registry for a manifest and for one byte of a blob; `now` is timezone-aware.

    For the blob host and the object store it reports their last known state, as everywhere else.
    """
    found = await _ask(upstream, settings, now)
    down = {
        service.role: f"{service.host}: {service.why}"
        for service in upstream.reachability.services
        if service.state is State.DOWN
    }
    return replace(
        found,
        displaced="; ".join(upstream.impostors.told) or found.displaced,
        blob_host=down.get(Role.BLOB_HOST, ""),
        object_store=down.get(Role.OBJECT_STORE, ""),
    )


async def _ask(upstream: Upstream, settings: Settings, now: datetime) -> Outlook:
    if settings.offline:
        return Outlook()
    host = settings.registries[0]
    try:
        target = f"/v2/{SAMPLE}/manifests/latest"
        response = await upstream.ask("GET", host, target, {"Accept": DOCKER_TYPE}, timeout_s=PATIENCE_S)
    except CacheError as error:
        return Outlook(upstream=f"{host}: {str(error).removeprefix(f'{host}: ')}")
    skew_s = 0.0
    with contextlib.suppress(KeyError, ValueError, TypeError):  # no date, a malformed one, or one without a zone
        skew_s = (now - email.utils.parsedate_to_datetime(response.headers["Date"])).total_seconds()
    if response.status != 200:
        return Outlook(skew_s=skew_s)  # another registry need not have the sample
    try:
        digest = Digest.parse(loads(response.body, limit=len(response.body))["config"]["digest"])
    except (ValueError, KeyError, TypeError):
        return Outlook(displaced=f"{host} answers 200 and no manifest", skew_s=skew_s)
    try:
        source, stream = await upstream.obtain(host, SAMPLE, digest, {}, asked=(0, 1), timeout_s=PATIENCE_S)
        unsigned = _unsigned(settings, source.url if stream is None else "")
        stream = stream or await upstream.open_range(source, 0, 1, expected_length=None, validator=None)
        stream.close()
    except CacheError as error:
        return Outlook(ranges=str(error), skew_s=skew_s)
    ranges = "expected 206 to a request for one byte, got 200" if stream.whole else ""
    return Outlook(ranges=ranges, unsigned=unsigned, skew_s=skew_s)


def _unsigned(settings: Settings, location: str) -> str:
    """Return why the registry's redirect does not help clients that fetch past this proxy; "" if it does."""
    host = urlsplit(location).hostname or ""
    if not location:
        return f"{settings.registries[0]} answers with the bytes themselves"
    if host != settings.blob_host or presigned.expiry(location, now=time.time()) is None:
        return f"{settings.registries[0]} redirects to {host}, without a signature of the blob host's"
    return ""


def server_facts(settings: Settings, proxy: Endpoint, out: Outlook, *, running: bool, now: datetime) -> ServerFacts:
    """Gather the facts. `proxy` is where the proxy listens, or would; `running` is as in ServerFacts."""
    rollover, problem = None, ""
    try:
        # Before the first start there is no authority, and that is no problem.
        if running or any((settings.certs / name).exists() for name in (KEY_NAME, CERTIFICATE_NAME)):
            rollover = Rollover.load(settings.certs, settings.intercepted, now=now)
    except AuthorityError as error:
        problem = str(error)
    door = Endpoint("http", *settings.listen[0]) if settings.listen else None
    disk = shutil.disk_usage(_existing(settings.dir))
    return ServerFacts(
        authority=problem,
        expires_s=(rollover.all[-1].not_after - now).total_seconds() if rollover else math.inf,
        issuer=common_name(rollover.of(settings.registries[0]).certificate.subject) if rollover else "",
        store=_store_problem(settings.dir),
        owner=_owner(settings.dir),
        unwritable=_write_problem(settings.dir),
        index="" if running else _index_problem(settings.dir),
        quarantined=_count(settings.dir / "quarantine"),
        running=running,
        elsewhere=() if running else _elsewhere(settings),
        leg=try_leg(proxy, settings.registries[0]),
        port=_port_problem(door, rollover) if door else "",
        taken=door is not None and not _reach(door),
        local=local_ports(proxy, settings) if running else (),
        advertised=_advertised_problem(settings) if running else "",
        refused=out.refused,
        descriptors=out.descriptors,
        upstream=out.upstream,
        displaced=out.displaced,
        blob_host=out.blob_host,
        object_store=out.object_store,
        ranges=out.ranges,
        unsigned=out.unsigned,
        bypassed=out.bypassed,
        skew_s=out.skew_s,
        disk=disk.total,
        free=disk.free,
        min_free=settings.min_free,
    )


def try_leg(proxy: Endpoint, host: str) -> Leg:
    """Connect to `host` through `proxy`, and see who signed the certificate presented. Verifies nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with tunnel(proxy, host, context) as sock:
            raw = sock.getpeercert(binary_form=True)
    except ConnectionRefusedError as error:
        return Leg(address=proxy.authority, reached=error.strerror or str(error))
    except (OSError, http.client.HTTPException) as error:
        reached = _reach(proxy)
        return Leg(address=proxy.authority, reached=reached, answered="" if reached else str(error) or "it hung up")
    if not raw:
        return Leg(address=proxy.authority, answered="it presents no certificate")
    leaf = x509.load_der_x509_certificate(raw)
    left_s = leaf.not_valid_after_utc.timestamp() - time.time()
    return Leg(address=proxy.authority, issuer=common_name(leaf.issuer), left_s=left_s)


@contextlib.contextmanager
def tunnel(proxy: Endpoint, host: str, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """Open TLS with `host` through `proxy`. Raises OSError (including ssl.SSLError), HTTPException."""
    connection = http.client.HTTPConnection(local_host(proxy.host), proxy.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.set_tunnel(host, 443)
        connection.connect()
        with context.wrap_socket(connection.sock, server_hostname=host) as sock:
            yield sock


def common_name(name: x509.Name) -> str:
    """Return the CN, or the whole name if there is none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _reach(endpoint: Endpoint) -> str:
    """Return why no connection to the endpoint succeeds; "" if one does."""
    try:
        socket.create_connection((local_host(endpoint.host), endpoint.port), PATIENCE_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def local_host(host: str) -> str:
    """Return the address at which this machine reaches a listener on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- not listened on


def _port_problem(door: Endpoint, rollover: Rollover | None) -> str:
    connection = http.client.HTTPConnection(local_host(door.host), door.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/ca.crt")
            response = connection.getresponse()
            body = response.read(1 << 20)
        except (OSError, http.client.HTTPException) as error:
            return f"{door.authority}: {error}"
    pem = rollover.current.certificate.public_bytes(Encoding.PEM) if rollover else b""
    if response.status != 200 or pem not in body:
        return f"{door.authority}: expected our certificate at /ca.crt, got another answer ({response.status})"
    return ""


def _store_problem(folder: Path) -> str:
    try:
        if folder.is_dir() and any(folder.iterdir()):
            check_marker(folder)
    except (StoreError, OSError) as error:
        return str(error)
    return ""


def _owner(folder: Path) -> str:
    """Return who owns the folder if this user may not judge it, else ""."""
    try:
        owner = _existing(folder).stat().st_uid if folder.exists() else None
    except PermissionError as error:
        return f"{error.filename}: {error.strerror}"
    if sys.platform == "win32" or owner is None or os.geteuid() in (0, owner):
        return ""
    return f"{folder} belongs to user {owner}, and this is user {os.geteuid()}"


def _write_problem(folder: Path) -> str:
    with contextlib.suppress(OSError):
        if folder.exists() and not os.access(folder, os.W_OK):
            return f"{folder}: not writable"
    return ""


def _index_problem(folder: Path) -> str:
    """Return what SQLite's quick check finds wrong with the index; "" if nothing."""
    file = folder / "index" / "cache.db"
    try:
        journal = file.with_name(f"{file.name}-wal")
        # A journal with content belongs to the database, and only a writer may merge it: do not judge.
        if not file.exists() or (journal.exists() and journal.stat().st_size):
            return ""
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except (OSError, sqlite3.Error) as error:
        return f"{file}: {error}"
    return "" if said == "ok" else f"{file}: {' '.join(said.split())}"


def _elsewhere(settings: Settings) -> tuple[str, ...]:
    return tuple(cache.store for cache in running_caches(settings.runtime_dir) if cache.store != str(settings.dir))


def _advertised_problem(settings: Settings) -> str:
    """Return why the blob server cannot be reached under its advertised name, as far as this machine can tell."""
    if settings.advertise is None or not settings.listen:
        return ""
    host, port = settings.advertise.host, settings.advertise.port or settings.listen[0][1]
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    # Skip addresses that are not ours: they may belong to a router that leads back here.
    for address in sorted(found & own_addresses()):
        if why := _reach(Endpoint("http", address, port)):
            return f"{host} is {address} too, and there at port {port}: {why}"
    return ""


def _count(folder: Path) -> int:
    try:
        return len(list(folder.iterdir()))
    except OSError:
        return 0


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
