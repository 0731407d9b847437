"""Who may have what changes while everybody pulls, for a minute (or POLICY_SOAK_S seconds): nothing leaks.

Invariant of every answer: its bytes are right, and upstream would have given them to this very caller at some time
up to now. What lies in a vault was never anybody's but its owner's, and says so in every line.
"""

import hashlib
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from pullthrough.core.digest import Digest
from pullthrough.core.routes import canonical_path
from tests.e2e.conftest import MODEL, get, to_cdn, to_registry
from tests.support.http1 import ClosedBeforeResponse, Connection, ConnectRefused
from tests.support.origin import GOOD_TOKEN, R2_HOST, Fault, Mode, Origin
from tests.support.proxy import Proxy

SECONDS: Final = float(os.environ.get("POLICY_SOAK_S", "60"))
CLIENTS: Final = 16
VAULTS: Final = ("owner/vault-a", "owner/vault-b")
CHANGING: Final = tuple(f"owner/changing-{number}" for number in range(4))
STRANGER: Final = "stranger/lists-everything"
PATTERN: Final = b"vault "
TEMPORARY: Final = "temporary-token"
TOKENS: Final = {"anonymous": None, "wrong": "wrong-token", "temporary": TEMPORARY, "owner": GOOD_TOKEN}
GONE: Final = (OSError, ClosedBeforeResponse, ConnectRefused)

pytestmark = [pytest.mark.long, pytest.mark.timeout(SECONDS + 180)]


@dataclass
class Knowledge:
    """What there is, and what each caller has ever been allowed to know; digests of blobs and manifests."""

    content: dict[str, bytes] = field(default_factory=dict)
    owned: dict[str, set[str]] = field(default_factory=dict)
    allowed: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in TOKENS})
    private: set[str] = field(default_factory=set)
    temporary: bool = False
    """Whether the temporary token is good now."""

    def settle(self) -> None:
        """Note what upstream is about to give; called before each change that gives more."""
        for repository, digests in self.owned.items():
            is_private = repository in self.private
            self.allowed["owner"] |= digests
            if self.temporary or not is_private:
                self.allowed["temporary"] |= digests
            if not is_private:
                self.allowed["anonymous"] |= digests
                self.allowed["wrong"] |= digests


class World:
    """The origin as it changes, by a single thread."""

    def __init__(self, origin: Origin, chance: random.Random) -> None:
        self.known = Knowledge()
        self._origin = origin
        self._chance = chance
        self._count = 0
        self.known.private |= {*VAULTS, CHANGING[0]}
        for repository in (*VAULTS, *CHANGING):
            origin.set_private(repository, private=repository in self.known.private)
            self.publish(repository)

    def publish(self, repository: str) -> None:
        """Move the tag to new layers, one of them perhaps another repository's; the stranger lists all of them."""
        self._count += 1
        kind = PATTERN if repository in VAULTS else b"model "
        line = kind + f"{self._count:09d}\n".encode()
        own = self._origin.add_blob(data := line * self._chance.randrange(50, 20_000))
        layers = [own]
        open_ones = [
            digest for other in CHANGING for digest in self.known.owned.get(other, ()) if self._is_blob(digest)
        ]
        if open_ones and self._chance.random() < 0.3:
            layers.append(self._chance.choice(open_ones))
        self.known.content[own] = data
        described = [
            {"mediaType": MODEL, "digest": digest, "size": len(self.known.content[digest])} for digest in layers
        ]
        manifest = json.dumps({"schemaVersion": 2, "layers": described, "number": self._count}).encode()
        name = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.known.content[name] = manifest
        self.known.owned.setdefault(repository, set()).update({*layers, name})
        self.known.settle()
        self._origin.add_blob(manifest)
        self._origin.add_member(repository, *layers, name)
        self._origin.put_manifest(repository, "latest", manifest)
        self._origin.put_manifest(repository, name, manifest)
        listing = json.dumps({"schemaVersion": 2, "layers": described, "stranger": self._count}).encode()
        listed = f"sha256:{hashlib.sha256(listing).hexdigest()}"
        self.known.content[listed] = listing
        self.known.owned.setdefault(STRANGER, set()).add(listed)
        self.known.settle()
        self._origin.put_manifest(STRANGER, f"t{self._count % 7}", listing)

    def _is_blob(self, digest: str) -> bool:
        return not self.known.content[digest].startswith(b"{")

    def change(self) -> str:
        """Something happens; what it was."""
        known, chance = self.known, self._chance
        repository = chance.choice(CHANGING)
        what = chance.choice(["turn"] * 5 + ["publish"] * 4 + ["withdraw", "token", "token", "away", "expire", "fault"])
        match what:
            case "turn":
                if repository in known.private:
                    known.private.discard(repository)
                    known.settle()
                    self._origin.set_private(repository, private=False)
                else:
                    self._origin.set_private(repository, private=True)
                    known.private.add(repository)
            case "publish":
                self.publish(chance.choice((*VAULTS, *CHANGING)))
            case "withdraw":
                self._origin.remove_model(repository, "latest")
                time.sleep(0.2)
                self.publish(repository)
            case "token" if known.temporary:
                self._origin.accepted.discard(TEMPORARY)
                known.temporary = False
            case "token":
                known.temporary = True
                known.settle()
                self._origin.accepted.add(TEMPORARY)
            case "away":
                self._origin.stop()
                time.sleep(chance.uniform(0.2, 1.0))
                self._origin.start()
            case "expire":
                self._origin.expire_signatures()
            case "fault":
                mode = chance.choice([Mode.RESET, Mode.STATUS, Mode.DROP])
                self._origin.faults.append(Fault(mode, after=500, where=chance.choice(["cdn", "registry"]), times=2))
        return what


def ask(connection: Connection, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """As `get`. ConnectionError where a refusal is cut short: upstream's, passed through, when it went away."""
    response = connection.request("GET", target, list(headers.items()))
    body = response.read()
    if response.status >= 400 and response.closed_short:
        raise ConnectionError("the refusal ended before its time")
    return response.status, {name.lower(): value for name, value in response.headers}, body


class Client:
    """One of many, who asks for anything in anybody's name."""

    def __init__(self, number: int, proxy: Proxy, known: Knowledge, counts: Counter[str], problems: list[str]) -> None:
        self._chance = random.Random(number)
        self._proxy = proxy
        self._known = known
        self._counts = counts
        self._problems = problems

    def act(self) -> None:
        """A few requests on connections of one caller."""
        chance, known = self._chance, self._known
        caller = chance.choice([*TOKENS, "anonymous", "owner"])
        token = TOKENS[caller]
        fields = {"Authorization": f"Bearer {token}"} if token else {}
        with to_registry(self._proxy) as registry, to_cdn(self._proxy) as cdn:
            for _ in range(12):
                repository = chance.choice((*VAULTS, *CHANGING, STRANGER))
                digest = chance.choice(list(known.content))
                if chance.random() < 0.7:
                    digest = chance.choice(list(known.owned[repository]))
                reference = chance.choice(["latest", f"t{chance.randrange(7)}", digest])
                target = chance.choice(
                    [f"manifests/{reference}", f"blobs/{digest}", f"blobs/{digest}", f"chunksums/{digest}"]
                )
                status, headers, body = ask(registry, f"/v2/{repository}/{target}", **fields)
                self._counts[f"{caller} {'given' if status < 400 else 'refused'}"] += 1
                address = headers.get("location") or headers.get("content-location")
                if address is not None:
                    self._check(caller, target, digest, None)
                    self._follow(cdn, caller, target, digest, address.removeprefix(f"https://{R2_HOST}"))
                elif status == 200:
                    self._check(caller, target, f"sha256:{hashlib.sha256(body).hexdigest()}", body)
                else:
                    self._look(caller, target, body)
                self._trespass(cdn, caller)

    def _follow(self, cdn: Connection, caller: str, target: str, digest: str, address: str) -> None:
        size = len(self._known.content[digest])
        start = self._chance.randrange(size)
        status, _, body = ask(cdn, address, Range=f"bytes={start}-")
        if status == 206 and body != self._known.content[digest][start : start + len(body)]:
            self._problems.append(f"{caller} {target}: wrong bytes from {start}")
        self._counts[f"{caller} read"] += status == 206
        self._look(caller, target, body)
        if status == 206 and len(body) < size - start:
            # A recording that cannot go on, as that of a private blob whose owner is refused by now.
            self._counts["bodies cut short"] += 1
            raise ConnectionError("the body ended before its time")

    def _trespass(self, cdn: Connection, caller: str) -> None:
        """The blob host's address of something, with no capability or a made-up one."""
        digest = self._chance.choice(list(self._known.content))
        query = self._chance.choice(["", f"?size=1&expires=99999999999&access={'0' * 64}"])
        status, _, body = ask(cdn, canonical_path(Digest.parse(digest)) + query)
        if status < 400:
            self._problems.append(f"{caller} got {status} for a bare canonical address")
        self._look(caller, "canonical", body)

    def _check(self, caller: str, target: str, digest: str, body: bytes | None) -> None:
        """The caller has been given this, or the way to it."""
        if digest not in self._known.content:
            self._problems.append(f"{caller} {target}: bytes that nobody has made, {body!r:.80}")
        elif digest not in self._known.allowed[caller]:
            self._problems.append(f"{caller} {target}: {digest} leaks")
        self._look(caller, target, body or b"")

    def _look(self, caller: str, target: str, body: bytes) -> None:
        if PATTERN in body and caller not in ("owner", "temporary"):
            self._problems.append(f"{caller} {target}: a vault leaks")


def assert_closed(origin: Origin, proxy: Proxy, known: Knowledge) -> None:
    """Every repository turns private, and one request each is told so: then nothing is left for a stranger."""
    with to_registry(proxy) as connection:
        for repository in CHANGING:
            origin.set_private(repository, private=True)
            assert get(connection, f"/v2/{repository}/manifests/no-such-tag")[0] == 401
        for repository in (*VAULTS, *CHANGING):
            for digest in known.owned[repository]:
                for kind in ("blobs", "chunksums"):
                    assert get(connection, f"/v2/{repository}/{kind}/{digest}")[0] == 401
                    assert get(connection, f"/v2/{STRANGER}/{kind}/{digest}")[0] == 404
                assert get(connection, f"/v2/{repository}/manifests/{digest}")[0] == 401
            assert get(connection, f"/v2/{repository}/manifests/latest")[0] == 401


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    """One of the test's own: what it does to addresses is no matter of others'."""
    with Origin(tmp_path / "origin") as origin:
        yield origin


def test_policy_soak(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """No private byte to a stranger, no wrong byte to anyone, whatever turns into what meanwhile."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="1s")
    world = World(origin, random.Random(7))
    counts: Counter[str] = Counter()
    problems: list[str] = []
    end = time.monotonic() + SECONDS

    def live(number: int) -> None:
        client = Client(number, proxy, world.known, counts, problems)
        while time.monotonic() < end and not problems:
            try:
                client.act()
            except GONE:
                # mitmproxy closes the connection where upstream closes that of a passed-through request.
                counts["connections lost"] += 1
            except Exception as error:
                problems.append(f"client {number}: {error!r}")

    clients = [threading.Thread(target=live, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        counts[world.change()] += 1
        time.sleep(0.05)
    print(dict(sorted(counts.items())))
    assert problems == []
    assert not [line for line in proxy.output if "Traceback" in line or "answering" in line]
    assert all(counts[f"{caller} {what}"] for caller in TOKENS for what in ("given", "refused", "read"))
    origin.restore()
    assert_closed(origin, proxy, world.known)
