"""Each fault of tests/doctor_faults.py is planted alone; the doctor finds it and nothing else, and names its mend."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from pullthrough.admin.client import ask
from pullthrough.cli import app as cli
from pullthrough.config.options import parse_settings
from pullthrough.config.settings import Endpoint
from pullthrough.doctor.client_scripts import scripts
from pullthrough.doctor.probe_server import Outlook, look_out, server_facts
from pullthrough.doctor.rules import Finding, of_server
from pullthrough.net.proxy_env import ParentProxies
from pullthrough.pki.authority import CERTIFICATE_NAME, KEY_NAME, Authority, Leaf
from pullthrough.store.index import DATABASE, Index
from pullthrough.store.layout import MARKER, prepare
from pullthrough.upstream.client import Upstream
from tests import doctor_faults
from tests.doctor_faults import Fault, Planted
from tests.e2e.conftest import REGISTRY, add_model
from tests.support.clientmachine import Machine, answering
from tests.support.connectproxy import ConnectProxy
from tests.support.origin import R2_HOST, Mode, Origin
from tests.support.origin import Fault as Fault_
from tests.support.proxy import ADDON, PROGRAM, Proxy, free_port

NAMES: Final = (REGISTRY, R2_HOST)
SYSTEM_LIST: Final = "/etc/ssl/certs/ca-certificates.crt"
ANCHOR: Final = "/usr/local/share/ca-certificates/ollama-cache-1.crt"
PRIVATE_V4: Final = "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"
NOBODY: Final = 65534
REVOCATION: Final = (
    "schannel: next InitializeSecurityContext failed: CRYPT_E_NO_REVOCATION_CHECK (0x80092012) - The revocation "
    "function was unable to check revocation for the certificate."
)
"""What curl 8 says on Windows."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Origin, Proxy]]:
    """A cache that is well: open to the IPv4 addresses of a network, with a port that is no proxy."""
    folder, port = tmp_path_factory.mktemp("doctor"), free_port()
    plain = free_port()
    options = {"ollama_cache_clients": PRIVATE_V4, "ollama_cache_listen": f":{plain}"}
    program = (*PROGRAM, "--mode", f"regular@0.0.0.0:{port}", "--mode", f"regular@::1:{port}")
    with (
        Origin(folder / "origin") as origin,
        Proxy(folder, origin, program=program, **options) as proxy,
    ):
        proxy.front_port = plain
        add_model(origin, b"x", repository="library/all-minilm")
        yield origin, proxy


@dataclass
class Client:
    """What is planted at a client; as it stands it is well."""

    machine: Machine
    origin: Origin
    cache: Proxy
    stack: ExitStack
    daemon: dict[str, str] | None
    shell: dict[str, str] = field(default_factory=dict)
    user: int | None = None

    def speaks(self, version: str) -> None:
        """The daemon answers, as this version."""
        port = self.stack.enter_context(answering({}, json.dumps({"version": version}).encode()))
        self.set(OLLAMA_HOST=f"127.0.0.1:{port}")

    def set(self, **variables: str) -> None:
        """The daemon has these variables too, and not those that are empty."""
        self.daemon = {name: value for name, value in {**(self.daemon or {}), **variables}.items() if value}

    def goes_to(self, proxy: str) -> None:
        self.set(HTTPS_PROXY=proxy)

    def meets(self, leaf: Leaf) -> None:
        """The cache presents this leaf."""
        pem = self.machine.folder / "leaf.pem"
        pem.write_bytes(leaf.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        port = self.stack.enter_context(answering({"Cache-Status": "ollama-cache; hit"}, context=context))
        proxy = self.stack.enter_context(ConnectProxy({(REGISTRY, 443): ("127.0.0.1", port)}))
        self.goes_to(proxy.url)

    def authority(self, *names: str, ago: timedelta = timedelta(0)) -> Authority:
        """The daemon trusts this one."""
        made = Authority.load_or_create(self.machine.folder / "other", names or NAMES, now=datetime.now(UTC) - ago)
        self.trusts(made.certificate_file)
        return made

    def trusts(self, certificate: Path) -> None:
        """The list that the daemon is told to read has this certificate alone."""
        self.set(SSL_CERT_FILE=self.machine.write("/ca.pem", certificate.read_text()))

    def trusts_as_its_system(self) -> None:
        """The system's list has the cache's certificate, from where its tools found it."""
        self.set(SSL_CERT_FILE="")
        certificate = self.cache.ca_file.read_text()
        for path in (ANCHOR, SYSTEM_LIST):
            self.machine.write(path, certificate)

    def findings(self) -> list[Finding]:
        return self.machine.findings(self.daemon, user=self.user, **self.shell)


@pytest.fixture
def client(cache: tuple[Origin, Proxy], tmp_path: Path) -> Iterator[Client]:
    """A client that is well."""
    origin, proxy = cache
    with ExitStack() as stack:
        stack.callback(origin.restore)
        client = Client(Machine(tmp_path, script(proxy.front_port)), origin, proxy, stack, {})
        client.goes_to(proxy.url)
        client.trusts(proxy.ca_file)
        client.speaks("0.34.4")
        yield client


def script(port: int, **options: str) -> bytes:
    """The doctor as a cache with that plain port gives it."""
    folders = {"dir": Path("/store"), "certs": Path("/certs")}
    return scripts(parse_settings({"listen": f":{port}", **options}, **folders))["/doctor.sh"].body


def unused() -> str:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


Plant = Callable[[Client], None]
PLANTS: Final[dict[str, Plant]] = {}


def plants(name: str) -> Callable[[Plant], Plant]:
    """Register how a fault is made."""

    def register(plant: Plant) -> Plant:
        PLANTS[name] = plant
        return plant

    return register


def sets(name: str, **variables: str) -> None:
    """Register a fault that is in the daemon's environment alone."""
    PLANTS[name] = lambda client: client.set(**variables)


sets("HTTPS_PROXY=socks5://", HTTPS_PROXY="socks5://me:hunter2@127.0.0.1:1080")
sets("HTTPS_PROXY with an IPv6 address without brackets", HTTPS_PROXY="http://me:hunter2@fd00::1:8080")
sets("HTTPS_PROXY=https://", HTTPS_PROXY="https://me:hunter2@127.0.0.1:8080")
sets("HTTP_PROXY beside HTTPS_PROXY", http_proxy="http://me:hunter2@127.0.0.1:8080")
sets("the cache's name does not resolve", HTTPS_PROXY="http://cache.invalid:8080")
sets("NO_PROXY names the registry", NO_PROXY=f"localhost, {REGISTRY.upper()}:443")
sets("NO_PROXY names the blob host's domain", no_proxy="10.0.0.0/8,.r2.cloudflarestorage.com")
sets("NO_PROXY=*", NO_PROXY="*")
sets("SSL_CERT_FILE is not there", SSL_CERT_FILE="/absent.pem")


@plants("no daemon runs")
def _(client: Client) -> None:
    client.daemon = None


@plants("the daemon's process is not to be seen")
def _(client: Client) -> None:
    assert client.daemon is not None
    client.machine.configured = {"OLLAMA_HOST": client.daemon["OLLAMA_HOST"]}
    client.daemon = None


@plants("HTTPS_PROXY in the shell alone")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="")
    client.shell = {"HTTPS_PROXY": client.cache.url, "https_proxy": client.cache.url}


@plants("HTTP_PROXY in place of HTTPS_PROXY")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="", HTTP_PROXY=client.cache.url)


@plants("the service was not restarted")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="")
    client.machine.configured = {"PATH": "/bin", "HTTPS_PROXY": client.cache.url}


@plants("systemd has not loaded the drop-in")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="")
    drop_in = f'[Service]\nEnvironment="HTTPS_PROXY={client.cache.url}"\n'
    client.machine.write("/etc/systemd/system/ollama.service.d/ollama-cache.conf", drop_in)


@plants("HTTPS_PROXY names the plain port")
def _(client: Client) -> None:
    client.goes_to(f"http://127.0.0.1:{client.cache.front_port}")


@plants("HTTPS_PROXY names another proxy")
def _(client: Client) -> None:
    proxy = ConnectProxy(client.origin.resolve)
    client.goes_to(client.stack.enter_context(proxy).url)


@plants("HTTPS_PROXY names a proxy that wants a password")
def _(client: Client) -> None:
    client.goes_to(client.stack.enter_context(ConnectProxy({}, credentials="me:hunter2")).url)


@plants("nobody listens there (IPv4)")
def _(client: Client) -> None:
    client.goes_to(f"http://127.0.0.1:{unused()}")


@plants("nobody listens there (IPv6)")
def _(client: Client) -> None:
    client.goes_to(f"http://[::1]:{unused()}")


@plants("`clients` is too narrow")
def _(client: Client) -> None:
    client.goes_to(f"http://[::1]:{client.cache.port}")


@plants("Ollama 0.35.0")
def _(client: Client) -> None:
    client.speaks("0.35.0")


@plants("Ollama 0.40.2")
def _(client: Client) -> None:
    client.speaks("0.40.2-rc1")


@plants("no certificate is installed")
def _(client: Client) -> None:
    client.set(SSL_CERT_FILE="")


@plants("the certificate of another authority is installed")
def _(client: Client) -> None:
    client.trusts_as_its_system()
    other = Authority.load_or_create(client.machine.folder / "other", NAMES, now=datetime.now(UTC))
    for path in (ANCHOR, SYSTEM_LIST):
        client.machine.write(path, other.certificate_file.read_text())


@plants("the certificate was copied, and not taken over")
def _(client: Client) -> None:
    client.trusts_as_its_system()
    other = Authority.load_or_create(client.machine.folder / "other", NAMES, now=datetime.now(UTC))
    client.machine.write(SYSTEM_LIST, other.certificate_file.read_text())


@plants("the certificate came after the daemon's start")
def _(client: Client) -> None:
    client.trusts_as_its_system()
    client.machine.write(ANCHOR, client.cache.ca_file.read_text(), age_s=-10)


@plants("SSL_CERT_FILE is not for the daemon's user")
def _(client: Client) -> None:
    of_nobody(client)
    client.shell = {"SUDO_UID": str(NOBODY)}
    client.machine.write("/ca.pem", client.cache.ca_file.read_text(), mode=0o600)


def of_nobody(client: Client) -> None:
    """The daemon is a process of that user, whom the doctor believes by SUDO_UID alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    # Up to the folder of the test, which is pytest's, nobody else may look.
    for folder in (client.machine.folder, *client.machine.folder.parents[:3]):
        folder.chmod(0o755)
    for fifo in ("up", "forever"):
        (client.machine.folder / fifo).chmod(0o666)
    client.user = NOBODY


@plants("SSL_CERT_FILE holds no certificate")
def _(client: Client) -> None:
    client.machine.write("/ca.pem", "nothing\n")


@plants("the cache's leaf has expired")
def _(client: Client) -> None:
    ago = timedelta(days=200)
    client.meets(client.authority(ago=ago).issue(REGISTRY, now=datetime.now(UTC) - ago))


@plants("the cache's leaf is not valid yet")
def _(client: Client) -> None:
    client.meets(client.authority().issue(REGISTRY, now=datetime.now(UTC) + timedelta(days=3)))


@plants("the authority does not vouch for the name")
def _(client: Client) -> None:
    authority = client.authority("other.example")
    authority.permitted = NAMES
    client.meets(authority.issue(REGISTRY, now=datetime.now(UTC)))


@plants("the client's clock is wrong")
def _(client: Client) -> None:
    # Whose clock it is makes no difference to what can be seen.
    port = client.stack.enter_context(answering({}, ahead_s=3600.0))
    (client.machine.folder / "doctor.sh").write_bytes(script(port))


@plants("a DNS override has A alone")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="")
    client.machine.own_network = True
    client.machine.hosts = f"10.0.0.1 {REGISTRY}\n2606:4700::6810:1 {REGISTRY}\n"


@plants("a hosts entry and Ollama 0.35")
def _(client: Client) -> None:
    client.set(HTTPS_PROXY="")
    client.speaks("0.35.1")
    client.machine.hosts = f"127.0.0.1 {REGISTRY}\n"


@plants("the cache does not reach the registry")
def _(client: Client) -> None:
    assert client.findings() == []
    client.origin.stop()
    client.stack.callback(client.origin.start)


@plants("Schannel asks for a list of revoked certificates")
def _(client: Client) -> None:
    curl = (
        '#!/bin/sh\ncase "$*" in *--cacert*)\n    '
        f"echo 'curl: (35) {REVOCATION}' >&2\n    exit 35 ;;\nesac\n"
        'PATH=${PATH#*:}\nexec curl "$@"\n'
    )
    client.machine.install("curl", curl)


@dataclass
class Cache:
    """What is planted at a cache; as it stands it runs and is well.

    The ports are the test's own, and so is the daemon's part of the facts: what it would say is found out here.
    """

    folder: Path
    origin: Origin
    stack: ExitStack
    texts: dict[str, str]
    daemon: Proxy
    proxy: Endpoint = field(init=False)
    running: bool = True
    besides: str = ""
    """What is found too, and is not the matter."""
    parents: ParentProxies = field(default_factory=ParentProxies)
    trusted_ca: str | None = None
    ahead: timedelta = timedelta(0)
    told: dict[str, Any] = field(default_factory=dict)
    """What a daemon has counted."""

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def certs(self) -> Path:
        return self.folder / "certs"

    def authority(self, *, ago: timedelta = timedelta(0), folder: str = "certs") -> Authority:
        """One that was made then; it is the cache's where it is in its folder."""
        return Authority.load_or_create(self.folder / folder, NAMES, now=datetime.now(UTC) - ago)

    def listens(self, leaf: Leaf, certificate: bytes | None = None) -> None:
        """The proxy presents this leaf, and the plain port gives this certificate."""
        pem = self.folder / "leaf.pem"
        pem.write_bytes(leaf.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        tls = self.stack.enter_context(answering({}, context=context))
        proxy = self.stack.enter_context(ConnectProxy({(REGISTRY, 443): ("127.0.0.1", tls)}))
        self.proxy = Endpoint("http", "", proxy.port)
        port = self.stack.enter_context(answering({}, certificate or (self.certs / CERTIFICATE_NAME).read_bytes()))
        self.texts["listen"] = f":{port}"

    def leads(self, host: str, where: str) -> None:
        """`host` is upstream what `where` is."""
        others = {REGISTRY: f"https://localhost:{self.origin.registry_port}"}
        others[R2_HOST] = f"https://localhost:{self.origin.cdn_port}"
        self.texts["upstream"] = ",".join(f"{name}={url}" for name, url in {**others, host: where}.items())

    def findings(self) -> list[Finding]:
        """As the verb puts it together."""
        settings = parse_settings(self.texts, dir=self.store, certs=self.certs)

        async def look() -> Outlook:
            upstream = Upstream(settings, own_addresses=frozenset, parents=self.parents, trusted_ca=self.trusted_ca)
            await upstream.open()
            try:
                return await look_out(upstream, settings, datetime.now(UTC) + self.ahead)
            finally:
                await upstream.close()

        out = replace(asyncio.run(look()), **self.told)
        found = of_server(server_facts(settings, self.proxy, out, running=self.running, now=datetime.now(UTC)))
        return [finding for finding in found if finding.what != self.besides]


@pytest.fixture
def running(cache: tuple[Origin, Proxy], tmp_path: Path) -> Iterator[Cache]:
    """A cache that is well."""
    origin, daemon = cache
    with ExitStack() as stack:
        stack.callback(origin.restore)
        made = Cache(tmp_path, origin, stack, {"upstream": origin.upstream_option, "min_free": "0"}, daemon)
        made.trusted_ca = str(origin.ca_file)
        prepare(made.store)
        made.listens(made.authority().issue(REGISTRY, now=datetime.now(UTC)))
        yield made


def stopped(cache: Cache) -> None:
    """Nobody runs, and the ports are free."""
    cache.running = False
    cache.proxy = Endpoint("http", "", int(unused()))
    cache.texts["listen"] = f":{unused()}"


CachePlant = Callable[[Cache], None]
CACHE_PLANTS: Final[dict[str, CachePlant]] = {}


def at_cache(name: str) -> Callable[[CachePlant], CachePlant]:
    """Register how a fault of a cache is made."""

    def register(plant: CachePlant) -> CachePlant:
        CACHE_PLANTS[name] = plant
        return plant

    return register


at_cache("the cache does not run")(stopped)


@at_cache("another program has the proxy's port")
def _(cache: Cache) -> None:
    stopped(cache)
    cache.proxy = Endpoint("http", "", cache.stack.enter_context(answering({})))


@at_cache("another program has the plain port")
def _(cache: Cache) -> None:
    stopped(cache)
    cache.texts["listen"] = f":{cache.stack.enter_context(answering({}))}"


@at_cache("the cache that runs has another store")
def _(cache: Cache) -> None:
    stopped(cache)
    cache.texts["runtime_dir"] = str(cache.daemon.directory / "home" / "run")


@at_cache("a cache of which nothing but its port is known")
def _(cache: Cache) -> None:
    listening = cache.proxy
    stopped(cache)
    cache.proxy = listening
    shutil.rmtree(cache.certs)


@at_cache("the store is another user's")
def _(cache: Cache) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    stopped(cache)
    shutil.rmtree(cache.certs)
    cache.texts["offline"] = "true"
    cache.trusted_ca = None
    for folder in (cache.folder, *cache.folder.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(NOBODY)
    cache.stack.callback(os.seteuid, 0)


@at_cache("the folder is no store")
def _(cache: Cache) -> None:
    (cache.store / MARKER).unlink()


@at_cache("a newer version made the store")
def _(cache: Cache) -> None:
    (cache.store / MARKER).write_text('{"format": 99}')


@at_cache("the store is on a read-only disk")
def _(cache: Cache) -> None:
    there = cache.folder / "there"
    cache.store.rename(there)
    cache.store.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", there, cache.store], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    cache.stack.callback(subprocess.run, ["umount", cache.store], check=True)


@at_cache("the index is damaged")
def _(cache: Cache) -> None:
    stopped(cache)
    cache.besides = "the cache does not run"
    index, _, _ = Index.open(cache.store / "index")
    index.close()
    file = cache.store / "index" / DATABASE
    damaged = bytearray(file.read_bytes())
    damaged[4096:8192] = bytes(4096)
    file.write_bytes(damaged)


@at_cache("a blob had other bytes")
def _(cache: Cache) -> None:
    (cache.store / "quarantine" / "0123").touch()


@at_cache("`min_free` is more than the disk has")
def _(cache: Cache) -> None:
    cache.texts["min_free"] = "100PB"


@at_cache("the disk is full")
def _(cache: Cache) -> None:
    cache.texts["min_free"] = str(shutil.disk_usage(cache.store).total - 1)


@at_cache("the authority is gone")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)


@at_cache("others can read the authority's key")
def _(cache: Cache) -> None:
    (cache.certs / KEY_NAME).chmod(0o644)


@at_cache("the authority has expired")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)
    ago = timedelta(days=3700)
    cache.listens(cache.authority(ago=ago).issue(REGISTRY, now=datetime.now(UTC) - ago))


@at_cache("the authority does not permit a registry")
def _(cache: Cache) -> None:
    cache.texts["registries"] = f"{REGISTRY},hf.co"


@at_cache("the authority nears its end")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)
    cache.listens(cache.authority(ago=timedelta(days=3600)).issue(REGISTRY, now=datetime.now(UTC)))


@at_cache("the cache was started with another authority")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)
    cache.authority()


@at_cache("a leaf has expired")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)
    ago = timedelta(days=100)
    cache.listens(cache.authority(ago=ago).issue(REGISTRY, now=datetime.now(UTC) - ago))


@at_cache("a leaf is about to expire")
def _(cache: Cache) -> None:
    shutil.rmtree(cache.certs)
    ago = timedelta(days=85)
    cache.listens(cache.authority(ago=ago).issue(REGISTRY, now=datetime.now(UTC) - ago))


@at_cache("nobody listens at the proxy's port")
def _(cache: Cache) -> None:
    cache.proxy = Endpoint("http", "", int(unused()))


@at_cache("a bare mitmdump is at the proxy's port")
def _(cache: Cache) -> None:
    # A bare one would present a certificate of mitmproxy's authority; this is what the origin presents of its own.
    proxy = cache.stack.enter_context(ConnectProxy(cache.origin.resolve))
    cache.proxy = Endpoint("http", "", proxy.port)


@at_cache("no proxy is at the proxy's port")
def _(cache: Cache) -> None:
    cache.proxy = Endpoint("http", "", cache.stack.enter_context(answering({})))


@at_cache("something else is at the plain port")
def _(cache: Cache) -> None:
    cache.texts["listen"] = f":{cache.stack.enter_context(answering({}, b'it works'))}"


@at_cache("it listens on loopback alone")
def _(cache: Cache) -> None:
    cache.proxy = replace(cache.proxy, host="127.0.0.1")


@at_cache("`advertise` does not resolve")
def _(cache: Cache) -> None:
    cache.texts["advertise"] = "cache.invalid"


@at_cache("`advertise` is an IPv6 address, `listen` has none")
def _(cache: Cache) -> None:
    cache.texts["advertise"] = "[::1]"


@at_cache("`clients` is too narrow")
def _(cache: Cache) -> None:
    knock("::1", cache.daemon.port)
    cache.told = {"refused": ask(cache.daemon.store, "look-out", {})["refused"]}


@at_cache("few descriptors")
def _(cache: Cache) -> None:
    code = "from pullthrough.runtime.platform import allow_descriptors; print(allow_descriptors(65536))"
    limited = ["prlimit", "--nofile=1024", sys.executable, "-c", code]
    if shutil.which("prlimit") is None:
        pytest.skip("needs the program prlimit")
    said = subprocess.run(limited, env={"PYTHONPATH": str(ADDON.parent)}, capture_output=True, text=True, check=True)
    cache.told = {"descriptors": int(said.stdout)}


@at_cache("the registry is down")
def _(cache: Cache) -> None:
    cache.leads(REGISTRY, f"https://localhost:{unused()}")


@at_cache("the registry's name does not resolve")
def _(cache: Cache) -> None:
    cache.leads(REGISTRY, "https://registry.invalid")


@at_cache("the registry's certificate is another's")
def _(cache: Cache) -> None:
    cache.trusted_ca = None


@at_cache("the parent proxy wants a password")
def _(cache: Cache) -> None:
    parent = cache.stack.enter_context(ConnectProxy({}, credentials="me:hunter2"))
    cache.parents = ParentProxies.parse({"HTTPS_PROXY": parent.url.replace("://", "://me:wrong@")})
    cache.leads(REGISTRY, "https://registry.example")


@at_cache("the parent proxy is down")
def _(cache: Cache) -> None:
    cache.parents = ParentProxies.parse({"HTTPS_PROXY": f"http://me:hunter2@127.0.0.1:{unused()}"})
    cache.leads(REGISTRY, "https://registry.example")


@at_cache("a login page is in the registry's place")
def _(cache: Cache) -> None:
    page = {"Content-Type": "text/html"}
    fault = Fault_(Mode.STATUS, where="registry", status=200, headers=page, body=b"<html>Log in", times=None)
    cache.origin.faults.append(fault)


@at_cache("a filter forbids the registry")
def _(cache: Cache) -> None:
    page = {"Content-Type": "text/html"}
    fault = Fault_(Mode.STATUS, where="registry", status=403, headers=page, body=b"<html>Forbidden", times=None)
    cache.origin.faults.append(fault)


@at_cache("the blob host is down")
def _(cache: Cache) -> None:
    cache.leads(R2_HOST, f"https://localhost:{unused()}")


@at_cache("the blob host's name does not resolve")
def _(cache: Cache) -> None:
    cache.leads(R2_HOST, "https://blobs.invalid")


@at_cache("something on the way ignores Range")
def _(cache: Cache) -> None:
    cache.origin.faults.append(Fault_(Mode.IGNORE_RANGE, times=None))


@at_cache("the registry sends no addresses of blobs")
def _(cache: Cache) -> None:
    cache.origin.faults.append(Fault_(Mode.DIRECT, times=None))


@at_cache("the clock is ahead")
def _(cache: Cache) -> None:
    cache.ahead = timedelta(hours=1)


@at_cache("the clock is behind")
def _(cache: Cache) -> None:
    cache.ahead = -timedelta(hours=1)


@at_cache("Ollama 0.35 pulls by HTTPS_PROXY")
def _(cache: Cache) -> None:
    cache.told = {"bypassed": 7}


@at_cache("the fleet's object store is down")
def _(cache: Cache) -> None:
    cache.told = {"object_store": "s3://models/fleet: 403 Forbidden"}


def record(prop: Callable[[str, object], None], fault: Fault) -> None:
    """Have the row printed after the run."""
    prop("doctor", (str(fault.side), fault.name))


def assert_found(found: list[Finding], fault: Fault) -> None:
    """Exactly this is wrong, and nothing of a secret is shown."""
    print(*found, sep="\n")
    assert [finding.what.startswith(fault.what) for finding in found] == [True], found
    assert fault.mend in found[0].mend, found
    assert found[0].why and found[0].grave is fault.grave
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("fault", doctor_faults.CLIENT, ids=lambda fault: fault.name)
def test_client(client: Client, fault: Fault, record_property: Any) -> None:
    """A fault of a client."""
    record(record_property, fault)
    PLANTS[fault.name](client)
    assert_found(client.findings(), fault)


def test_client_that_is_well(client: Client) -> None:
    """Nothing is found by the daemon's own list and by the system's, and what is near a fault is none."""
    client.shell = {"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "*", "SSL_CERT_FILE": "/absent.pem"}
    client.set(NO_PROXY="localhost,10.0.0.0/8,notollama.ai,registry.ollama.ai:8443,hf.co")
    assert client.findings() == []
    client.trusts_as_its_system()
    client.speaks("0.40.3")
    client.machine.command.remove("--fields")
    done = client.machine.run(client.daemon)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is wrong\n", "")


def test_client_by_the_verb(client: Client) -> None:
    """`ollama-cache doctor --client` is the same script."""
    client.set(NO_PROXY="*")
    program = Path(sys.executable).with_name("ollama-cache")
    client.machine.command = [program, "doctor", "--client", "--json"]
    done = client.machine.run(client.daemon)
    assert done.returncode == 1, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["what"] == "NO_PROXY covers what is cached" and found["grave"]


def test_without_root(client: Client) -> None:
    """The environment of another user's daemon is not to be seen: the service's settings stand for it, and it is said.

    What they lack is found.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    for folder in (client.machine.folder, *client.machine.folder.parents[:3]):
        folder.chmod(0o755)
    client.machine.command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "sh", "doctor.sh", "--fields"]
    client.machine.configured = dict(client.daemon or {})
    done = client.machine.run(client.daemon)
    assert (done.returncode, done.stdout) == (0, "") and "sudo shows more" in done.stderr
    del client.machine.configured["HTTPS_PROXY"]
    assert "the daemon has no HTTPS_PROXY" in client.machine.run(client.daemon).stdout


def test_stranger(client: Client) -> None:
    """Root believes no process that anybody could have called `ollama serve`, whatever its environment says."""
    of_nobody(client)
    client.goes_to("http://evil.example:8080")
    (found,) = client.findings()
    assert found.what == "no Ollama daemon was found" and "which is not believed" in found.why
    assert "evil" not in str(found)


def test_other_program(client: Client) -> None:
    """Neither does it believe a program that was begun by a link of that name, as a set-user-ID one can be."""
    program = client.machine.folder / "bin/ollama"
    program.unlink()
    program.symlink_to(Path("/bin/sh").resolve())
    (found,) = client.findings()
    assert found.what == "no Ollama daemon was found" and "which is not believed" in found.why


@pytest.mark.parametrize("path", ["/ca.pem", SYSTEM_LIST, ANCHOR])
def test_fifo(client: Client, path: str) -> None:
    """A FIFO in the place of a file is not read: it would keep its reader waiting for ever."""
    if path != "/ca.pem":
        client.trusts_as_its_system()
    (client.machine.root / path[1:]).unlink()
    os.mkfifo(client.machine.root / path[1:])
    expected = {"/ca.pem": ["SSL_CERT_FILE cannot be read"], SYSTEM_LIST: ["the daemon does not trust the cache"]}
    assert [finding.what for finding in client.findings()] == expected.get(path, [])


def test_hints_are_quoted(client: Client) -> None:
    """What was read cannot become a command of whoever copies a hint, nor steer the terminal; no key is given away."""
    of_nobody(client)
    client.shell = {"SUDO_UID": str(NOBODY)}
    path = "/it's $(touch here);\x1b[2J.pem"
    client.set(SSL_CERT_FILE=client.machine.write(path, client.cache.ca_file.read_text(), mode=0o600))
    (found,) = client.findings()
    assert found.mend.startswith("sudo chmod a+r '/it'\\''s $(touch here);[2J.pem' && ")
    client.machine.write(path, "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n", mode=0o600)
    (found,) = client.findings()
    assert "private key" in found.why and "chmod" not in found.mend
    client.goes_to("https://a;b:1")
    (found,) = client.findings()
    assert found.mend.startswith("HTTPS_PROXY='http://a;b:1': ")


@pytest.mark.parametrize(("accepted", "expected"), [(True, []), (False, ["the daemon does not trust the cache"])])
def test_macos(client: Client, accepted: bool, expected: list[str]) -> None:
    """By stand-ins of Apple's programs: processes are found without /proc, and the keychains decide, not a file."""
    client.set(SSL_CERT_FILE="/absent.pem")
    assert client.daemon is not None
    shown = " ".join(f"{name}={value}" for name, value in client.daemon.items())
    verdict = "exit 0" if accepted else 'echo "Cert Verify Result: CSSMERR_TP_NOT_TRUSTED"; exit 1'
    stands_in = {
        "uname": "echo Darwin",
        "pgrep": "echo 4711",
        "ps": f'case "$*" in *command=*) echo "/Applications/Ollama.app/ollama serve {shown}" ;; *) echo 01:02 ;; esac',
        "launchctl": "exit 1",
        # What is to be verified is the chain that the cache presents.
        "security": f'openssl x509 -in "$3" -noout -subject | grep -q {REGISTRY} || exit 2\n{verdict}',
    }
    for name, body in stands_in.items():
        client.machine.install(name, f"#!/bin/sh\n{body}\n")
    (client.machine.folder / "bin" / "systemctl").unlink()
    client.machine.has_proc = False
    assert [finding.what for finding in client.findings()] == expected


def test_served(cache: tuple[Origin, Proxy]) -> None:
    """The plain port gives the script as it is run here."""
    _, proxy = cache
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.front_port}/doctor.sh") as response:
        assert response.read() == script(proxy.front_port)


@pytest.mark.parametrize("fault", doctor_faults.CACHE, ids=lambda fault: fault.name)
def test_cache(running: Cache, fault: Fault, record_property: Any) -> None:
    """A fault of a cache."""
    record(record_property, fault)
    CACHE_PLANTS[fault.name](running)
    assert_found(running.findings(), fault)


def test_cache_that_is_well(running: Cache, cache: tuple[Origin, Proxy]) -> None:
    """Nothing is found, neither of ports of the test's own nor by the verb of a daemon; that tells whom it refused."""
    _, daemon = cache
    assert running.findings() == []
    # Another test may have been refused before.
    assert [found for found in by_verb(daemon) if found["what"] != "clients are turned away"] == []
    knock("::1", daemon.port)
    (found,) = by_verb(daemon)
    assert found["what"] == "clients are turned away" and "from ::1" in found["why"] and not found["grave"]


def test_agrees_with_stats(cache: tuple[Origin, Proxy]) -> None:
    """What is down, and why, is what the other views have, who are told by the same."""
    origin, daemon = cache
    origin.stop()
    try:
        found = [finding["why"] for finding in by_verb(daemon) if finding["grave"]]
        told = {service["host"]: service for service in ask(daemon.store, "stats", {})["services"]}
    finally:
        origin.start()
    assert told[REGISTRY]["state"] == "down"
    assert [told[REGISTRY]["why"] in why for why in found] == [True], (found, told)
    assert by_verb(daemon) == [finding for finding in by_verb(daemon) if not finding["grave"]]
    assert {each["state"] for each in ask(daemon.store, "stats", {})["services"]} == {"up"}


def knock(host: str, port: int) -> None:
    """Be refused."""
    with socket.create_connection((host, port)) as sock, contextlib.suppress(ConnectionResetError):
        sock.sendall(b"CONNECT registry.ollama.ai:443 HTTP/1.1\r\n\r\n")
        assert not sock.recv(1)


def by_verb(proxy: Proxy) -> list[dict[str, Any]]:
    """What `ollama-cache doctor` finds at a cache that runs."""
    env = {"OLLAMA_CACHE_DIR": str(proxy.store), "OLLAMA_CACHE_CERTS": str(proxy.ca_file.parent)}
    told = CliRunner().invoke(cli.app, ["doctor", "--json"], env=env)
    found: list[dict[str, Any]] = json.loads(told.stdout)
    assert told.exit_code == int(any(finding["grave"] for finding in found)), told.output
    return found


def test_each_fault_is_planted() -> None:
    """At least forty rows, of which thirty-four are real; no row is left out, and none is made for nothing."""
    assert {fault.name for fault in doctor_faults.CLIENT} == PLANTS.keys()
    assert {fault.name for fault in doctor_faults.CACHE} == CACHE_PLANTS.keys()
    real = [fault for fault in doctor_faults.ALL if fault.planted is Planted.REAL]
    assert len(doctor_faults.ALL) >= 40 and len(real) >= 34
