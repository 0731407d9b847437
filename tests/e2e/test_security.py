"""Every cell of tests/security.py, and that no secret is left behind.

`scripts/test tests/e2e/test_security.py` runs it alone; what has become of the cells is printed after the run.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Final

import pytest

from pullthrough.core.capability import Capability
from pullthrough.core.digest import Digest
from pullthrough.core.routes import canonical_path
from tests.e2e.conftest import MB, MODEL, PROXYING, Model, add_model, get, to_cdn, to_registry, unique
from tests.security import CALLERS, CAPABLE, MODELS, REQUESTS, Cell, gives, table
from tests.support.a2 import A2Client
from tests.support.goclient import PullError
from tests.support.http1 import Connection
from tests.support.origin import GOOD_TOKEN, LIST_TYPE, MANIFEST_TYPE, R2_HOST, Fault, Mode, Origin
from tests.support.proxy import Proxy

EXPIRING: Final = "expiring-token"
MISLED: Final = "5ec2e75ec2e75ec2e75ec2e7"
"""In a query that nobody may remember."""
TOKENS: Final = {"anonymous": None, "right": GOOD_TOKEN, "wrong": "wrong-token", "expired": EXPIRING}
EXPECTED: Final = table()
ASKED_HERE: Final = tuple(request for request in REQUESTS if request not in CAPABLE)

LIST_ACCEPT: Final = f"{LIST_TYPE}, {MANIFEST_TYPE}"

_numbers = itertools.count(1)
Note = Callable[[str, object], None]


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@dataclass(frozen=True)
class Subject:
    """A model of a kind, and a stranger's public repositories, which list its layer and its child."""

    kind: str
    model: Model
    layer: bytes
    stranger: str
    lists: bytes
    """The list that clients get who take lists; its child has a layer that no other manifest has."""
    child: bytes
    child_layer: bytes

    @property
    def stranger_list(self) -> str:
        """Has that list, too."""
        return f"{self.stranger}-list"

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """What nobody may see to whom it is refused."""
        return self.layer, self.model.manifest, self.lists, self.child, self.child_layer

    @property
    def manifest_digest(self) -> str:
        return sha256(self.model.manifest)


class Caller:
    """Asks through the cache, and says what was wrong with the answer."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._secret = (proxy.store / "secret").read_bytes()
        self._connections: dict[Callable[[Proxy], Connection], Connection] = {}
        self.given: list[str] = []
        """The addresses that it was given."""

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()

    def _to(self, connect: Callable[[Proxy], Connection]) -> Connection:
        connection = self._connections.get(connect)
        if connection is None or not connection.is_reusable:
            if connection is not None:
                connection.close()
            connection = self._connections[connect] = connect(self._proxy)
        return connection

    def capability(self, digest: str, *, lifetime_s: int = 3600) -> str:
        """A canonical address with a capability of the store."""
        granted = Capability(Digest.parse(digest), 10, int(time.time()) + lifetime_s)
        self.given.append(granted.to_query(self._secret))
        return self.given[-1]

    def ask(self, subject: Subject, request: str, caller: str) -> tuple[int, str]:
        """(status, what was wrong: "" where the answer is right for its status)."""
        model, manifest = subject.model, subject.manifest_digest
        path = canonical_path(Digest.parse(model.layer))
        here, there, elsewhere = (f"/v2/{name}" for name in (model.repository, subject.stranger, subject.stranger_list))
        child, child_layer = sha256(subject.child), sha256(subject.child_layer)
        method, where, target, expected = {
            "GET manifest": ("GET", to_registry, f"{here}/manifests/latest", model.manifest),
            "HEAD manifest": ("HEAD", to_registry, f"{here}/manifests/latest", b""),
            "GET manifest by digest": ("GET", to_registry, f"{here}/manifests/{manifest}", model.manifest),
            "GET list": ("GET", to_registry, f"{here}/manifests/latest", subject.lists),
            "HEAD list": ("HEAD", to_registry, f"{here}/manifests/latest", b""),
            "HEAD child": ("HEAD", to_registry, f"{here}/blobs/{child}", b""),
            "HEAD child's layer": ("HEAD", to_registry, f"{here}/blobs/{child_layer}", b""),
            "GET child": ("GET", to_registry, f"{here}/blobs/{child}", subject.child),
            "GET child's layer": ("GET", to_registry, f"{here}/blobs/{child_layer}", subject.child_layer),
            "GET child of a stranger who lists it": ("GET", to_registry, f"{elsewhere}/blobs/{child}", subject.child),
            "GET child's layer of a stranger who lists the child": (
                "GET",
                to_registry,
                f"{elsewhere}/blobs/{child_layer}",
                subject.child_layer,
            ),
            "GET manifest as a blob": ("GET", to_registry, f"{here}/blobs/{manifest}", model.manifest),
            "HEAD blob": ("HEAD", to_registry, f"{here}/blobs/{model.layer}", b""),
            "HEAD blob as a push": ("HEAD", to_registry, f"{here}/blobs/{model.layer}", b""),
            "GET blob": ("GET", to_registry, f"{here}/blobs/{model.layer}", subject.layer),
            "GET blob by a new client": ("GET", to_registry, f"{here}/blobs/{model.layer}", subject.layer),
            "GET chunksums": ("GET", to_registry, f"{here}/chunksums/{model.layer}", subject.layer),
            "GET blob of a stranger who lists it": ("GET", to_registry, f"{there}/blobs/{model.layer}", subject.layer),
            "canonical, valid capability": (
                "GET",
                to_cdn,
                f"{path}?{self.capability(model.layer)}",
                subject.layer,
            ),
            "canonical, another blob's capability": ("GET", to_cdn, f"{path}?{self.capability(manifest)}", b""),
            "canonical, expired capability": (
                "GET",
                to_cdn,
                f"{path}?{self.capability(model.layer, lifetime_s=-1)}",
                b"",
            ),
            "canonical, no capability": ("GET", to_cdn, path, b""),
        }[request]
        fields = {"Authorization": f"Bearer {token}"} if (token := TOKENS[caller]) else {}
        agents = {"HEAD blob as a push": "ollama-transfer/1.0", "GET blob by a new client": "ollama/0.41.0"}
        fields["User-Agent"] = agents.get(request, PROXYING)
        if request.endswith(" list"):
            fields["Accept"] = LIST_ACCEPT
        response = self._to(where).request(method, target, fields)
        body = response.read()
        address = response.header("Location") or response.header("Content-Location")
        if not gives(response.status):
            leaks = address is not None or any(secret in body for secret in subject.secrets)
            is_text = body and "/manifests/" not in target and "no capability" not in request
            return response.status, "leaks" if leaks else "text where bytes are expected" if is_text else ""
        if address is not None:
            self.given.append(address)
            body = get(self._to(to_cdn), address.removeprefix(f"https://{R2_HOST}"))[2]
        return response.status, "" if body == expected else f"other bytes: {body[:80]!r}"


def publish(origin: Origin, kind: str) -> Subject:
    """Put a model of a kind on the origin; `turned` is public yet."""
    number = next(_numbers)
    layer = b"weights " + unique(2000).read(0, 2000)
    stranger = f"stranger/s{number}"
    if kind == "unknown":
        digests = ["sha256:" + hashlib.sha256(part + layer).hexdigest() for part in (b"", b"config", b"manifest")]
        manifest = json.dumps({"layers": [{"digest": digests[0], "size": len(layer)}]}).encode()
        model = Model(f"absent/m{number}", (digests[0],), digests[1], manifest)
        return Subject(kind, model, layer, stranger, b"list" + layer, b"child" + layer, b"other" + layer)
    model = add_model(origin, layer, repository=f"owner/m{number}", private=kind in ("private", "shared"))
    child_layer = b"other weights " + unique(2000).read(0, 2000)
    child = origin.manifest_of([(MODEL, origin.add_blob(child_layer))], model.config, runner="mlx")
    lists = origin.put_list(model.repository, "latest", [child], plain=model.manifest)
    subject = Subject(kind, model, layer, stranger, lists, child, child_layer)
    origin.put_manifest(subject.stranger_list, "latest", lists)
    origin.put_manifest(model.repository, subject.manifest_digest, model.manifest)
    origin.add_member(model.repository, origin.add_blob(model.manifest))
    origin.put_manifest(stranger, "latest", model.manifest)
    if kind == "shared":
        origin.add_member(stranger, *model.blobs)
        origin.add_member(subject.stranger_list, sha256(child), sha256(child_layer))
    return subject


def turn(origin: Origin, proxy: Proxy, subject: Subject) -> None:
    """Make its repository private, and let the cache learn of it by a request for something else."""
    if subject.kind == "turned":
        origin.set_private(subject.model.repository, private=True)
        with to_registry(proxy) as connection:
            assert get(connection, f"/v2/{subject.model.repository}/manifests/other")[0] == 401


def pull(origin: Origin, proxy: Proxy, subject: Subject) -> None:
    """Let all have it whom the registry gives it to, by every request; the expiring credential is good here."""
    with Caller(proxy) as caller:
        for who in ("anonymous", "right", "expired"):
            for request in ASKED_HERE:
                assert caller.ask(subject, request, who)[1] == ""
            get(caller._to(to_registry), f"/v2/{subject.stranger}/manifests/latest")
            get(caller._to(to_registry), f"/v2/{subject.stranger_list}/manifests/latest", accept=LIST_ACCEPT)
            if who == "anonymous":
                turn(origin, proxy, subject)
    proxy.wait_for_line(subject.model.recorded)
    for blob in (subject.child, subject.child_layer):
        proxy.wait_for_line(f"recorded {sha256(blob)[7:19]}")


def prepare(origin: Origin, proxy: Proxy) -> list[Subject]:
    """One model of each kind that can be pulled, pulled; the credential has expired by now."""
    origin.accepted.add(EXPIRING)
    subjects = [publish(origin, kind) for kind in MODELS if kind != "unknown"]
    for subject in subjects:
        pull(origin, proxy, subject)
    origin.accepted.discard(EXPIRING)
    return subjects


def walk(proxy: Proxy, cells: Sequence[tuple[Subject, Cell]], note: Note, *, threads: int = 3) -> None:
    """Ask every cell, of its subject, and compare."""
    problems: list[str] = []
    answered: list[tuple[tuple[object, ...], int]] = []

    def ask(own: Sequence[tuple[Subject, Cell]]) -> None:
        with Caller(proxy) as caller:
            for subject, cell in own:
                status, problem = caller.ask(subject, cell.request, cell.caller)
                answered.append((astuple(cell), status))
                if status != EXPECTED[cell] or problem:
                    problems.append(f"{cell}: expected {EXPECTED[cell]}, got {status} {problem}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, [cells[number::threads] for number in range(threads)]))
    note("security", answered)
    assert problems == []
    assert answered


def cells(
    subjects: Iterable[Subject], state: str, line: str, requests: Iterable[str] = REQUESTS
) -> list[tuple[Subject, Cell]]:
    """All cells of a state and a line, on these subjects."""
    return [
        (subject, Cell(subject.kind, request, state, line, caller))
        for subject in subjects
        for request in requests
        for caller in CALLERS
    ]


@pytest.mark.long
def test_cold(origin: Origin, proxy: Proxy, record_property: Note) -> None:
    """Nothing is here, each cell has a model of its own: what upstream grants."""
    own = [
        (publish(origin, kind), Cell(kind, request, "cold", "online", caller))
        for kind in MODELS
        for request in ASKED_HERE
        for caller in CALLERS
    ]
    for subject, _ in own:
        origin.set_private(subject.model.repository, private=subject.kind not in ("public", "unknown"))
    walk(proxy, own, record_property)


@pytest.mark.long
def test_cold_and_offline(origin: Origin, proxy: Proxy, record_property: Note) -> None:
    """Nothing is here and nobody can be asked."""
    subjects = [publish(origin, kind) for kind in MODELS]
    origin.stop()
    walk(proxy, cells(subjects, "cold", "offline", ASKED_HERE), record_property, threads=32)


def test_recent(origin: Origin, proxy: Proxy, record_property: Note) -> None:
    """All who may have it have pulled it within the minute; one credential has expired since."""
    walk(proxy, cells(prepare(origin, proxy), "recent", "online"), record_property)


@pytest.mark.long
def test_recent_and_offline(origin: Origin, proxy: Proxy, record_property: Note) -> None:
    """The same, and the registry goes away: its yes counts for the rest of the minute."""
    subjects = prepare(origin, proxy)
    origin.stop()
    walk(proxy, cells(subjects, "recent", "offline"), record_property, threads=32)


@pytest.mark.long
def test_held(origin: Origin, proxy: Proxy, record_property: Note) -> None:
    """They pulled it before the cache was restarted: what was learnt about credentials is gone."""
    subjects = prepare(origin, proxy)
    origin.stop()
    proxy.restart()
    walk(proxy, cells(subjects, "held", "offline"), record_property, threads=32)
    origin.start()
    walk(proxy, cells(subjects, "held", "online"), record_property)


FAULTS: Final = (
    Fault(Mode.REDIRECT, headers={"Location": f"http://[?X-Amz-Signature={MISLED}"}),
    Fault(Mode.STATUS, where="registry", status=500, times=4),
    Fault(Mode.DROP, where="registry", times=4),
    Fault(Mode.RESET, after=1000, times=2),
    Fault(Mode.CONTENT_RANGE, times=2),
    Fault(Mode.DIRECT),
)
SLOW_FAULTS: Final = (
    Fault(Mode.STATUS, status=403),
    Fault(Mode.REDIRECT, headers={"Location": f"https://10.0.0.1/?X-Amz-Signature={MISLED}"}),
    Fault(Mode.STATUS, status=302, times=None, headers={"Location": f"/?X-Amz-Signature={MISLED}"}),
)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.long)], ids=["quick", "slow"])
def test_no_secret_is_left(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client], quick: bool
) -> None:
    """Credentials, upstream's signatures and our capabilities are in no file of the cache's and in no line it says."""
    proxy = start_proxy(ollama_cache_log_level="debug", termlog_verbosity="debug")
    origin.accepted.add(EXPIRING)
    given: list[str] = []
    with Caller(proxy) as caller:
        for subject in [publish(origin, kind) for kind in ("public", "private")]:
            for who, request in itertools.product(CALLERS, ASKED_HERE):
                caller.ask(subject, request, who)
        given += caller.given
    for fault in FAULTS if quick else SLOW_FAULTS:
        model = add_model(origin, unique(MB), private=True)
        origin.faults.append(fault)
        with suppress(PullError):
            new_client(proxy).pull(model.name)
        origin.faults.clear()
    model = add_model(origin, unique(8 * MB), repository="owner/pushed", private=True)
    with to_registry(proxy) as connection:
        own = {"Authorization": f"Bearer {GOOD_TOKEN}"}
        address = get(connection, model.blob_target, **own)[1]["location"]
        get(connection, f"/token?service=x&scope=repository:owner/pushed:pull&signature={MISLED}", **own)
        pushed = [*own.items(), ("Content-Length", "4")]
        for method, target in (("POST", f"uploads/?mount={MISLED}"), ("PATCH", f"uploads/1?X-Amz-Signature={MISLED}")):
            connection.request(method, f"/v2/owner/pushed/blobs/{target}", pushed, body=b"push").read()
    with to_cdn(proxy) as connection:
        response = connection.request("GET", address.removeprefix(f"https://{R2_HOST}"), [])
        response.read(1000)
        given.append(address)
        connection.reset()
    proxy.wait_for_line("short: ")

    capabilities = {address.partition("access=")[2] for address in given if "access=" in address}
    assert len(capabilities) > 3  # those of one blob and one second are one
    assert len(origin.signatures) > 10
    secrets = {*capabilities, *origin.signatures, MISLED, GOOD_TOKEN, EXPIRING, str(TOKENS["wrong"]), "X-Amz-"}
    secrets |= {(proxy.store / "secret").read_bytes().hex()}

    def found() -> list[tuple[object, str]]:
        files = {path: path.read_bytes() for path in proxy.directory.rglob("*") if path.is_file()}
        assert {"cache.db", "cache.db-wal", "secret"} & {path.name for path in files}
        places = {**files, "output": "\n".join(proxy.output).encode()}
        return [(place, secret) for place, data in places.items() for secret in secrets if secret.encode() in data]

    assert found() == []
    proxy.stop()
    assert found() == []
