"""Each fault of tests/doctor_faults.py is planted alone; the doctor finds it and nothing else, and names its mend."""

import json
import os
import socket
import ssl
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.doctor.client_scripts import scripts
from pullthrough.doctor.rules import Finding
from pullthrough.pki.authority import Authority, Leaf
from tests import doctor_faults
from tests.doctor_faults import Fault, Side
from tests.e2e.conftest import REGISTRY, add_model
from tests.support.clientmachine import Machine, answering
from tests.support.connectproxy import ConnectProxy
from tests.support.origin import R2_HOST, Origin
from tests.support.proxy import PROGRAM, Proxy, free_port

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
    program = (*PROGRAM, "--mode", f"regular@0.0.0.0:{port}", "--mode", f"regular@::1:{port}")
    with (
        Origin(folder / "origin") as origin,
        Proxy(folder, origin, program=program, front=True, ollama_cache_clients=PRIVATE_V4) as proxy,
    ):
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
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    client.machine.write("/ca.pem", client.cache.ca_file.read_text(), mode=0o600)
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


def record(prop: Callable[[str, object], None], fault: Fault) -> None:
    """Have the row printed after the run."""
    prop("doctor", (str(fault.side), fault.name))


def assert_found(found: list[Finding], fault: Fault) -> None:
    """Exactly this is wrong, and nothing of a secret is shown."""
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


def test_served(cache: tuple[Origin, Proxy]) -> None:
    """The plain port gives the script as it is run here."""
    _, proxy = cache
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.front_port}/doctor.sh") as response:
        assert response.read() == script(proxy.front_port)


def test_each_fault_is_planted() -> None:
    """At least forty rows, of which thirty-four are real; no row is left out, and none is made for nothing."""
    assert {fault.name for fault in doctor_faults.CLIENT} == PLANTS.keys()
    assert all(fault.side is Side.CLIENT for fault in doctor_faults.CLIENT)
