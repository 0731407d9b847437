"""The emulated clients of all generations pull, resume, refuse and give up as the real ones: without the product."""

import contextlib
import functools
import hashlib
import ipaddress
import json
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support import goclient
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.connectproxy import ConnectProxy
from tests.support.goclient import (
    Aborted,
    Crashed,
    DigestMismatch,
    MaxRetriesExceeded,
    OutOfPatience,
    PullClient,
    PullError,
    RedirectPolicy,
    follow,
    redirected_fields,
    same_family,
    same_host,
)
from tests.support.http1 import client_context, connect
from tests.support.legacy import A0Client, A1Client
from tests.support.modern import ModernClient
from tests.support.origin import (
    GOOD_TOKEN,
    LIST_TYPE,
    MANIFEST_TYPE,
    MODEL_TYPE,
    PUBLIC_ADDRESSES,
    R2_HOST,
    REGISTRY_HOST,
    Fault,
    Mode,
    Origin,
    Request,
    Synthetic,
)
from tests.support.readers import HeadReader, StrictReader
from tests.support.redirects import Redirects, is_public
from tests.support.transfer import TENSOR_TYPE, TransferClient

pytestmark = pytest.mark.emulators

CONFIG = b'{"model_format":"safetensors"}'
MODEL = "library/tiny:latest"
WEIGHTS = Synthetic(200_003, seed=1)
SMALL = Synthetic(30_000, seed=2)
NOTHING = hashlib.sha256().hexdigest()
PUBLIC = PUBLIC_ADDRESSES

Make = Callable[..., PullClient]


def scaled(kind: type[PullClient], **scale: Any) -> Make:
    """A client whose thresholds suit 200 kB."""

    def make(origin: Origin, directory: Path, *, proxy_url: str | None = None, **changes: Any) -> PullClient:
        client: Any = kind
        made = client(proxy_url, origin.ca_file, directory, **({"resolve": origin.resolve} | scale | changes))
        assert isinstance(made, PullClient)
        return made

    return make


PARTS = {"min_part": 10_000, "max_part": 100_000, "backoff_unit_s": 0.001}
a0 = scaled(A0Client, chunk=10_000)
a1 = scaled(A1Client, parts=4, **PARTS)
a2 = scaled(A2Client, parts=4, **PARTS)
client2 = scaled(Client2, threshold=50_000, chunk=12_500, backoff_unit_s=0.001)
modern = scaled(ModernClient, parts=4, dns=PUBLIC, **PARTS)
transfer = scaled(TransferClient, dns=PUBLIC, resume_threshold=50_000, backoff_unit_s=0.0001)

EVERYONE: dict[str, Make] = {
    "A0-0.0.11": functools.partial(a0, version="0.0.11", chunk=1),
    "A0-0.1.1": a0,
    "A1-0.1.10": functools.partial(a1, version="0.1.10"),
    "A1-0.1.30": functools.partial(a1, version="0.1.30"),
    "A1-0.3.0": functools.partial(a1, version="0.3.0"),
    "A2-0.34.2": functools.partial(a2, version="0.34.2"),
    "B-0.6.0": functools.partial(client2, version="0.6.0"),
    "B-chunksums": client2,
    "C-0.14.0": functools.partial(transfer, version="0.14.0"),
    "C-0.20.5": functools.partial(transfer, version="0.20.5"),
    "C-current": transfer,
    "C-0.40.2": functools.partial(transfer, version="0.40.2"),
    "C-0.40.3": functools.partial(transfer, version="0.40.3"),
    "M1-0.35.1": functools.partial(modern, version="0.35.1"),
    "M2-0.40.2": functools.partial(modern, version="0.40.2"),
    "M3-0.40.3": functools.partial(modern, version="0.40.3"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """The origin behind `origin`."""
    with Origin(tmp_path_factory.mktemp("origin")) as running:
        yield running


@pytest.fixture
def origin(shared: Origin) -> Iterator[Origin]:
    """A running origin that lists chunks of 12 500 bytes; nothing of the test before is still going on."""
    shared.chunk_size = 12_500
    yield shared
    shared.counters.wait_for(lambda counters: counters.cdn_connections_open == 0)
    shared.restore()


def publish(origin: Origin, *layers: Synthetic, media_type: str = MODEL_TYPE, **options: Any) -> str:
    """A model of these layers, by default of WEIGHTS; the digest of the first."""
    digests = [origin.add_blob(layer) for layer in layers or (WEIGHTS,)]
    pairs = [(media_type, digest) for digest in digests]
    origin.add_model("library/tiny", "latest", layers=pairs, config=origin.add_blob(CONFIG), **options)
    return digests[0]


def content(origin: Origin, digest: str) -> bytes:
    """What a blob has to be."""
    source = origin.blob(digest)
    return source.read(0, source.size)


def asked(origin: Origin, listener: str, method: str = "GET", digest: str = "") -> list[Request]:
    """The requests for blobs, or for one blob, that a server got."""
    hexadecimal = digest.removeprefix("sha256:")
    return [
        request
        for request in origin.counters.requests
        if (request.listener, request.method) == (listener, method)
        and "/blobs/" in request.path
        and hexadecimal in request.path
    ]


def ranges(requests: list[Request]) -> list[str | None]:
    """What they asked for."""
    return [request.headers.get("range") for request in requests]


# --- everyone


@pytest.mark.parametrize("make", EVERYONE.values(), ids=EVERYONE)
def test_pull(origin: Origin, tmp_path: Path, make: Make) -> None:
    """All blobs and the exact manifest arrive, no byte is asked for twice, and the CDN sees no credentials."""
    first = publish(origin, WEIGHTS, SMALL)
    digests = [first, origin.add_blob(SMALL), origin.add_blob(CONFIG)]
    client = make(origin, tmp_path / "client")
    report = client.pull(MODEL)
    for digest in digests:
        assert client.blob_path(digest).read_bytes() == content(origin, digest)
    assert client.manifest_path(MODEL).read_bytes() == report.manifest
    assert sorted(report.digests) == sorted(digests)
    total = WEIGHTS.size + SMALL.size + len(CONFIG)
    assert (report.bytes, report.retries, report.stalls) == (total, 0, 0)
    # A byte is counted when it was sent: the client may be done with it before.
    origin.counters.wait_for(lambda counters: counters.cdn_bytes >= total)
    assert origin.counters.cdn_bytes - total in (0, 1)
    assert len(report.requests) == len(origin.counters.requests)
    assert {request.headers.get("authorization") for request in asked(origin, "cdn")} == {None}

    origin.reset_counters()
    assert make(origin, tmp_path / "client").pull(MODEL).digests == ()
    assert origin.counters.registry_requests == {("GET", "manifest"): 1}


@pytest.mark.parametrize("make", EVERYONE.values(), ids=EVERYONE)
def test_resume_after_abort(origin: Origin, tmp_path: Path, make: Make, request: pytest.FixtureRequest) -> None:
    """What an aborted pull has saved is not asked for again, by those who save."""
    digest = publish(origin)
    with pytest.raises(Aborted, match=r"^context canceled$"):
        make(origin, tmp_path / "client", abort_after=100_000).pull(MODEL)
    assert not make(origin, tmp_path / "client").manifest_path(MODEL).exists()
    client = make(origin, tmp_path / "client")
    report = client.pull(MODEL)
    assert client.blob_path(digest).read_bytes() == WEIGHTS.read(0, WEIGHTS.size)
    # Those that fetch several blobs at once may have the config already.
    rest = report.bytes - (len(CONFIG) if len(report.digests) == 2 else 0)
    if request.node.callspec.id in ("B-0.6.0", "C-0.14.0"):
        assert rest == WEIGHTS.size
    else:
        assert WEIGHTS.size - 170_000 < rest < WEIGHTS.size - 80_000


@pytest.mark.parametrize("make", EVERYONE.values(), ids=EVERYONE)
def test_abort_before_the_first_byte(origin: Origin, tmp_path: Path, make: Make) -> None:
    """A client that waits for a body can be aborted, and the CDN notices that it left."""
    digest = publish(origin)
    hang = Fault(Mode.HANG, digest=digest, times=None)
    origin.faults.append(hang)
    client = make(origin, tmp_path / "client")
    errors: list[Exception] = []

    def pull() -> None:
        try:
            client.pull(MODEL)
        except PullError as error:
            errors.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    hang.gate.wait_held()
    client.abort()
    thread.join(10)
    hang.gate.wait_empty()
    assert [type(error) for error in errors] == [Aborted]


@pytest.mark.parametrize("name", [name for name in EVERYONE if not name.startswith(("A2", "B-chunksums", "M"))])
def test_nobody_waits_for_ever(origin: Origin, tmp_path: Path, name: str) -> None:
    """Where the real client has no limit for a first byte, a test has one."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.HANG, digest=digest, times=None))
    with pytest.raises(OutOfPatience, match=r"^nothing within the 0\.2 s"):
        EVERYONE[name](origin, tmp_path / "client", patience_s=0.2).pull(MODEL)


@pytest.mark.parametrize("name", [name for name in EVERYONE if name.startswith(("A1", "A2", "C", "M"))])
def test_private_model_needs_the_token_dance(origin: Origin, tmp_path: Path, name: str) -> None:
    """401, a token for the registry, and none for the CDN."""
    publish(origin, private=True)
    EVERYONE[name](origin, tmp_path / "client").pull(MODEL)
    seen = {request.headers.get("authorization") for request in asked(origin, "registry")}
    assert seen == {f"Bearer {GOOD_TOKEN}"}
    assert {request.headers.get("authorization") for request in asked(origin, "cdn")} == {None}


# --- redirects


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("https://registry.ollama.ai/x", {"Range", "Authorization", "Referer"}),
        ("https://registry.ollama.ai:8443/x", {"Range", "Authorization", "Referer"}),
        ("https://cdn.registry.ollama.ai/x", {"Range", "Authorization", "Referer"}),
        ("https://cdn.ollama.ai/x", {"Range", "Referer"}),
        ("https://evilregistry.ollama.ai/x", {"Range", "Referer"}),
        (f"https://{R2_HOST}/x", {"Range", "Referer"}),
        ("http://registry.ollama.ai/x", {"Range", "Authorization"}),
    ],
)
def test_fields_after_a_redirect(target: str, kept: set[str]) -> None:
    """Range always, Authorization to the host and below, Referer but from https to http."""
    first = "https://registry.ollama.ai/v2/"
    fields = [("Range", "bytes=0-1"), ("Authorization", "Bearer x"), ("Referer", "https://before/")]
    after = redirected_fields(fields, first, first, target)
    assert {name for name, _value in after} == kept
    assert dict(after).get("Referer") in (first, None)


def test_dropped_authorization_stays_away() -> None:
    """A detour over another host costs the token even when it leads home."""
    home, away = "https://registry.ollama.ai/", "https://elsewhere/"
    there = redirected_fields([("Authorization", "Bearer x")], home, home, away)
    assert redirected_fields(there, home, away, home) == [("Referer", away)]


@pytest.mark.parametrize(
    ("policy", "target", "expected"),
    [
        (follow, "https://elsewhere", True),
        (same_host, "https://registry.ollama.ai", True),
        (same_host, "https://registry.ollama.ai:8443", "blocked redirect to a different host"),
        (same_host, "https://cdn.ollama.com", "blocked redirect to a different host"),
        (same_family, "https://cdn.ollama.com", True),
        (same_family, "https://hf.co", True),
        (same_family, "https://notollama.com", "blocked redirect to a different host"),
        (same_family, f"https://{R2_HOST}", "blocked redirect to a different host"),
    ],
)
def test_redirect_policies(policy: RedirectPolicy, target: str, expected: bool | str) -> None:
    """Where registry calls may be led before v0.34.2, in it, and since."""
    assert policy(urlsplit("https://registry.ollama.ai"), urlsplit(target), 1) == expected


def test_go_follows_ten_redirects(origin: Origin, tmp_path: Path) -> None:
    """Ten requests, and not an eleventh."""
    digest = publish(origin)
    where = f"/v2/library/tiny/blobs/{digest}"
    origin.faults.append(Fault(Mode.REDIRECT, digest=digest, status=307, times=None, headers={"Location": where}))
    with pytest.raises(PullError, match="stopped after 10 redirects"):
        a0(origin, tmp_path / "client", version="0.0.11").pull(MODEL)
    assert len(asked(origin, "registry")) == 10


@pytest.mark.parametrize(
    ("version", "blocked"), [("current", True), ("0.34.2", True), ("0.32.1", False)], ids=lambda value: str(value)
)
def test_head_led_to_the_cdn(origin: Origin, tmp_path: Path, version: str, blocked: bool) -> None:
    """Since v0.34.2 a HEAD may not be redirected to R2."""
    publish(origin)
    origin.redirects_head = True
    client = a2(origin, tmp_path / "client", version=version)
    if not blocked:
        client.pull(MODEL)
        assert len(asked(origin, "cdn", "HEAD")) == 2
        return
    with pytest.raises(PullError, match=rf'^Head "https://{R2_HOST}/.*": blocked redirect to a different host$'):
        client.pull(MODEL)
    assert asked(origin, "cdn", "HEAD") == []


# --- A2


def test_part_counts_of_old_a2(origin: Origin, tmp_path: Path) -> None:
    """Until v0.3.6 a blob is divided by 64."""
    digest = publish(origin)
    scaled(A2Client, min_part=1)(origin, tmp_path / "client", version="0.3.6").pull(MODEL)
    assert len(asked(origin, "cdn", digest=digest)) == 65


# --- A0


def test_a0_follows_with_its_range(origin: Origin, tmp_path: Path) -> None:
    """One GET of the registry with an open range, and the same of the CDN with a Referer."""
    digest = publish(origin)
    a0(origin, tmp_path / "client").pull(MODEL)
    (first,), (second,) = (asked(origin, listener, digest=digest) for listener in ("registry", "cdn"))
    agent = ("User-Agent", "ollama/0.1.1 (amd64 linux) Go/go1.20")
    assert first.fields == (("Host", REGISTRY_HOST), agent, ("Range", "bytes=0-"))
    referer = ("Referer", f"https://{REGISTRY_HOST}{first.path}")
    assert second.fields == (("Host", R2_HOST), agent, ("Range", "bytes=0-"), referer)
    assert ("HEAD", "blob") not in origin.counters.registry_requests


@pytest.mark.parametrize(("version", "tries"), [("0.1.1", 4), ("0.0.11", 1)])
def test_a0_gives_up(origin: Origin, tmp_path: Path, version: str, tries: int) -> None:
    """An answer of 400 or more is refused before it is copied, and three times retried since v0.0.15."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, times=None, status=403, body=b"x" * 300_000))
    client = a0(origin, tmp_path / "client", version=version)
    with pytest.raises(PullError, match=r"^download failed: on download registry responded with code 403: "):
        client.pull(MODEL)
    assert len(asked(origin, "cdn", digest=digest)) == tries
    assert not list(client.blob_path(digest).parent.iterdir())


@pytest.mark.parametrize("mode", [Mode.TRUNCATE, Mode.RESET])
def test_a0_goes_on_from_a_whole_chunk(origin: Origin, tmp_path: Path, mode: Mode) -> None:
    """However a body ends early, the retry starts at the multiple below."""
    digest = publish(origin)
    origin.faults.append(Fault(mode, digest=digest, after=25_000))
    report = a0(origin, tmp_path / "client").pull(MODEL)
    assert ranges(asked(origin, "cdn", digest=digest)) == ["bytes=0-", "bytes=20000-"]
    assert report.retries == 1


def test_a0_appends_a_whole_blob(origin: Origin, tmp_path: Path) -> None:
    """A 200 in answer to the rest is appended, and fails at the digest."""
    digest = publish(origin)
    origin.faults += [Fault(Mode.TRUNCATE, digest=digest, after=25_000)]
    origin.faults += [Fault(Mode.IGNORE_RANGE, digest=digest, times=None)]
    client = a0(origin, tmp_path / "client")
    with pytest.raises(DigestMismatch):
        client.pull(MODEL)
    assert not client.blob_path(digest).exists()


def test_a0_takes_no_length_for_nothing(origin: Origin, tmp_path: Path) -> None:
    """A body without Content-Length is empty to it."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.NO_LENGTH, digest=digest))
    with pytest.raises(DigestMismatch, match=NOTHING):
        a0(origin, tmp_path / "client").pull(MODEL)


def test_a0_has_no_tokens(origin: Origin, tmp_path: Path) -> None:
    """A 401 is an error like any other."""
    publish(origin, private=True)
    with pytest.raises(PullError, match=r"^pull model manifest: on pull registry responded with code 401: "):
        a0(origin, tmp_path / "client").pull(MODEL)
    assert origin.counters.tokens == []


# --- A1

A1_VERSIONS = ["0.1.10", "0.1.30", "0.3.0"]


@pytest.mark.parametrize("version", A1_VERSIONS)
def test_a1_asks_the_registry_for_each_part(origin: Origin, tmp_path: Path, version: str) -> None:
    """Range and token go to the registry, the range and a Referer on to the CDN."""
    digest = publish(origin, private=True)
    a1(origin, tmp_path / "client", version=version, parts=8).pull(MODEL)
    at_registry, at_cdn = (asked(origin, listener, digest=digest) for listener in ("registry", "cdn"))
    assert sorted(filter(None, ranges(at_registry))) == sorted(filter(None, ranges(at_cdn)))
    assert len(at_cdn) == 9
    assert {request.headers["authorization"] for request in at_registry} == {f"Bearer {GOOD_TOKEN}"}
    referers = {request.headers["referer"] for request in at_cdn}
    assert referers == {f"https://{REGISTRY_HOST}/v2/library/tiny/blobs/{digest}"}
    assert {request.headers["user-agent"].split()[0] for request in at_cdn} == {f"ollama/{version}"}


@pytest.mark.parametrize(("version", "tries"), [("0.1.10", 3), ("0.1.30", 6), ("0.3.0", 6)])
def test_a1_refuses_errors_before_copying(origin: Origin, tmp_path: Path, version: str, tries: int) -> None:
    """An error page as long as the part is not taken for it."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, times=None, status=403, body=b"x" * 20_000))
    client = a1(origin, tmp_path / "client", version=version)
    with pytest.raises(MaxRetriesExceeded, match=r"^max retries exceeded: 403: xxx"):
        client.pull(MODEL)
    partial = client.blob_path(digest).with_name(f"{client.blob_path(digest).name}-partial")
    assert partial.read_bytes() == bytes(WEIGHTS.size)
    assert max(Counter(ranges(asked(origin, "cdn", digest=digest))).values()) == tries


@pytest.mark.parametrize("version", A1_VERSIONS)
def test_a1_does_not_notice_a_whole_blob(origin: Origin, tmp_path: Path, version: str) -> None:
    """A 200 to a range is found by the digest only."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.IGNORE_RANGE, digest=digest, times=None))
    with pytest.raises(DigestMismatch):
        a1(origin, tmp_path / "client", version=version).pull(MODEL)


@pytest.mark.parametrize("version", A1_VERSIONS)
def test_a1_and_a_short_answer(origin: Origin, tmp_path: Path, version: str) -> None:
    """A body that ends in good order is the end of the part until v0.1.38, and an EOF to retry later."""
    digest = publish(origin, SMALL)
    origin.faults.append(Fault(Mode.SHORT_LENGTH, digest=digest, after=7))
    client = a1(origin, tmp_path / "client", version=version, min_part=30_000)
    if version == "0.3.0":
        assert client.pull(MODEL).retries == 1
    else:
        with pytest.raises(DigestMismatch):
            client.pull(MODEL)


def test_a1_accepts_a_plain_registry(origin: Origin, tmp_path: Path) -> None:
    """206 from the registry itself will do."""
    publish(origin)
    origin.faults.append(Fault(Mode.DIRECT, times=None))
    a1(origin, tmp_path / "client").pull(MODEL)
    assert origin.counters.cdn_requests == 0


@pytest.mark.parametrize("version", A1_VERSIONS)
def test_a1_dies_of_a_missing_length(origin: Origin, tmp_path: Path, version: str) -> None:
    """A HEAD without Content-Length is a panic."""
    publish(origin)
    origin.faults.append(Fault(Mode.NO_LENGTH, where="registry", method="HEAD"))
    with pytest.raises(Crashed, match="index out of range"):
        a1(origin, tmp_path / "client", version=version).pull(MODEL)


def test_a1_follows_a_head_to_the_cdn(origin: Origin, tmp_path: Path) -> None:
    """In its days HEAD was redirected too, to an address signed for HEAD."""
    publish(origin)
    origin.redirects_head = True
    a1(origin, tmp_path / "client").pull(MODEL)
    assert len(asked(origin, "cdn", "HEAD")) == 2


def test_oldest_a1_connects_for_every_request(origin: Origin, tmp_path: Path) -> None:
    """Until v0.1.25 each request has a transport of its own."""
    publish(origin)
    a1(origin, tmp_path / "old", version="0.1.10").pull(MODEL)
    assert origin.counters.cdn_connections_total == origin.counters.cdn_requests
    origin.reset_counters()
    a1(origin, tmp_path / "new").pull(MODEL)
    assert origin.counters.cdn_connections_total < origin.counters.cdn_requests


def test_a1_stalls(origin: Origin, tmp_path: Path) -> None:
    """The watchdog counts from the first byte on; the part goes on where it stopped."""
    digest = publish(origin, SMALL)
    origin.faults.append(Fault(Mode.STALL, digest=digest, after=7))
    report = a1(origin, tmp_path / "client", stall_s=0.3, min_part=30_000).pull(MODEL)
    assert ranges(asked(origin, "cdn", digest=digest)) == ["bytes=0-29999", "bytes=7-29999"]
    assert (report.stalls, report.retries) == (1, 0)


# --- client2, form "chunksums"


def test_origin_lists_chunksums(origin: Origin, tmp_path: Path) -> None:
    """Lines of digest and inclusive range that cover the blob, and a fresh address."""
    digest = publish(origin, SMALL)
    client = client2(origin, tmp_path / "client", threshold=1)
    report = client.pull(MODEL)
    (answer,) = (each for each in report.requests if f"/chunksums/{digest}" in each.url)
    assert dict(answer.headers)["Content-Location"].startswith(f"https://{R2_HOST}/")
    assert dict(answer.headers)["Content-Type"].startswith("text/plain")
    expected = ["bytes=0-12499", "bytes=12500-24999", "bytes=25000-29999"]
    assert sorted(filter(None, ranges(asked(origin, "cdn", digest=digest)))) == expected
    assert origin.counters.registry_requests["GET", "chunksums"] == 2


def test_client2_signs_registry_calls_and_no_others(origin: Origin, tmp_path: Path) -> None:
    """No Accept, a signature on manifest and chunksums, and bare ranged GETs of the bytes."""
    publish(origin)
    client2(origin, tmp_path / "client").pull(MODEL)
    manifest, chunksums = (
        next(request for request in origin.counters.requests if kind in request.path)
        for kind in ("/manifests/", "/chunksums/")
    )
    for request in (manifest, chunksums):
        assert [name for name, _value in request.fields] == ["Host", "User-Agent", "Authorization", "Accept-Encoding"]
        assert request.headers["authorization"].startswith("Bearer ")
        assert request.headers["authorization"].count(":") == 2
    (small,) = asked(origin, "registry")
    bare = {("User-Agent", "Go-http-client/1.1")}
    assert set(small.fields) == {("Host", REGISTRY_HOST), ("Range", f"bytes=0-{len(CONFIG) - 1}")} | bare
    assert {name for request in asked(origin, "cdn") for name, _value in request.fields} == {
        *("Host", "User-Agent", "Range", "Referer")
    }


def test_client2_notices_a_whole_blob(origin: Origin, tmp_path: Path) -> None:
    """A 200 to a range fails the digest of its chunk, at once and for good."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.IGNORE_RANGE, digest=digest, times=None))
    with pytest.raises(PullError, match=r"^file content changed underfoot$"):
        client2(origin, tmp_path / "client").pull(MODEL)
    assert origin.counters.registry_requests["GET", "manifest"] == 1


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, 'Get "": unsupported protocol scheme ""'),
        ({"Content-Location": "/there"}, 'Get "/there": unsupported protocol scheme ""'),
    ],
    ids=["none", "relative"],
)
def test_client2_needs_an_absolute_content_location(
    origin: Origin, tmp_path: Path, headers: dict[str, str], message: str
) -> None:
    """Content-Location is asked for as it stands."""
    digest = publish(origin)
    lines = f"{digest} 0-{WEIGHTS.size - 1}\n".encode()
    answer = Fault(Mode.STATUS, where="registry", path="/chunksums/", status=200, headers=headers, body=lines)
    origin.faults.append(answer)
    with pytest.raises(PullError) as caught:
        client2(origin, tmp_path / "client").pull(MODEL)
    assert str(caught.value) == message


@pytest.mark.parametrize("status", [203, 206, 404, 503])
def test_client2_takes_chunksums_with_200_only(origin: Origin, tmp_path: Path, status: int) -> None:
    """Any other answer leaves the pull incomplete, which is not retried."""
    publish(origin)
    origin.faults.append(Fault(Mode.STATUS, where="registry", path="/chunksums/", status=status, times=None))
    with pytest.raises(PullError, match=rf"^incomplete: received {len(CONFIG)}/{WEIGHTS.size + len(CONFIG)} bytes$"):
        client2(origin, tmp_path / "client").pull(MODEL)
    assert origin.counters.registry_requests["GET", "chunksums"] == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"sha256:12 0-1\n", 'invalid digest: "sha256:12"'),
        (b"sha256:%b" % (b"0" * 64), "missing chunk range for digest"),
        (b"sha256:%b 2-1\n" % (b"0" * 64), "invalid chunk range for digest"),
        (b"", "None"),
    ],
    ids=["digest", "no-range", "range", "empty"],
)
def test_client2_reads_chunksums_strictly(origin: Origin, tmp_path: Path, body: bytes, problem: str) -> None:
    """What is not a list of chunks leaves the pull incomplete."""
    publish(origin)
    origin.faults.append(Fault(Mode.STATUS, where="registry", path="/chunksums/", status=200, body=body))
    with pytest.raises(PullError, match=r"^incomplete: ") as caught:
        client2(origin, tmp_path / "client").pull(MODEL)
    assert problem in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"mode": Mode.STATUS, "status": 503}, id="5xx"),
        pytest.param({"mode": Mode.RESET, "after": 7}, id="reset"),
        pytest.param({"mode": Mode.HANG}, id="first-byte"),
        pytest.param({"mode": Mode.STALL, "after": 7}, id="stall"),
    ],
)
def test_client2_starts_anew(origin: Origin, tmp_path: Path, fault: dict[str, Any]) -> None:
    """These of the last chunk make it pull again; the chunks that were complete are remembered."""
    digest = publish(origin, Synthetic(200_000))
    spoilt = Fault(digest=digest, **fault)

    def spoil(count: int) -> None:
        if count == 187_500:
            origin.faults.append(spoilt)

    client = client2(origin, tmp_path / "client", streams=1, read_timeout_s=0.4, on_progress=spoil)
    report = client.pull(MODEL)
    assert report.retries == spoilt.hits == 1
    assert origin.counters.registry_requests["GET", "manifest"] == 2
    chunks = [f"bytes={start}-{start + 12_499}" for start in range(0, 200_000, 12_500)]
    assert ranges(asked(origin, "cdn", digest=digest)) == [*chunks, chunks[-1]]
    assert client.blob_path(digest).read_bytes() == content(origin, digest)


def test_client2_takes_a_hole_for_a_blob(origin: Origin, tmp_path: Path) -> None:
    """When it pulls again for any other chunk, the file has its size already, and is left as it is."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.STATUS, digest=digest))
    client = client2(origin, tmp_path / "client", streams=1)
    assert client.pull(MODEL).retries == 1
    assert client.blob_path(digest).read_bytes() == bytes(12_500) + content(origin, digest)[12_500:]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param({"mode": Mode.STATUS, "status": 404, "body": b"gone"}, "status 404: gone$", id="4xx"),
        pytest.param({"mode": Mode.TRUNCATE, "after": 7}, "^unexpected EOF$", id="cut"),
        pytest.param({"mode": Mode.SHORT_LENGTH, "after": 7}, "^unexpected EOF$", id="short"),
        pytest.param({"mode": Mode.FLIP, "after": 100_000}, "^file content changed underfoot$", id="flipped"),
    ],
)
def test_client2_gives_up(origin: Origin, tmp_path: Path, fault: dict[str, Any], message: str) -> None:
    """These are fatal at once, but the other chunks are completed."""
    digest = publish(origin)
    origin.faults.append(Fault(digest=digest, **fault))
    client = client2(origin, tmp_path / "client")
    with pytest.raises(PullError, match=message):
        client.pull(MODEL)
    origin.reset_counters()
    assert client.pull(MODEL).bytes in (0, 12_500)


def test_client2_has_the_patience_of_a_test(origin: Origin, tmp_path: Path) -> None:
    """What the real one retries for ever ends."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, times=None))
    with pytest.raises(OutOfPatience):
        client2(origin, tmp_path / "client", patience_s=0.2).pull(MODEL)
    assert origin.counters.registry_requests["GET", "manifest"] > 1


@pytest.mark.parametrize("version", ["0.6.0", "chunksums"])
def test_client2_pulls_by_digest(origin: Origin, tmp_path: Path, version: str) -> None:
    """The manifest of `name@digest` is a blob."""
    publish(origin)
    client = client2(origin, tmp_path / "client", version=version)
    manifest = client.pull(MODEL).manifest
    digest = origin.add_blob(manifest)
    origin.add_member("library/tiny", digest)
    origin.reset_counters()
    other = client2(origin, tmp_path / "other", version=version)
    assert other.pull(f"tiny@{digest}").manifest == manifest == other.manifest_path("tiny").read_bytes()
    assert ("GET", "manifest") not in origin.counters.registry_requests


@pytest.mark.parametrize("version", ["0.6.0", "chunksums"])
def test_client2_finds_no_model(origin: Origin, tmp_path: Path, version: str) -> None:
    """MANIFEST_UNKNOWN has a message of its own; a manifest without layers is invalid."""
    client = client2(origin, tmp_path / "client", version=version)
    name = f"library/none-{version}"
    with pytest.raises(PullError, match=r"^model not found$"):
        client.pull(name)
    origin.put_manifest(name, "latest", b"{}")
    with pytest.raises(PullError, match=r"^invalid manifest: no layers$"):
        client.pull(name)
    origin.set_private(name, private=True)
    with pytest.raises(PullError, match=r"^registry responded with status 401: code UNAUTHORIZED: authentication"):
        client.pull(name)


# --- client2, form "0.6.0"

first_client2 = functools.partial(client2, version="0.6.0")


def test_first_client2_probes_with_one_byte(origin: Origin, tmp_path: Path) -> None:
    """`bytes=0-0` finds the final address; chunks go there with the fields that arrived there."""
    digest = publish(origin)
    first_client2(origin, tmp_path / "client").pull(MODEL)
    (probe,) = asked(origin, "registry", digest=digest)
    assert probe.headers["range"] == "bytes=0-0"
    assert probe.headers["authorization"].startswith("Bearer ")
    probed, *chunks = asked(origin, "cdn", digest=digest)
    assert (probed.headers["range"], len(chunks)) == ("bytes=0-0", 17)
    assert {request.target for request in chunks} == {probed.target}
    referer = {"referer": f"https://{REGISTRY_HOST}{probe.path}"}
    assert all(request.headers.items() >= referer.items() for request in chunks)
    (small,) = asked(origin, "registry", digest=origin.add_blob(CONFIG))
    assert "range" not in small.headers
    assert small.headers["authorization"].startswith("Bearer ")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param({"mode": Mode.IGNORE_RANGE, "times": None}, "^file content changed underfoot$", id="whole-blob"),
        pytest.param({"mode": Mode.TRUNCATE, "after": 7}, "^unexpected EOF$", id="cut"),
        pytest.param({"mode": Mode.RESET, "after": 7}, "reset by peer$", id="reset"),
        pytest.param({"mode": Mode.STATUS, "status": 403, "times": None}, "status 403", id="4xx"),
    ],
)
def test_first_client2_gives_up(origin: Origin, tmp_path: Path, fault: dict[str, Any], message: str) -> None:
    """Nothing but a 5xx is retried, and nothing is kept."""
    digest = publish(origin)
    origin.faults.append(Fault(digest=digest, **fault))
    client = first_client2(origin, tmp_path / "client")
    with pytest.raises(PullError, match=message):
        client.pull(MODEL)
    assert client.blob_path(digest).read_bytes() == b""


def test_first_client2_retries_a_chunk(origin: Origin, tmp_path: Path) -> None:
    """A 5xx of a chunk is asked again by itself."""
    digest = publish(origin)

    def spoil(_count: int) -> None:
        # The first request to the CDN is the probe, which has one try; bytes mean that chunks are under way.
        if not origin.faults:
            origin.faults.append(Fault(Mode.STATUS, digest=digest))

    client = first_client2(origin, tmp_path / "client", streams=1, on_progress=spoil)
    assert client.pull(MODEL).retries == 1


# --- x/transfer


def test_transfer_asks_twice_for_each_blob(origin: Origin, tmp_path: Path) -> None:
    """An un-ranged GET of the registry and one of the address it names, both by its own name; no HEAD."""
    digest = publish(origin)
    transfer(origin, tmp_path / "client").pull(MODEL)
    (resolve,), (data,) = (asked(origin, listener, digest=digest) for listener in ("registry", "cdn"))
    for request, host in ((resolve, REGISTRY_HOST), (data, R2_HOST)):
        agent = ("User-Agent", "ollama-transfer/1.0")
        assert request.fields == (("Host", host), agent, ("Accept-Encoding", "gzip"))
    assert ("HEAD", "blob") not in origin.counters.registry_requests


def test_transfer_dials_blobs_past_the_proxy(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the manifest goes through a proxy."""
    publish(origin)
    dialled: set[tuple[str | None, str]] = set()

    def spy(proxy_url: str | None, host: str, *arguments: Any, **options: Any) -> Any:
        dialled.add((proxy_url, host))
        return connect(None, host, *arguments, **options)

    monkeypatch.setattr(goclient, "connect", spy)
    proxy = "http://proxy.invalid:3128"
    TransferClient(proxy, origin.ca_file, tmp_path / "client", resolve=origin.resolve, dns=PUBLIC).pull(MODEL)
    assert dialled == {(proxy, REGISTRY_HOST), (None, REGISTRY_HOST), (None, R2_HOST)}


@pytest.mark.parametrize("status", [303, 308, 404, 503])
@pytest.mark.parametrize("version", ["0.14.0", "current"])
def test_transfer_refuses_to_be_led_otherwise(origin: Origin, tmp_path: Path, version: str, status: int) -> None:
    """301, 302 and 307 lead; all else is tried six times."""
    digest = publish(origin)
    mode = Mode.REDIRECT if status < 400 else Mode.STATUS
    origin.faults.append(Fault(mode, where="registry", digest=digest, status=status, times=None))
    with pytest.raises(MaxRetriesExceeded, match=rf"^max retries exceeded: status {status}$"):
        transfer(origin, tmp_path / "client", version=version).pull(MODEL)
    assert len(asked(origin, "registry", digest=digest)) == 6


@pytest.mark.parametrize("status", [301, 302, 307])
def test_transfer_is_led(origin: Origin, tmp_path: Path, status: int) -> None:
    """These three redirects are followed by hand."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.REDIRECT, digest=digest, status=status))
    assert transfer(origin, tmp_path / "client").pull(MODEL).retries == 0


def test_transfer_refuses_a_second_redirect(origin: Origin, tmp_path: Path) -> None:
    """The address that the registry names has to have the bytes."""
    digest = publish(origin)
    headers = {"Location": "https://elsewhere.invalid/"}
    origin.faults.append(Fault(Mode.STATUS, digest=digest, status=307, times=None, headers=headers))
    with pytest.raises(MaxRetriesExceeded, match=r"^max retries exceeded: status 307$"):
        transfer(origin, tmp_path / "client").pull(MODEL)
    assert len(asked(origin, "cdn", digest=digest)) == 6


@pytest.mark.parametrize(("version", "times"), [("0.14.0", 1), ("0.20.5", 2), ("current", 2)])
def test_transfer_drains_a_200(origin: Origin, tmp_path: Path, version: str, times: int) -> None:
    """A registry that answers by itself sends each blob twice since v0.20.5; the second time it may see a token."""
    digest = publish(origin, private=True)
    origin.faults.append(Fault(Mode.DIRECT, times=None))
    report = transfer(origin, tmp_path / "client", version=version).pull(MODEL)
    total = WEIGHTS.size + len(CONFIG)
    assert report.bytes == times * total
    assert origin.counters.cdn_requests == 0
    if times == 2:
        assert origin.counters.registry_bytes == 2 * total
    fields = [request.headers["authorization"] for request in asked(origin, "registry", digest=digest)]
    assert fields == [f"Bearer {GOOD_TOKEN}"] * 2


def test_transfer_circles_on_one_host(origin: Origin, tmp_path: Path) -> None:
    """Ten answers that stay on the host are too many, six times."""
    digest = publish(origin)
    where = f"/v2/library/tiny/blobs/{digest}"
    origin.faults.append(Fault(Mode.REDIRECT, digest=digest, status=307, times=None, headers={"Location": where}))
    with pytest.raises(MaxRetriesExceeded, match=r"^max retries exceeded: too many redirects$"):
        transfer(origin, tmp_path / "client").pull(MODEL)
    assert len(asked(origin, "registry", digest=digest)) == 60


@pytest.mark.parametrize(
    ("addresses", "problem"),
    [
        ([], f"resolving {R2_HOST}: no such host"),
        (["172.64.66.1", "192.168.1.2"], f"{R2_HOST} resolves to non-public 192.168.1.2"),
        (["127.0.0.1"], f"{R2_HOST} resolves to non-public 127.0.0.1"),
    ],
    ids=["unknown", "one-private", "loopback"],
)
def test_transfer_wants_a_public_target(origin: Origin, tmp_path: Path, addresses: list[str], problem: str) -> None:
    """Since v0.34.2 another host must exist, and only in public; before nobody looks."""
    digest = publish(origin)
    dns = {R2_HOST: addresses}
    with pytest.raises(MaxRetriesExceeded) as caught:
        transfer(origin, tmp_path / "client", dns=dns).pull(MODEL)
    assert str(caught.value) == f"max retries exceeded: redirect target not allowed: {problem}"
    assert asked(origin, "cdn", digest=digest) == []
    transfer(origin, tmp_path / "old", version="0.33.0", dns=dns).pull(MODEL)


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("", "missing Location"),
        (f"http://{R2_HOST}/", "https registry redirecting to http"),
        (f"http://{REGISTRY_HOST}/", "https registry redirecting to http"),
        ("ftp://elsewhere/", 'scheme "ftp"'),
        ("https://10.0.0.1/", "10.0.0.1 is not a public address"),
    ],
    ids=["none", "http", "http-at-home", "ftp", "address"],
)
def test_transfer_wants_a_safe_target(origin: Origin, tmp_path: Path, location: str, problem: str) -> None:
    """Since v0.34.2 a redirect must not leave https, nor name a private address."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.REDIRECT, digest=digest, status=307, times=None, headers={"Location": location}))
    with pytest.raises(MaxRetriesExceeded) as caught:
        transfer(origin, tmp_path / "client").pull(MODEL)
    assert str(caught.value) == f"max retries exceeded: redirect target not allowed: {problem}"


def test_old_transfer_dies_of_a_missing_location(origin: Origin, tmp_path: Path) -> None:
    """Before v0.34.2 a redirect to nowhere is a panic."""
    publish(origin)
    origin.faults.append(Fault(Mode.REDIRECT, status=307, headers={"Location": ""}))
    with pytest.raises(Crashed, match="nil pointer dereference"):
        transfer(origin, tmp_path / "client", version="0.33.0").pull(MODEL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, True) for text in ("1.1.1.1", "192.0.2.1", "2606:4700::1", "100.128.0.1")),
        *((text, False) for text in ("10.1.1.1", "172.31.0.1", "192.168.0.1", "127.0.0.1", "0.0.0.0", "169.254.1.1")),
        *((text, False) for text in ("100.64.0.1", "198.19.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1")),
        *((text, False) for text in ("fd00::1", "ff02::1", "::", "::ffff:100.64.0.1", "::ffff:10.0.0.1")),
    ],
)
def test_public_addresses(text: str, expected: bool) -> None:
    """Go's idea of a public address, and the two ranges added to it."""
    assert is_public(ipaddress.ip_address(text)) is expected


@pytest.mark.parametrize(
    ("version", "size", "second"),
    [("current", 50_000, "bytes=7000-"), ("current", 49_999, None), ("0.14.0", 50_000, None)],
    ids=["large", "small", "old"],
)
@pytest.mark.parametrize("mode", [Mode.TRUNCATE, Mode.RESET])
def test_transfer_resumes_large_blobs(
    origin: Origin, tmp_path: Path, mode: Mode, version: str, size: int, second: str | None
) -> None:
    """What came of a large blob is kept however it ended, since v0.20.5."""
    digest = publish(origin, Synthetic(size))
    origin.faults.append(Fault(mode, digest=digest, after=7_000))
    report = transfer(origin, tmp_path / "client", version=version).pull(MODEL)
    assert ranges(asked(origin, "cdn", digest=digest)) == [None, second]
    assert report.retries == 1


def test_transfer_starts_over_with_a_whole_blob(origin: Origin, tmp_path: Path) -> None:
    """A 200 in answer to the rest replaces what there was."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.TRUNCATE, digest=digest, after=7_000))
    origin.faults.append(Fault(Mode.IGNORE_RANGE, digest=digest))
    client = transfer(origin, tmp_path / "client")
    assert client.pull(MODEL).bytes == 7_000 + WEIGHTS.size + len(CONFIG)
    assert client.blob_path(digest).read_bytes() == content(origin, digest)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        pytest.param({"mode": Mode.FLIP, "after": 9}, "digest mismatch", id="flipped"),
        pytest.param({"mode": Mode.SHORT_LENGTH, "after": 9}, "digest mismatch", id="short"),
        pytest.param({"mode": Mode.TRUNCATE, "after": 9}, "unexpected EOF", id="cut"),
        pytest.param({"mode": Mode.STATUS, "status": 416}, "status 416", id="416"),
    ],
)
def test_transfer_gives_up_after_six(origin: Origin, tmp_path: Path, fault: dict[str, Any], problem: str) -> None:
    """Any error counts, wrong bytes too, and nothing wrong is left."""
    digest = publish(origin, SMALL)
    origin.faults.append(Fault(digest=digest, times=None, **fault))
    client = transfer(origin, tmp_path / "client")
    with pytest.raises(MaxRetriesExceeded, match=rf"^max retries exceeded: {problem}$"):
        client.pull(MODEL)
    assert len(asked(origin, "cdn", digest=digest)) == 6
    name = client.blob_path(digest).name
    assert not [path for path in client.blob_path(digest).parent.iterdir() if path.name.startswith(name)]


def test_transfer_undoes_gzip(origin: Origin, tmp_path: Path) -> None:
    """Go's transport asked for gzip, and takes it off."""
    digest = publish(origin, SMALL)
    origin.faults.append(Fault(Mode.GZIP, digest=digest))
    assert transfer(origin, tmp_path / "client").pull(MODEL).retries == 0


def open_later(fault: Fault, after_s: float) -> threading.Thread:
    """Let a stalled body go on when its reader has waited so long."""

    def wait_and_open() -> None:
        fault.gate.wait_held()
        threading.Event().wait(after_s)
        fault.gate.open()

    thread = threading.Thread(target=wait_and_open)
    thread.start()
    return thread


def test_transfer_notices_a_stall_late(origin: Origin, tmp_path: Path) -> None:
    """A body that pauses is read to its end and then asked for again, uncounted."""
    digest = publish(origin, SMALL)
    fault = Fault(Mode.STALL, digest=digest, after=9)
    origin.faults.append(fault)
    opener = open_later(fault, 0.2)
    report = transfer(origin, tmp_path / "client", stall_s=0.1).pull(MODEL)
    opener.join()
    assert (report.stalls, report.retries) == (1, 0)
    assert origin.counters.cdn_bytes_by_digest[digest] == 2 * SMALL.size


def test_transfer_finds_a_blob_slow(origin: Origin, tmp_path: Path) -> None:
    """A tenth of the median of five blobs is too slow, but twice that costs nothing."""
    *fast, slow = (Synthetic(20_000, seed=seed) for seed in range(6))
    publish(origin, *fast, slow)
    fault = Fault(Mode.STALL, digest=origin.add_blob(slow), after=9)
    origin.faults.append(fault)
    opener = open_later(fault, 1.0)
    report = transfer(origin, tmp_path / "client", streams=1, speed_threshold=20_000, slow_s=0.1).pull(MODEL)
    opener.join()
    assert (report.stalls, report.retries) == (0, 0)
    assert len(asked(origin, "cdn", digest=origin.add_blob(slow))) == 2


# --- since v0.35.0

m1 = functools.partial(modern, version="0.35.1")
m2 = functools.partial(modern, version="0.40.2")
m3 = functools.partial(modern, version="0.40.3")
SINCE_35 = {"M1": m1, "M2": m2, "M3": m3}
PRIVATE = {**PUBLIC, "inside.example": ["172.64.66.1", "192.168.1.2"], "loop.example": ["127.0.0.1"]}


@pytest.fixture
def proxy(origin: Origin) -> Iterator[ConnectProxy]:
    """A proxy that knows the real names, for clients that ask one."""
    with ConnectProxy(origin.resolve) as running:
        yield running


def leads_to(origin: Origin, digest: str, location: str) -> None:
    """Let the registry answer the probe so, always."""
    origin.faults.append(Fault(Mode.REDIRECT, digest=digest, status=307, times=None, headers={"Location": location}))


def list_of(origin: Origin, *runners: str, media_type: str = MODEL_TYPE, nested: bool = False) -> list[bytes]:
    """A tag that is a list with a child for each runner, each of a layer of its own; list and children."""
    config = origin.add_blob(CONFIG)
    children = [
        origin.manifest_of([(media_type, origin.add_blob(Synthetic(30_000, seed=seed)))], config, runner=runner)
        for seed, runner in enumerate(runners)
    ]
    listed = origin.put_list("library/tiny", "latest", children)
    if nested:
        entry = {"digest": origin.add_blob(listed), "runner": "llamacpp"}
        origin.add_member("library/tiny", entry["digest"])
        listed = origin.put_list("library/tiny", "latest", [entry], plain=children[0])
    return [listed, *children]


@pytest.mark.parametrize("version", ["0.35.1", "0.40.2", "0.40.3", "0.41.0 bypassing", "0.41.0 proxying"])
def test_who_asks_a_proxy_for_parts(origin: Origin, tmp_path: Path, proxy: ConnectProxy, version: str) -> None:
    """The registry is always asked through the proxy, R2 only by those that are mended; parts have no version."""
    digest = publish(origin)
    report = modern(origin, tmp_path / "client", version=version, proxy_url=proxy.url).pull(MODEL)
    asks = version in ("0.40.3", "0.41.0 proxying")
    assert proxy.targets == {f"{REGISTRY_HOST}:443"} | ({f"{R2_HOST}:443"} if asks else set())
    (agent,) = {request.headers["user-agent"] for request in asked(origin, "registry", digest=digest)}
    assert agent == f"ollama/{version.partition(' ')[0]} (amd64 linux) Go/go1.27"
    parts = asked(origin, "cdn", digest=digest)
    assert {tuple(name for name, _value in part.fields) for part in parts} == {("Host", "User-Agent", "Range")}
    assert {part.headers["user-agent"] for part in parts} == {"Go-http-client/1.1"}
    assert (report.retries, len(parts)) == (0, 5)


def test_parts_go_past_a_proxy_that_is_excepted(origin: Origin, tmp_path: Path, proxy: ConnectProxy) -> None:
    """NO_PROXY is honoured, and what is dialled directly is judged as ever."""
    publish(origin)
    options = {"proxy_url": proxy.url, "no_proxy": ["cloudflarestorage.com"]}
    m3(origin, tmp_path / "client", **options).pull(MODEL)
    assert proxy.targets == {f"{REGISTRY_HOST}:443"}
    with pytest.raises(PullError, match="no such host"):
        m3(origin, tmp_path / "other", dns={}, **options).pull(MODEL)


@pytest.mark.parametrize(
    ("make", "location", "problem"),
    [
        (m1, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m2, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m3, f"http://{R2_HOST}/", "https registry redirecting to http"),
        (m3, "http://10.0.0.1/", "https registry redirecting to http"),
        (m3, "ftp://elsewhere/", 'scheme "ftp"'),
        (m3, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m3, "https://127.0.0.1/", "127.0.0.1 is not a public address"),
        (m3, "https://[fd00::1]/", "fd00::1 is not a public address"),
        (m3, "https://inside.example/", "inside.example resolves to non-public 192.168.1.2"),
        (m3, "https://loop.example/", "loop.example resolves to non-public 127.0.0.1"),
    ],
)
def test_part_address_is_judged_at_the_probe(
    origin: Origin, tmp_path: Path, proxy: ConnectProxy, make: Make, location: str, problem: str
) -> None:
    """A bad address ends the pull at once: one probe, and no request there, through a proxy neither."""
    digest = publish(origin)
    leads_to(origin, digest, location)
    client = make(origin, tmp_path / "client", dns=PRIVATE, proxy_url=proxy.url)
    with pytest.raises(PullError) as caught:
        client.pull(MODEL)
    assert str(caught.value) == f"redirect target not allowed: {problem}"
    assert len(asked(origin, "registry", digest=digest)) == 1
    assert proxy.targets == {f"{REGISTRY_HOST}:443"}


@pytest.mark.parametrize(("name", "by_proxy", "allowed"), [(n, p, n == "M3" and p) for n in SINCE_35 for p in (0, 1)])
def test_name_that_only_a_proxy_knows(
    origin: Origin, tmp_path: Path, proxy: ConnectProxy, name: str, by_proxy: int, allowed: bool
) -> None:
    """A failed lookup is a refusal, but for those that leave the lookup to their proxy."""
    publish(origin)
    client = SINCE_35[name](origin, tmp_path / "client", dns={}, proxy_url=proxy.url if by_proxy else None)
    if allowed:
        assert client.pull(MODEL).retries == 0
        return
    with pytest.raises(PullError, match=f"^redirect target not allowed: resolving {R2_HOST}: no such host$"):
        client.pull(MODEL)


@pytest.mark.parametrize(
    ("make", "location", "problem"),
    [
        (m1, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m2, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m3, f"http://{R2_HOST}/", "https registry redirecting to http"),
        (m3, "https://10.0.0.1/", "10.0.0.1 is not a public address"),
        (m3, "https://inside.example/", "inside.example resolves to non-public 192.168.1.2"),
        (m3, "https://nowhere.example/", "resolving nowhere.example: no such host"),
    ],
)
def test_part_redirects_are_judged(origin: Origin, tmp_path: Path, make: Make, location: str, problem: str) -> None:
    """What a part is led to is judged like its address, and each part is tried six times."""
    digest = publish(origin)
    headers = {"Location": location}
    origin.faults.append(Fault(Mode.STATUS, digest=digest, status=307, times=None, headers=headers))
    client = make(origin, tmp_path / "client", dns=PRIVATE, parts=1, max_part=WEIGHTS.size)
    with pytest.raises(MaxRetriesExceeded) as caught:
        client.pull(MODEL)
    expected = f'max retries exceeded: Get "{location}": redirect target not allowed: {problem}'
    assert str(caught.value) == expected
    assert len(asked(origin, "cdn", digest=digest)) == 6


def test_part_redirects_are_ten_requests(origin: Origin, tmp_path: Path) -> None:
    """A loop is left after ten requests."""
    digest = publish(origin)
    url = origin.signed_url(digest)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, status=302, times=None, headers={"Location": url}))
    client = m1(origin, tmp_path / "client", parts=1, max_part=WEIGHTS.size, max_retries=1)
    with pytest.raises(MaxRetriesExceeded, match="stopped after 10 redirects"):
        client.pull(MODEL)
    assert len(asked(origin, "cdn", digest=digest)) == 10


class Rebinding(dict[str, Sequence[str]]):
    """A DNS that says something else each time it is asked for R2."""

    def __init__(self, *answers: Sequence[str]) -> None:
        super().__init__(PUBLIC)
        self._answers = iter(answers)
        self._last: Sequence[str] = ()
        self._lock = threading.Lock()

    def get(self, name: str, default: Any = None) -> Any:
        """The next answer; the last one stays."""
        if name != R2_HOST:
            return super().get(name, default)
        with self._lock:
            self._last = next(self._answers, self._last)
            return self._last


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["172.64.66.1", "10.0.0.1"]], ids=["private", "one-private"])
def test_name_is_judged_again_when_dialled(origin: Origin, tmp_path: Path, answer: list[str]) -> None:
    """A name that was public at the probe and is not when it is dialled is not dialled."""
    digest = publish(origin)
    client = m1(origin, tmp_path / "client", dns=Rebinding(["172.64.66.1"], answer), parts=1, max_part=WEIGHTS.size)
    with pytest.raises(MaxRetriesExceeded, match=f"redirect target not allowed: {R2_HOST} resolves to non-public"):
        client.pull(MODEL)
    assert asked(origin, "cdn", digest=digest) == []


def test_first_address_is_dialled(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged is what is dialled: the first address, whatever the name means elsewhere."""
    publish(origin)
    dialled = set()

    def spy(proxy_url: str | None, host: str, port: int, *arguments: Any, **options: Any) -> Any:
        dialled.add((host, options["resolve"][host, port]))
        return connect(proxy_url, host, port, *arguments, **options)

    monkeypatch.setattr(goclient, "connect", spy)
    resolve = {**origin.resolve, ("8.8.8.8", 443): ("127.0.0.1", origin.cdn_port)}
    del resolve[R2_HOST, 443]
    m1(origin, tmp_path / "client", dns={**PUBLIC, R2_HOST: ["8.8.8.8", "9.9.9.9"]}, resolve=resolve).pull(MODEL)
    assert (R2_HOST, ("127.0.0.1", origin.cdn_port)) in dialled


@pytest.mark.parametrize("make", SINCE_35.values(), ids=SINCE_35)
def test_registry_that_answers_itself_must_be_public(origin: Origin, tmp_path: Path, make: Make) -> None:
    """A 200 with Location sends the parts to the registry, which has no exemption."""
    digest = publish(origin)
    location = {"Location": f"/v2/library/tiny/blobs/{digest}"}
    origin.faults.append(Fault(Mode.DIRECT, digest=digest, times=None, headers=location))
    make(origin, tmp_path / "client").pull(MODEL)
    with pytest.raises(PullError, match=f"{REGISTRY_HOST} resolves to non-public 192.168.1.2$"):
        make(origin, tmp_path / "other", dns={**PUBLIC, REGISTRY_HOST: ["192.168.1.2"]}).pull(MODEL)


@contextlib.contextmanager
def plain_port(origin: Origin) -> Iterator[int]:
    """The registry without TLS: a port that leads to it."""

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raw = socket.create_connection(("127.0.0.1", origin.registry_port))
            with client_context(origin.ca_file, ()).wrap_socket(raw, server_hostname="localhost") as upstream:
                upward = threading.Thread(target=copy, args=(self.request, upstream))
                upward.start()
                copy(upstream, self.request)
                upward.join()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown: the other thread may still read.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("make", SINCE_35.values(), ids=SINCE_35)
def test_insecure_pull_takes_private_addresses(origin: Origin, tmp_path: Path, make: Make) -> None:
    """An http name lifts the rules about addresses, and http may lead to http; but https never to http."""
    digest = publish(origin)
    location = {"Location": f"/v2/library/tiny/blobs/{digest}"}
    origin.faults.append(Fault(Mode.DIRECT, digest=digest, times=None, headers=location))
    with plain_port(origin) as port:
        report = make(origin, tmp_path / "client", dns={}).pull(f"http://127.0.0.1:{port}/library/tiny")
    assert report.retries == 0
    assert {urlsplit(exchange.url).scheme for exchange in report.requests if digest in exchange.url} == {"http"}
    rules = Redirects("http://127.0.0.1", {}, allow_private=True)
    away, plain = urlsplit("https://inside.example/"), urlsplit("http://inside.example/")
    assert rules.policy(plain, plain, 1) is True
    assert rules.policy(away, plain, 1) == "redirect target not allowed: https registry redirecting to http"


@pytest.mark.parametrize("make", SINCE_35.values(), ids=SINCE_35)
def test_status_of_a_part_is_not_looked_at(origin: Origin, tmp_path: Path, make: Make) -> None:
    """R2's error page ends a larger part early, and fills a blob that is no longer than itself."""
    digest = publish(origin)
    page = b"<Error><Code>AccessDenied</Code></Error>"
    origin.faults.append(Fault(Mode.STATUS, digest=digest, status=403, body=page))
    assert make(origin, tmp_path / "client").pull(MODEL).retries == 1
    small = publish(origin, Synthetic(len(page), seed=9))
    origin.faults.append(Fault(Mode.STATUS, digest=small, status=403, body=page))
    with pytest.raises(DigestMismatch, match=hashlib.sha256(page).hexdigest()):
        make(origin, tmp_path / "other").pull(MODEL)


@pytest.mark.parametrize("make", SINCE_35.values(), ids=SINCE_35)
def test_real_geometry(origin: Origin, tmp_path: Path, make: Make) -> None:
    """What is not scaled is as in the real client."""
    client: Any = make(origin, tmp_path / "client", parts=None, min_part=None, max_part=None, backoff_unit_s=1.0)
    assert (client.parts, client.min_part, client.max_part) == (16, 100_000_000, 1_000_000_000)
    assert (client.stall_s, client.max_retries, client.probe_deadline_s, client.update_s) == (30.0, 6, 30.0, 2.0)
    assert client.generation.counts_first_byte


# --- lists


@pytest.mark.parametrize("version", ["0.35.1", "0.40.2", "0.40.3"])
def test_who_takes_a_list(origin: Origin, tmp_path: Path, proxy: ConnectProxy, version: str) -> None:
    """Since v0.40.0 the list is asked for and one child fetched by transfer, by those ways that parts go."""
    listed, ggml, llamacpp = list_of(origin, "ggml", " LlamaCpp ")
    client = modern(origin, tmp_path / "client", version=version, proxy_url=proxy.url)
    report = client.pull(MODEL)
    (accept,) = [r.headers["accept"] for r in origin.counters.requests if "/manifests/" in r.path]
    if version == "0.35.1":
        assert (report.manifest, accept) == (ggml, MANIFEST_TYPE)
        assert client.manifest_path(MODEL) == tmp_path / "client/manifests/registry.ollama.ai/library/tiny/latest"
        return
    assert (report.manifest, accept) == (listed, f"{LIST_TYPE}, {MANIFEST_TYPE}")
    digest = origin.add_blob(llamacpp)
    layers = [layer["digest"] for layer in json.loads(llamacpp)["layers"]]
    assert report.digests == (digest, *layers, origin.add_blob(CONFIG))
    (head,) = asked(origin, "registry", "HEAD", digest)
    assert head.headers["user-agent"].startswith(f"ollama/{version} ")
    (resolve,), (data,) = (asked(origin, listener, digest=digest) for listener in ("registry", "cdn"))
    assert {resolve.headers["user-agent"], data.headers["user-agent"]} == {"ollama-transfer/1.0"}
    assert "range" not in data.headers
    # One connection for the registry calls, and where transfer asks the proxy one more for the child.
    connects = [asked.target for asked in proxy.asked].count(f"{REGISTRY_HOST}:443")
    assert (connects > 1, f"{R2_HOST}:443" in proxy.targets) == (version == "0.40.3", version == "0.40.3")


@pytest.mark.parametrize(
    ("runners", "chosen"),
    [(["mlx", "ggml", "llamacpp"], 2), (["mlx", "ggml"], 1), (["new", "mlx"], 1), (["new"], None)],
)
def test_choice_of_a_child(origin: Origin, tmp_path: Path, runners: list[str], chosen: int | None) -> None:
    """llama.cpp before ggml before MLX, whatever the order of the list."""
    _listed, *children = list_of(origin, *runners)
    client = m2(origin, tmp_path / "client")
    if chosen is None:
        with pytest.raises(PullError, match=r"^pull model manifest: no manifest of the list has a runner"):
            client.pull(MODEL)
    else:
        assert client.pull(MODEL).digests[0] == origin.add_blob(children[chosen])


def test_list_is_known_by_its_text(origin: Origin, tmp_path: Path) -> None:
    """What is a list says so itself, whatever Content-Type says."""
    listed, child = list_of(origin, "ggml")
    headers = {"Content-Type": "text/plain"}
    origin.faults.append(Fault(Mode.STATUS, where="registry", path="/manifests/", status=200, body=listed))
    report = m2(origin, tmp_path / "client").pull(MODEL)
    assert report.digests[0] == origin.add_blob(child)
    (manifest, *_rest) = report.requests
    assert headers.items() <= dict(manifest.headers).items()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"mode": Mode.NO_LENGTH}, "invalid content length of manifest .*: None"),
        ({"mode": Mode.STATUS, "status": 200, "body": b""}, "invalid content length of manifest .*: 0"),
        ({"mode": Mode.STATUS, "status": 404}, "file does not exist"),
    ],
    ids=["no-length", "empty", "404"],
)
def test_child_needs_a_good_head(origin: Origin, tmp_path: Path, fault: dict[str, Any], problem: str) -> None:
    """Without a length, or without the child, there is no pull and no try to get it."""
    _listed, child = list_of(origin, "ggml")
    digest = origin.add_blob(child)
    origin.faults.append(Fault(where="registry", method="HEAD", digest=digest, **fault))
    with pytest.raises(PullError, match=f"^pull model manifest: {problem}$"):
        m2(origin, tmp_path / "client").pull(MODEL)
    assert asked(origin, "registry", digest=digest) == []


def test_child_must_hash_to_its_name(origin: Origin, tmp_path: Path) -> None:
    """A wrong byte is no manifest."""
    _listed, child = list_of(origin, "ggml")
    origin.faults.append(Fault(Mode.FLIP, digest=origin.add_blob(child), after=3, times=None))
    with pytest.raises(PullError, match=r"max retries exceeded: digest mismatch$"):
        m2(origin, tmp_path / "client", transfer={"backoff_unit_s": 0.0001}).pull(MODEL)


def test_list_in_a_list_is_refused(origin: Origin, tmp_path: Path) -> None:
    """There is one level of lists."""
    list_of(origin, "ggml", nested=True)
    with pytest.raises(PullError, match=r"^pull model manifest: manifest list contains a manifest list$"):
        m2(origin, tmp_path / "client").pull(MODEL)


def test_child_in_place(origin: Origin, tmp_path: Path) -> None:
    """A manifest that stands in the list itself is asked for nowhere."""
    digest = publish(origin)
    child = {**json.loads(origin.manifest_of([(MODEL_TYPE, digest)], origin.add_blob(CONFIG))), "runner": "ggml"}
    origin.put_list("library/tiny", "latest", [child], plain=b"{}")
    assert m2(origin, tmp_path / "client").pull(MODEL).digests == (digest, origin.add_blob(CONFIG))


@pytest.mark.parametrize("is_listed", [False, True])
def test_tensors_come_by_transfer(origin: Origin, tmp_path: Path, is_listed: bool) -> None:
    """One tensor among the layers makes all of them go that way, plain or in a child."""
    if is_listed:
        list_of(origin, "mlx", media_type=TENSOR_TYPE)
    else:
        publish(origin, media_type=TENSOR_TYPE)
    m2(origin, tmp_path / "client").pull(MODEL)
    agents = {request.headers["user-agent"] for request in asked(origin, "cdn")}
    assert agents == {"ollama-transfer/1.0"}


def test_folder_since_lists(origin: Origin, tmp_path: Path) -> None:
    """The tag is a link to the document's blob, and in the old folder an anchor has the documents as layers."""
    listed, child = list_of(origin, "ggml")
    client = m2(origin, tmp_path / "client")
    client.pull(MODEL)
    path = tmp_path / "client/manifests-v2/ollama.com/library/tiny/latest"
    blob = f"sha256-{hashlib.sha256(listed).hexdigest()}"
    assert str(path.readlink()) == f"../../../../blobs/{blob}"
    assert path.read_bytes() == listed
    anchor = json.loads((tmp_path / "client/manifests/registry.ollama.ai/library/tiny/latest").read_bytes())
    *layers, first, second = anchor["layers"]
    assert layers == json.loads(child)["layers"]
    digests = [f"sha256:{hashlib.sha256(document).hexdigest()}" for document in (listed, child)]
    assert [first["digest"], second["digest"]] == digests
    assert [first["mediaType"], second["mediaType"]] == [LIST_TYPE, MANIFEST_TYPE]
    assert client.pull(MODEL).digests == ()


def test_update_probe(origin: Origin, tmp_path: Path) -> None:
    """HEAD without a version; the type of the answer decides, and it has to come in time."""
    publish(origin)
    client: Any = m2(origin, tmp_path / "client", update_s=0.3)
    assert not client.probe_update(MODEL).is_list
    (listed, _child) = list_of(origin, "ggml")
    update = client.probe_update(MODEL)
    assert (update.is_list, update.length) == (True, len(listed))
    assert update.digest == hashlib.sha256(listed).hexdigest()
    request = origin.counters.requests[-1]
    assert request.method == "HEAD"
    assert request.headers["user-agent"] == "Go-http-client/1.1"
    assert request.headers["accept"] == f"{LIST_TYPE}, {MANIFEST_TYPE}"
    origin.faults.append(Fault(Mode.STATUS, where="registry", method="HEAD", status=200, body=listed))
    assert not client.probe_update(MODEL).is_list
    origin.faults.append(Fault(Mode.HANG, where="registry", method="HEAD"))
    with pytest.raises(PullError, match=r"^context deadline exceeded$"):
        client.probe_update(MODEL)


# --- transfer since v0.35.0

t2 = functools.partial(transfer, version="0.40.2")
t3 = functools.partial(transfer, version="0.40.3")


@pytest.mark.parametrize(("version", "times"), [("0.40.2", 2), ("0.40.3", 1), ("0.40.3 twice", 2)])
def test_transfer_takes_a_200(origin: Origin, tmp_path: Path, version: str, times: int) -> None:
    """A registry that answers by itself sends each blob twice, or once where the first answer is the data."""
    publish(origin)
    origin.faults.append(Fault(Mode.DIRECT, times=None))
    report = transfer(origin, tmp_path / "client", version=version).pull(MODEL)
    assert report.bytes == times * (WEIGHTS.size + len(CONFIG))


def test_transfer_resumes_where_the_answer_is_the_data(origin: Origin, tmp_path: Path) -> None:
    """The Range goes with the first request then, and a 206 is taken."""
    digest = publish(origin)
    origin.faults += [Fault(Mode.DIRECT, times=None), Fault(Mode.TRUNCATE, where="registry", digest=digest, after=70)]
    t3(origin, tmp_path / "client").pull(MODEL)
    assert ranges(asked(origin, "registry", digest=digest)) == [None, "bytes=70-"]


def test_transfer_asks_a_proxy(origin: Origin, tmp_path: Path, proxy: ConnectProxy) -> None:
    """The mended one asks the proxy for both hosts, and leaves it the lookup."""
    publish(origin)
    t3(origin, tmp_path / "client", proxy_url=proxy.url, dns={}).pull(MODEL)
    assert proxy.targets == {f"{REGISTRY_HOST}:443", f"{R2_HOST}:443"}
    proxy.restore()
    t2(origin, tmp_path / "other", proxy_url=proxy.url).pull(MODEL)
    assert [asked.target for asked in proxy.asked] == [f"{REGISTRY_HOST}:443"]
    with pytest.raises(MaxRetriesExceeded, match=f"lookup {REGISTRY_HOST}: no such host$"):
        t2(origin, tmp_path / "third", proxy_url=proxy.url, dns={}).pull(MODEL)


def test_transfer_exempts_the_registry(origin: Origin, tmp_path: Path) -> None:
    """The registry itself may have a private address, R2 may not, neither when it is dialled."""
    publish(origin)
    dns = {**PUBLIC, REGISTRY_HOST: ["192.168.1.2"]}
    resolve = {**origin.resolve, ("192.168.1.2", 443): ("127.0.0.1", origin.registry_port)}
    t2(origin, tmp_path / "client", dns=dns, resolve=resolve).pull(MODEL)
    moving = Rebinding(["172.64.66.1"], ["10.0.0.1"])
    with pytest.raises(MaxRetriesExceeded, match=f"{R2_HOST} resolves to non-public 10.0.0.1$"):
        t2(origin, tmp_path / "other", dns=moving, streams=1).pull(MODEL)


@pytest.mark.parametrize(("stalls", "completes"), [(7, True), (8, False)])
def test_transfer_interrupts_a_stall(origin: Origin, tmp_path: Path, stalls: int, completes: bool) -> None:
    """A body that pauses is left in the middle; two such pauses are free, six more are too many."""
    digest = publish(origin, SMALL)
    origin.faults += [Fault(Mode.STALL, digest=digest, after=9) for _number in range(stalls)]
    client = t2(origin, tmp_path / "client", stall_s=0.05)
    if completes:
        report = client.pull(MODEL)
        assert (report.stalls, report.retries) == (7, 5)
        return
    with pytest.raises(MaxRetriesExceeded, match=r"download stalled$"):
        client.pull(MODEL)


def test_transfer_interrupts_a_slow_body(origin: Origin, tmp_path: Path) -> None:
    """A body slower than a tenth of the median is left without waiting for its next byte."""
    *fast, slow = (Synthetic(20_000, seed=seed) for seed in range(6))
    publish(origin, *fast, slow)
    fault = Fault(Mode.STALL, digest=origin.add_blob(slow), after=9)
    origin.faults.append(fault)
    report = t2(origin, tmp_path / "client", streams=1, speed_threshold=20_000, slow_s=0.1).pull(MODEL)
    assert (report.stalls, report.retries, fault.hits) == (0, 0, 1)
    assert report.seconds < 5.0


def test_transfer_does_not_save_an_error_page(origin: Origin, tmp_path: Path) -> None:
    """R2's XML is an error, whatever its length."""
    digest = publish(origin, Synthetic(40))
    origin.faults.append(Fault(Mode.STATUS, digest=digest, status=403, body=bytes(40)))
    assert t2(origin, tmp_path / "client").pull(MODEL).retries == 1


# --- readers


def test_head_reader(origin: Origin, tmp_path: Path, proxy: ConnectProxy) -> None:
    """It asks for the first bytes of each blob and then the next, through the proxy, and keeps only those."""
    digest = publish(origin)
    reader = scaled(HeadReader, stops=(1_000, 5_000))(origin, tmp_path / "reader", proxy_url=proxy.url)
    report = reader.pull(MODEL)
    assert report.bytes == 5_000 + len(CONFIG)
    assert ranges(asked(origin, "cdn", digest=digest)) == ["bytes=0-999", "bytes=1000-4999"]
    assert reader.blob_path(digest).read_bytes() == WEIGHTS.read(0, 5_000)
    assert proxy.targets == {f"{REGISTRY_HOST}:443", f"{R2_HOST}:443"}


def test_head_reader_goes_away(origin: Origin, tmp_path: Path) -> None:
    """With an open range it leaves in the middle of a body."""
    large = Synthetic(64 << 20)
    publish(origin, large)
    scaled(HeadReader, stops=(1_000,), open_ended=True)(origin, tmp_path / "reader").pull(MODEL)
    origin.counters.wait_for(lambda counters: counters.cdn_connections_open == 0)
    assert origin.counters.cdn_bytes < large.size // 2


@pytest.mark.parametrize("fault", [Mode.IGNORE_RANGE, Mode.CONTENT_RANGE])
def test_head_reader_wants_what_it_asked_for(origin: Origin, tmp_path: Path, fault: Mode) -> None:
    """A 200 or another range is an error."""
    digest = publish(origin)
    origin.faults.append(Fault(fault, digest=digest))
    with pytest.raises(PullError, match=r"^expected 206 from 0"):
        scaled(HeadReader, stops=(10,))(origin, tmp_path / "reader").pull(MODEL)


@pytest.mark.parametrize(
    "location",
    [
        f"http://{R2_HOST}/",
        f"https://{R2_HOST}:8443/",
        f"https://{R2_HOST}.example/",
        f"https://user@{R2_HOST}/",
        "https://elsewhere.example/",
        "https://127.0.0.1/",
    ],
)
def test_strict_reader_refuses(origin: Origin, tmp_path: Path, location: str) -> None:
    """Only https, only port 443, only the two hosts."""
    digest = publish(origin)
    leads_to(origin, digest, location)
    with pytest.raises(PullError, match=r"^refused redirect to "):
        scaled(StrictReader)(origin, tmp_path / "reader").pull(MODEL)
    assert asked(origin, "cdn") == []


def test_strict_reader_takes_two_hops(origin: Origin, tmp_path: Path) -> None:
    """From the registry to R2 and once more, but not a third time; and the bytes must be right."""
    digest = publish(origin)
    reader = scaled(StrictReader)(origin, tmp_path / "reader")
    origin.faults.append(Fault(Mode.REDIRECT, status=307, headers={"Location": f"/v2/library/tiny/blobs/{digest}"}))
    reader.pull(MODEL)
    assert reader.blob_path(digest).read_bytes() == WEIGHTS.read(0, WEIGHTS.size)
    location = {"Location": f"https://{REGISTRY_HOST}/v2/library/tiny/blobs/{digest}"}
    origin.faults.append(Fault(Mode.REDIRECT, status=307, headers=location, times=2))
    with pytest.raises(PullError, match=r"^more than 2 redirects$"):
        reader.pull(MODEL)
    origin.faults.append(Fault(Mode.FLIP, digest=digest, after=5))
    with pytest.raises(DigestMismatch):
        reader.pull(MODEL)
