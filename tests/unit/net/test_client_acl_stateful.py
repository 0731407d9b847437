"""Whom the registry core grants what, against a model that knows only what upstream has said to whom.

Everything is recorded here; so a blob is given by the cache's own word exactly where the model says that it is known,
which is looked at with upstream away, after every step.
"""

import asyncio
import json
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from multidict import CIMultiDict

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import R2_HOST
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.core.digest import Digest
from pullthrough.core.errors import UpstreamRefused, UpstreamUnreachable
from pullthrough.core.manifest_json import LIST_TYPE, accept_of
from pullthrough.core.routes import canonical_path
from pullthrough.net.client_acl import VOUCHED_S
from pullthrough.recording.recorder import Recorder
from pullthrough.registry import blobs, grants, manifests
from pullthrough.registry.factory import build_registry
from pullthrough.registry.messages import Request
from pullthrough.store.store import Store
from pullthrough.upstream.client import Response, Upstream
from pullthrough.upstream.data_stream import Source

HOST = "registry.ollama.ai"
REPOSITORIES = ("owner/one", "owner/two", "stranger/three")
LAYERS = tuple(Digest(letter * 64) for letter in "abc")
CHILD = b'{"layers": [{"digest": "%s", "size": 1}, {"digest": "%s", "size": 1}]}' % (
    LAYERS[0].encode(),
    LAYERS[1].encode(),
)
"""A manifest that lists refer to, whose bytes are here from the beginning."""
DIGESTS = (*LAYERS, Digest(sha256(CHILD).hexdigest()))
CALLERS = (None, "Bearer good", "Bearer other")
NOTHING = b'{"layers": []}'
REQUESTS = ("GET blobs", "HEAD blobs", "GET chunksums", "GET manifests", "HEAD manifests")

repositories = st.sampled_from(REPOSITORIES)
digests = st.sampled_from(DIGESTS)


class Upstreams:
    """What upstream has and says, and what follows from it."""

    loop = LoopGuard("ollama-cache-test")

    def __init__(self) -> None:
        self.away = False
        self.now = 1000.0
        self.refusal = dict.fromkeys(REPOSITORIES, 0)
        """The status for those who may not: 0 where all may."""
        self.accepted = {"Bearer good"}
        self.members: dict[str, set[Digest]] = {name: set() for name in REPOSITORIES}
        self.manifests: dict[tuple[str, bool], bytes] = {}
        """By repository, and whether the client takes lists."""

        self.proofs: set[tuple[str, Digest]] = set()
        """Anonymous requests for the bytes that upstream has granted, without those of repositories refused since."""
        self.kept: dict[tuple[str, bool], bytes] = {}
        """The manifests that an anonymous request got last."""
        self.vouched: dict[tuple[str, str, Digest], float] = {}

    def knows(self, caller: str | None, repository: str, digest: Digest) -> bool:
        """The cache may give the blob unasked."""
        proven = any(digest == other for _, other in self.proofs)
        kept = (self.kept.get((repository, takes_lists), NOTHING) for takes_lists in (False, True))
        listed = (repository, digest) in self.proofs or any(digest in _listed(body) for body in kept)
        vouched = caller is not None and self.vouched.get((caller, repository, digest), 0) > self.now
        return vouched or (proven and listed)

    def grants(self, caller: str | None, repository: str, digest: Digest) -> bool:
        """Upstream would give the blob."""
        return digest in self.members[repository] and (not self.refusal[repository] or caller in self.accepted)

    def _judge(self, repository: str, caller: str | None) -> int:
        """The status for this caller; what is learnt of a repository where not everybody may."""
        if self.away:
            raise UpstreamUnreachable("away")
        status = self.refusal[repository]
        if caller is None and status in (401, 403):
            self._close(repository)
        return 0 if caller in self.accepted else status

    def _close(self, repository: str) -> None:
        self.proofs = {(name, digest) for name, digest in self.proofs if name != repository}
        for takes_lists in (False, True):
            self.kept.pop((repository, takes_lists), None)

    def _give(self, caller: str | None, repository: str, digest: Digest) -> None:
        if caller is None:
            self.proofs.add((repository, digest))
        else:
            # It was refused to everybody a moment ago.
            self._close(repository)
            self.vouched[caller, repository, digest] = self.now + VOUCHED_S

    # --- as pullthrough.upstream.Upstream

    async def ask(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        _, _, owner, name, kind, reference = target.split("/")
        repository, caller = f"{owner}/{name}", headers.get("Authorization")
        status = self._judge(repository, caller)
        if status:
            return Response(status, CIMultiDict(), b"")
        if kind == "manifests":
            key = repository, LIST_TYPE in headers["Accept"]
            body = self.manifests.get(key)
            if body is None:
                return Response(404, CIMultiDict(), b"")
            if caller is None:
                self.kept[key] = body
            else:
                self._close(repository)
            return Response(200, CIMultiDict(), body)
        digest = Digest.parse(reference)
        if digest not in self.members[repository]:
            return Response(404, CIMultiDict(), b"")
        if kind == "chunksums":
            self._give(caller, repository, digest)
            body = f"{digest} 0-{_size(digest) - 1}\n".encode()
            return Response(200, CIMultiDict({"Content-Location": f"https://{R2_HOST}{canonical_path(digest)}"}), body)
        return Response(200, CIMultiDict({"Content-Length": str(_size(digest))}), b"")

    async def obtain(
        self,
        host: str,
        repository: str,
        digest: Digest,
        headers: Mapping[str, str],
        *,
        asked: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> tuple[Source, None]:
        caller = headers.get("Authorization")
        if status := self._judge(repository, caller):
            raise UpstreamRefused(status, [])
        if digest not in self.members[repository]:
            raise UpstreamRefused(404, [])
        self._give(caller, repository, digest)
        return Source(f"https://{R2_HOST}{canonical_path(digest)}"), None

    def source_at(self, host: str, target: str, location: str) -> Source:
        return Source(location)

    def down_until(self, host: str) -> float:
        return 0.0

    def mark_down(self, host: str, seconds: float) -> None:
        pass


class Recordings:
    """All blobs are being recorded."""

    size = 1

    async def ready(self) -> int:
        return self.size

    def find(self, digest: Digest) -> "Recordings":
        self.size = _size(digest)
        return self

    def open(self, digest: Digest, **_: Any) -> "Recordings":
        return self.find(digest)


def _size(digest: Digest) -> int:
    return len(CHILD) if digest == DIGESTS[-1] else 1


def _listed(body: bytes) -> set[Digest]:
    document = json.loads(body)
    if "manifests" in document:
        return {DIGESTS[-1]} | _listed(CHILD) if document["manifests"] else set()
    return {Digest.parse(layer["digest"]) for layer in document["layers"]}


class Access(RuleBasedStateMachine):
    """Any requests of anybody, while repositories turn private, hidden and public, and credentials come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.upstream = Upstreams()
        self._folder = tempfile.TemporaryDirectory()
        self._runner = asyncio.Runner()
        clock = SimpleNamespace(time=lambda: self.upstream.now, monotonic=lambda: self.upstream.now)
        self._patches = [patch.object(module, "time", clock) for module in (blobs, grants, manifests)]
        for each in self._patches:
            each.start()
        self._numbers = iter(range(10_000))
        self._open()
        ingest = self.store.ingest(DIGESTS[-1])
        ingest.begin(len(CHILD))
        ingest.write_at(0, CHILD)
        ingest.close()
        self.store.publish(DIGESTS[-1], self.store.place(DIGESTS[-1], ingest.partial_path), now=1.0)
        ingest.forget()

    def _open(self) -> None:
        self.store = Store.open(Path(self._folder.name) / "store")
        options = parse_settings({"prefetch": "false", "manifest_lifetime": "0"}, dir=Path("/d"), certs=Path("/c"))
        recordings = cast(Recorder, Recordings())
        self.core = build_registry(options, self.store, cast(Upstream, self.upstream), recordings).registry

    def teardown(self) -> None:
        self.store.close()
        self._runner.close()
        self._folder.cleanup()
        for each in self._patches:
            each.stop()

    async def _ask(
        self, request: str, caller: str | None, repository: str, reference: object, *, takes_lists: bool = False
    ) -> int:
        method, _, kind = request.partition(" ")
        headers = {"accept": accept_of(takes_lists=takes_lists)} | ({"authorization": caller} if caller else {})
        target = f"/v2/{repository}/{kind}/{reference}"
        answer = await self.core.answer(Request(method, "https", HOST, target, headers))
        assert answer is not None
        return answer.status

    @rule(repository=repositories, members=st.sets(digests), listed=st.lists(digests, max_size=3))
    def publish(self, repository: str, members: set[Digest], listed: list[Digest]) -> None:
        """A tag moves; what it lists the repository may have or not."""
        self.upstream.members[repository] |= members
        layers = [{"digest": str(digest), "size": _size(digest)} for digest in listed]
        body = json.dumps({"layers": layers, "number": next(self._numbers)}).encode()
        self.upstream.manifests[repository, False] = body

    @rule(repository=repositories, has_child=st.booleans())
    def publish_list(self, repository: str, has_child: bool) -> None:
        """A tag becomes a list, which may refer to a child; the repository may have that or not."""
        children = [{"digest": str(DIGESTS[-1])}] if has_child else []
        document = {"mediaType": LIST_TYPE, "manifests": children, "number": next(self._numbers)}
        self.upstream.manifests[repository, True] = json.dumps(document).encode()

    @rule(repository=repositories, status=st.sampled_from([0, 401, 403, 404]))
    def turn(self, repository: str, status: int) -> None:
        self.upstream.refusal[repository] = status

    @rule(caller=st.sampled_from(CALLERS[1:]))
    def change_credential(self, caller: str) -> None:
        self.upstream.accepted ^= {caller}

    @rule(seconds=st.sampled_from([1, VOUCHED_S - 1, VOUCHED_S]))
    def wait(self, seconds: float) -> None:
        self.upstream.now += seconds

    @precondition(lambda self: any(self.upstream.kept))
    @rule()
    def reopen(self) -> None:
        """Vouchers are forgotten; all else is not."""
        self.store.close()
        self._open()
        self.upstream.vouched.clear()

    @rule(
        request=st.sampled_from(REQUESTS),
        caller=st.sampled_from(CALLERS),
        repository=repositories,
        digest=digests,
        takes_lists=st.booleans(),
    )
    def ask(self, request: str, caller: str | None, repository: str, digest: Digest, takes_lists: bool) -> None:
        """What upstream would give is given; what it would not is given only if it is known."""
        if request.endswith("manifests"):
            self._runner.run(self._ask(request, caller, repository, "latest", takes_lists=takes_lists))
            return
        knows = self.upstream.knows(caller, repository, digest)
        grants = self.upstream.grants(caller, repository, digest)
        given = self._runner.run(self._ask(request, caller, repository, digest)) < 400
        assert given or not grants
        assert grants or knows or not given

    @invariant()
    def gives_unasked_what_is_known_and_nothing_else(self) -> None:
        self.upstream.away = True
        self._runner.run(self._survey())
        self.upstream.away = False

    async def _survey(self) -> None:
        for caller, repository in product(CALLERS, REPOSITORIES):
            for request, digest in product(REQUESTS[:3], DIGESTS):
                given = await self._ask(request, caller, repository, digest) < 400
                assert given == self.upstream.knows(caller, repository, digest), (request, caller, repository, digest)
            plain, lists = ((repository, takes_lists) in self.upstream.kept for takes_lists in (False, True))
            for takes_lists, expected in ((False, plain), (True, plain or lists)):
                given = await self._ask("GET manifests", caller, repository, "latest", takes_lists=takes_lists) < 400
                assert given == expected, (caller, repository, takes_lists)


TestAccess = Access.TestCase
# Without shrinking, which would take minutes: the steps of a failure are few anyway.
TestAccess.settings = settings(
    max_examples=settings().max_examples // 10,
    stateful_step_count=20,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
