"""The origin misbehaves as it is told, and the emulated Ollama 0.34 pulls as the real one: without the product."""

import gzip
import hashlib
import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.a2 import A2Client, Aborted, DigestMismatch, MaxRetriesExceeded, ModelName, PullError
from tests.support.http1 import ClosedBeforeResponse, Connection, ProtocolError, connect
from tests.support.origin import (
    GOOD_TOKEN,
    LIST_TYPE,
    MANIFEST_TYPE,
    MODEL_TYPE,
    PARAMS_TYPE,
    R2_HOST,
    REGISTRY_COM,
    REGISTRY_HOST,
    TEMPLATE_TYPE,
    Fault,
    Mode,
    Origin,
    Sparse,
    Synthetic,
)

pytestmark = pytest.mark.emulators

BLOB = b"0123456789abcdef"
CONFIG = b'{"model_format":"gguf"}'
MODEL = "library/tiny:latest"
WEIGHTS = Synthetic(200_003, seed=1)
"""16 parts of 12 500 bytes and one of 3."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """The origin behind `origin`."""
    with Origin(tmp_path_factory.mktemp("origin")) as running:
        yield running


@pytest.fixture
def origin(shared: Origin) -> Iterator[Origin]:
    """A running origin; nothing of the test before is still going on."""
    yield shared
    shared.counters.wait_for(lambda counters: counters.cdn_connections_open == 0)
    shared.restore()


@pytest.fixture
def client(origin: Origin, tmp_path: Path) -> A2Client:
    """A client that reaches the origin directly, with parts of at least 10 000 bytes and short waits."""
    return make_client(origin, tmp_path / "client")


def make_client(origin: Origin, directory: Path, **changes: Any) -> A2Client:
    """A client with the scaled-down defaults of this file."""
    options: dict[str, Any] = {"min_part": 10_000, "max_part": 100_000, "backoff_unit_s": 0.001}
    return A2Client(None, origin.ca_file, directory, resolve=origin.resolve, **{**options, **changes})


def publish(origin: Origin, data: bytes | Synthetic = WEIGHTS, **options: Any) -> str:
    """A model of one layer; the digest of that layer."""
    digest = origin.add_blob(data)
    origin.add_model("library/tiny", "latest", layers=[(MODEL_TYPE, digest)], config=origin.add_blob(CONFIG), **options)
    return digest


def open_registry(origin: Origin) -> Connection:
    """A connection to the registry."""
    return connect(None, REGISTRY_HOST, 443, origin.ca_file, resolve=origin.resolve, timeout_s=10)


def open_cdn(origin: Origin) -> Connection:
    """A connection to the CDN."""
    return connect(None, R2_HOST, 443, origin.ca_file, resolve=origin.resolve, timeout_s=10)


def target(url: str) -> str:
    """Path and query."""
    split = urlsplit(url)
    return f"{split.path}?{split.query}"


def part_ranges(client: A2Client, digest: str) -> list[str | None]:
    """The ranges a pull asked the CDN for, in the order they were answered."""
    hexadecimal = digest.removeprefix("sha256:")
    return [exchange.range for exchange in client.requests if f"/{hexadecimal}/data" in exchange.url]


# --- a pull as it should be


def test_pull_of_three_layers(origin: Origin, client: A2Client) -> None:
    """All blobs and the exact manifest arrive; the origin sees the real client's requests and no others."""
    layers = [
        (MODEL_TYPE, origin.add_blob(WEIGHTS)),
        (TEMPLATE_TYPE, origin.add_blob(b"{{ .Prompt }}")),
        (PARAMS_TYPE, origin.add_blob(Synthetic(30_000, seed=2))),
    ]
    config = origin.add_blob(CONFIG)
    manifest = origin.add_model("library/tiny", "latest", layers=layers, config=config)
    digests = [*(digest for _media_type, digest in layers), config]

    report = client.pull(MODEL)

    for digest in digests:
        source = origin.blob(digest)
        assert client.blob_path(digest).read_bytes() == source.read(0, source.size)
    assert client.manifest_path(MODEL).read_bytes() == manifest == report.manifest
    assert b' ,\n   "' in manifest
    assert {path.name for path in client.blob_path(config).parent.iterdir()} == {d.replace(":", "-") for d in digests}

    total = sum(origin.blob(digest).size for digest in digests)
    assert (report.digests, report.bytes, report.retries, report.stalls) == (tuple(digests), total, 0, 0)
    counters = origin.counters
    assert counters.cdn_bytes == total
    assert counters.cdn_bytes_by_digest == {digest: origin.blob(digest).size for digest in digests}
    assert counters.registry_requests == {("GET", "manifest"): 1, ("HEAD", "blob"): 4, ("GET", "blob"): 4}
    assert counters.cdn_requests == 17 + 1 + 3 + 1
    assert 1 <= counters.cdn_connections_peak <= 16
    assert len(report.requests) == len(counters.requests) == 1 + 4 + 4 + 22


def test_pull_sends_the_fields_of_the_real_client(origin: Origin, client: A2Client) -> None:
    """Accept-Encoding only on un-ranged GETs, Accept only for the manifest, parts bare."""
    publish(origin, BLOB)
    client.pull(MODEL)
    agent = "ollama/0.34.3 (amd64 linux) Go/go1.26.0"
    seen = [(request.method, request.fields) for request in origin.counters.requests[:4]]
    assert seen == [
        (
            "GET",
            (
                ("Host", REGISTRY_HOST),
                ("User-Agent", agent),
                ("Accept", "application/vnd.docker.distribution.manifest.v2+json"),
                ("Accept-Encoding", "gzip"),
            ),
        ),
        ("HEAD", (("Host", REGISTRY_HOST), ("User-Agent", agent))),
        ("GET", (("Host", REGISTRY_HOST), ("User-Agent", agent), ("Accept-Encoding", "gzip"))),
        ("GET", (("Host", R2_HOST), ("User-Agent", "Go-http-client/1.1"), ("Range", "bytes=0-15"))),
    ]


def test_parts_are_a_sixteenth_within_bounds(origin: Origin, tmp_path: Path) -> None:
    """Part sizes are total/16 clamped, with the remainder last."""
    digest = publish(origin, Synthetic(1000))
    for minimum, maximum, expected in [(100, 1000, 10), (10, 1000, 17), (10, 50, 20), (5000, 9000, 1)]:
        client = make_client(origin, tmp_path / f"{minimum}-{maximum}", min_part=minimum, max_part=maximum)
        client.pull(MODEL)
        assert len(part_ranges(client, digest)) == expected


def test_gzip_manifest_is_stored_decoded(origin: Origin, client: A2Client) -> None:
    """A manifest sent with Content-Encoding: gzip is saved as its identity bytes."""
    publish(origin)
    origin.gzip_manifests = True
    report = client.pull(MODEL)
    assert dict(report.requests[0].headers)["Content-Encoding"] == "gzip"
    assert json.loads(client.manifest_path(MODEL).read_bytes())["schemaVersion"] == 2


def test_private_model_needs_the_token_dance(origin: Origin, client: A2Client) -> None:
    """401, one token request, a replay; the token stays on the registry."""
    publish(origin, BLOB, private=True)
    client.pull(MODEL)
    (token,) = origin.counters.tokens
    query = parse_qs(token.query)
    assert (query["service"], query["scope"]) == (["registry"], ["repository:library/tiny:pull"])
    assert {"ts", "nonce"} < set(query)
    assert ":" in token.headers["authorization"]
    asked = {(r.listener, r.headers.get("authorization")) for r in origin.counters.requests if r.path != "/token"}
    assert asked == {("registry", None), ("registry", f"Bearer {GOOD_TOKEN}"), ("cdn", None)}


def test_refused_token_fails_the_pull(origin: Origin, client: A2Client) -> None:
    """A token that does not open the repository ends in the real message."""
    publish(origin, private=True)
    origin.token = "anonymous"
    with pytest.raises(PullError, match="pull model manifest: unauthorized"):
        client.pull(MODEL)


def test_old_client_gets_412(origin: Origin, tmp_path: Path) -> None:
    """A tag can require a client version, judged by the User-Agent."""
    publish(origin, requires="0.30.0")
    with pytest.raises(PullError, match=r"412: \s*The model you are attempting to pull requires a newer version"):
        make_client(origin, tmp_path / "old", version="0.5.7").pull(MODEL)
    make_client(origin, tmp_path / "new").pull(MODEL)


def test_unknown_model_does_not_exist(client: A2Client) -> None:
    """A 404 for the manifest is the real client's message."""
    with pytest.raises(PullError, match=r"^pull model manifest: file does not exist$"):
        client.pull("nothing")


def test_model_names_have_defaults() -> None:
    """Host, namespace and tag may be left out."""
    assert ModelName.parse("tiny") == ModelName("https", REGISTRY_HOST, "library/tiny", "latest")
    assert ModelName.parse("me/tiny:1b") == ModelName("https", REGISTRY_HOST, "me/tiny", "1b")
    assert ModelName.parse("http://host:5000/me/tiny") == ModelName("http", "host:5000", "me/tiny", "latest")


# --- resume


def test_resume_after_abort_asks_only_for_the_rest(origin: Origin, tmp_path: Path) -> None:
    """An aborted pull leaves the real partial files; the next one skips HEAD and asks for what is missing."""
    digest = publish(origin)
    # A stalled first part keeps the pull from being over before the abort.
    stall = Fault(Mode.STALL, after=5_000)
    origin.faults.append(stall)
    client = make_client(origin, tmp_path / "client", abort_after=100_000)
    with pytest.raises(Aborted):
        client.pull(MODEL)

    name = client.blob_path(digest).name
    folder = client.blob_path(digest).parent
    assert (folder / f"{name}-partial").stat().st_size == WEIGHTS.size
    parts = [json.loads((folder / f"{name}-partial-{number}").read_text()) for number in range(17)]
    assert [(part["N"], part["Offset"], part["Size"]) for part in parts] == [
        (number, number * 12_500, min(12_500, WEIGHTS.size - number * 12_500)) for number in range(17)
    ]
    kept = sum(part["Completed"] for part in parts)
    assert 100_000 <= kept < WEIGHTS.size
    assert any(0 < part["Completed"] < part["Size"] for part in parts)

    stall.gate.open()
    origin.reset_counters()
    report = client.pull(MODEL)
    assert report.bytes == WEIGHTS.size - kept + len(CONFIG)
    assert origin.counters.registry_requests["HEAD", "blob"] == 1
    assert client.blob_path(digest).read_bytes() == WEIGHTS.read(0, WEIGHTS.size)


def test_abort_before_the_first_byte(origin: Origin, client: A2Client) -> None:
    """A client that waits for the registry can be aborted, and the origin notices that it left."""
    publish(origin)
    gate = origin.gate("/manifests/")
    errors: list[Exception] = []

    def pull() -> None:
        try:
            client.pull(MODEL)
        except Aborted as error:
            errors.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    gate.wait_held()
    client.abort()
    thread.join(10)
    gate.wait_empty()
    assert [str(error) for error in errors] == ["context canceled"]


# --- what the real client does not forgive


@pytest.mark.parametrize(
    ("fault", "version", "message"),
    [
        pytest.param({"mode": Mode.REDIRECT, "status": 302}, "current", "unexpected status code 302", id="302"),
        pytest.param({"mode": Mode.REDIRECT, "status": 308}, "current", "unexpected status code 308", id="308"),
        pytest.param({"mode": Mode.DIRECT}, "current", "http: no Location header in response", id="200-bare"),
        pytest.param(
            {"mode": Mode.REDIRECT, "status": 307, "headers": {"Location": ""}},
            "current",
            "http: no Location header in response",
            id="307-bare",
        ),
        pytest.param({"mode": Mode.DIRECT}, "0.3.9", "unexpected status code 200", id="200-before-0.3.10"),
    ],
)
def test_probe_answers_that_end_a_pull_at_once(
    origin: Origin, tmp_path: Path, fault: dict[str, Any], version: str, message: str
) -> None:
    """Any answer to the probe but 307 or 200, each with Location, is fatal without a retry."""
    publish(origin)
    origin.faults.append(Fault(**fault))
    with pytest.raises(PullError, match=f"^{message}$"):
        make_client(origin, tmp_path / "client", version=version).pull(MODEL)
    assert origin.counters.registry_requests["GET", "blob"] == 1


def test_200_with_location_sends_parts_there(origin: Origin, client: A2Client) -> None:
    """A 200 with a relative Location makes the parts go to the registry, still without credentials."""
    digest = publish(origin)
    where = f"/v2/library/tiny/blobs/{digest}"
    origin.faults.append(Fault(Mode.DIRECT, digest=digest, times=None, headers={"Location": where}))
    report = client.pull(MODEL)
    assert [urlsplit(e.url).path for e in report.requests if e.range].count(where) == 17
    assert origin.counters.registry_bytes >= WEIGHTS.size
    assert client.blob_path(digest).read_bytes() == WEIGHTS.read(0, WEIGHTS.size)


@pytest.mark.parametrize("status", [404, 503])
def test_probe_errors_are_retried_until_the_deadline(origin: Origin, tmp_path: Path, status: int) -> None:
    """A probe that never succeeds ends in the deadline, after several requests."""
    publish(origin)
    origin.faults.append(Fault(Mode.STATUS, where="registry", method="GET", path="/blobs/", status=status, times=None))
    with pytest.raises(PullError, match=r"^context deadline exceeded$"):
        make_client(origin, tmp_path / "client", probe_deadline_s=0.3).pull(MODEL)
    assert origin.counters.registry_requests["GET", "blob"] >= 2


def test_probe_survives_a_passing_error(origin: Origin, client: A2Client) -> None:
    """A probe is asked again after 5xx, a reset and a dropped connection."""
    publish(origin)
    for mode in (Mode.STATUS, Mode.DROP):
        origin.faults.append(Fault(mode, where="registry", method="GET", path="/blobs/"))
    client.pull(MODEL)
    assert origin.counters.registry_requests["GET", "blob"] == 4


def test_head_has_one_try(origin: Origin, client: A2Client) -> None:
    """HEAD is not retried."""
    publish(origin)
    origin.faults.append(Fault(Mode.STATUS, where="registry", method="HEAD", status=503))
    with pytest.raises(PullError, match=r"^503: "):
        client.pull(MODEL)


def test_head_without_length_is_an_empty_file(origin: Origin, client: A2Client) -> None:
    """A HEAD without Content-Length ends in the digest of nothing, and the file is deleted."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.NO_LENGTH, where="registry", method="HEAD"))
    with pytest.raises(DigestMismatch, match="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"):
        client.pull(MODEL)
    assert not client.blob_path(digest).exists()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"mode": Mode.FLIP, "after": 70_000}, id="flipped-byte"),
        pytest.param({"mode": Mode.IGNORE_RANGE, "times": 17}, id="200-to-a-range"),
        pytest.param({"mode": Mode.STATUS, "status": 500, "body": b"x" * 20_000}, id="long-error-page"),
    ],
)
def test_wrong_bytes_are_found_at_the_end(origin: Origin, client: A2Client, fault: dict[str, Any]) -> None:
    """Whatever body a part gets is written; the digest fails, the file goes, and the next pull succeeds."""
    digest = publish(origin)
    origin.faults.append(Fault(digest=digest, **fault))
    with pytest.raises(DigestMismatch, match=digest):
        client.pull(MODEL)
    assert not client.blob_path(digest).exists()
    client.pull(MODEL)


@pytest.mark.parametrize(
    ("fault", "second"),
    [
        pytest.param({"mode": Mode.TRUNCATE, "after": 7}, "bytes=7-15", id="fin-keeps"),
        pytest.param({"mode": Mode.RESET, "after": 7}, "bytes=0-15", id="rst-loses"),
        pytest.param({"mode": Mode.SHORT_LENGTH, "after": 7}, "bytes=0-15", id="short-but-complete-loses"),
        pytest.param({"mode": Mode.STATUS, "body": b"oops"}, "bytes=0-15", id="error-page-loses"),
        pytest.param({"mode": Mode.DROP}, "bytes=0-15", id="no-response"),
    ],
)
def test_early_ends_of_a_part(origin: Origin, client: A2Client, fault: dict[str, Any], second: str) -> None:
    """How a body ends decides where the next try starts."""
    digest = publish(origin, BLOB)
    origin.faults.append(Fault(digest=digest, **fault))
    report = client.pull(MODEL)
    assert part_ranges(client, digest) == ["bytes=0-15", second]
    assert (report.retries, report.stalls) == (1, 0)
    assert client.blob_path(digest).read_bytes() == BLOB


def test_six_failures_end_a_pull(origin: Origin, client: A2Client) -> None:
    """A part is tried six times; other parts keep what they had."""
    digest = publish(origin)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, times=None, status=403))
    with pytest.raises(MaxRetriesExceeded, match=r"^max retries exceeded: EOF$"):
        client.pull(MODEL)
    assert max(Counter(part_ranges(client, digest)).values()) == 6


@pytest.mark.parametrize(("after", "second"), [(0, "bytes=0-15"), (7, "bytes=7-15")], ids=["first-byte", "mid-body"])
def test_stalled_part_is_asked_again_uncounted(origin: Origin, tmp_path: Path, after: int, second: str) -> None:
    """After stall_s without a byte, the first one included, the part goes on from where it stopped."""
    digest = publish(origin, BLOB)
    origin.faults.append(Fault(Mode.STALL, digest=digest, after=after))
    client = make_client(origin, tmp_path / "client", stall_s=0.75)
    report = client.pull(MODEL)
    assert part_ranges(client, digest) == ["bytes=0-15", second]
    assert (report.retries, report.stalls) == (0, 1)


def test_gap_is_measured(origin: Origin, client: A2Client) -> None:
    """max_gap_s covers a pause before the first byte."""
    publish(origin, BLOB)
    gate = origin.gate("/data")

    def open_late() -> None:
        gate.wait_held()
        threading.Event().wait(0.3)
        gate.open()

    opener = threading.Thread(target=open_late)
    opener.start()
    report = client.pull(MODEL)
    opener.join()
    assert report.max_gap_s >= 0.3


def test_time_is_not_scaled_away(origin: Origin, tmp_path: Path) -> None:
    """The back-off of a part doubles, in units the test chooses."""
    digest = publish(origin, BLOB)
    origin.faults.append(Fault(Mode.STATUS, digest=digest, times=3, body=b"oops"))
    started = time.monotonic()
    make_client(origin, tmp_path / "client", backoff_unit_s=0.02).pull(MODEL)
    assert time.monotonic() - started >= 0.02 * (1 + 2 + 4)


# --- the origin on the wire


@dataclass(frozen=True)
class Wire:
    """What a client saw of a response to `Range: bytes=2-9`."""

    status: int
    body: bytes
    ended: str | None = "complete"
    content_length: int | None = 8
    content_range: str | None = "bytes 2-9/16"


def see(origin: Origin, digest: str) -> tuple[Wire, dict[str, str]]:
    """Ask for bytes 2 to 9."""
    with open_cdn(origin) as connection:
        response = connection.request("GET", target(origin.signed_url(digest)), [("Range", "bytes=2-9")])
        body = response.read()
        headers = {name.lower(): value for name, value in response.headers}
        return (
            Wire(response.status, body, response.ended, response.content_length, headers.get("content-range")),
            headers,
        )


PART = BLOB[2:10]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param({"mode": Mode.RESET, "after": 3}, Wire(206, PART[:3], "rst"), id="reset"),
        pytest.param({"mode": Mode.RESET, "after": 0}, Wire(206, b"", "rst"), id="reset-at-once"),
        pytest.param({"mode": Mode.TRUNCATE, "after": 3}, Wire(206, PART[:3], "fin"), id="truncate"),
        pytest.param({"mode": Mode.FLIP, "after": 4}, Wire(206, b"23556789"), id="flip"),
        pytest.param({"mode": Mode.SHORT_LENGTH, "after": 5}, Wire(206, PART[:5], content_length=5), id="short-length"),
        pytest.param({"mode": Mode.CONTENT_RANGE}, Wire(206, PART, content_range="bytes 3-10/17"), id="content-range"),
        pytest.param(
            {"mode": Mode.CONTENT_RANGE, "value": "bytes 2-9/*"},
            Wire(206, PART, content_range="bytes 2-9/*"),
            id="content-range-text",
        ),
        pytest.param(
            {"mode": Mode.IGNORE_RANGE},
            Wire(200, BLOB, content_length=16, content_range=None),
            id="ignore-range",
        ),
        pytest.param({"mode": Mode.NO_LENGTH}, Wire(206, PART, content_length=None), id="no-length"),
        pytest.param(
            {"mode": Mode.STATUS, "status": 429, "body": b"slow", "headers": {"Retry-After": "7"}},
            Wire(429, b"slow", content_length=4, content_range=None),
            id="status",
        ),
        pytest.param({"mode": Mode.RESET, "after": 8}, Wire(206, PART), id="reset-beyond-the-body"),
        pytest.param({"mode": Mode.RESET, "where": "registry"}, Wire(206, PART), id="other-listener"),
        pytest.param({"mode": Mode.RESET, "digest": "ff" * 32}, Wire(206, PART), id="other-digest"),
    ],
)
def test_fault_is_what_it_says(origin: Origin, fault: dict[str, Any], expected: Wire) -> None:
    """Each fault changes one thing, once; the answer after it is right again."""
    digest = origin.add_blob(BLOB)
    origin.faults.append(Fault(**fault))
    happens = expected != Wire(206, PART)
    seen, headers = see(origin, digest)
    assert seen == expected
    assert headers.get("retry-after") == (fault.get("headers") or {}).get("Retry-After")
    assert see(origin, digest)[0] == Wire(206, PART)
    assert origin.faults[0].hits == happens


def test_fault_changes_the_validator(origin: Origin) -> None:
    """The entity tag is stable but for the fault, and If-Match and If-Range compare with it."""
    digest = origin.add_blob(BLOB)
    tag = see(origin, digest)[1]["etag"]
    origin.faults.append(Fault(Mode.ETAG))
    assert see(origin, digest)[1]["etag"] != tag
    assert see(origin, digest)[1]["etag"] == tag
    with open_cdn(origin) as connection:
        for condition, value, status in [
            ("If-Match", tag, 206),
            ("If-Match", '"other"', 412),
            ("If-Range", tag, 206),
            ("If-Range", '"other"', 200),
        ]:
            fields = [("Range", "bytes=2-9"), (condition, value)]
            response = connection.request("GET", target(origin.signed_url(digest)), fields)
            response.read()
            assert response.status == status


def test_fault_encodes_a_blob(origin: Origin) -> None:
    """A gzip fault encodes the range, although nobody asked."""
    digest = origin.add_blob(BLOB)
    origin.faults.append(Fault(Mode.GZIP))
    wire, headers = see(origin, digest)
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(wire.body) == PART


def test_fault_drops_a_request(origin: Origin) -> None:
    """A dropped request gets a reset and no byte."""
    digest = origin.add_blob(BLOB)
    origin.faults.append(Fault(Mode.DROP))
    with pytest.raises(ClosedBeforeResponse, match="rst"):
        see(origin, digest)


def test_faults_budget(origin: Origin) -> None:
    """A fault happens `times` times, or for ever."""
    digest = origin.add_blob(BLOB)
    twice, ever = Fault(Mode.STATUS, times=2, status=500), Fault(Mode.STATUS, times=None, status=429)
    origin.faults += [twice, ever]
    assert [see(origin, digest)[0].status for _ in range(5)] == [500, 500, 429, 429, 429]
    assert (twice.hits, ever.hits) == (2, 3)


@pytest.mark.parametrize("mode", [Mode.STALL, Mode.HANG])
def test_fault_waits_for_its_gate(origin: Origin, mode: Mode) -> None:
    """A stall sends `after` bytes, a hang nothing, until the test opens the gate."""
    digest = origin.add_blob(BLOB)
    fault = Fault(mode, after=3)
    origin.faults.append(fault)
    with open_cdn(origin) as connection:
        address = target(origin.signed_url(digest))
        connection.send(f"GET {address} HTTP/1.1\r\nHost: {R2_HOST}\r\nRange: bytes=2-9\r\n\r\n".encode())
        fault.gate.wait_held()
        assert origin.counters.cdn_bytes == (3 if mode is Mode.STALL else 0)
        fault.gate.open()
        origin.counters.wait_for(lambda counters: counters.cdn_bytes == 8)
        fault.gate.wait_empty()


def test_expired_signatures(origin: Origin) -> None:
    """Addresses given out before get 403, later ones work; unsigned, foreign and HEAD requests get 403."""
    digest, other = origin.add_blob(BLOB), origin.add_blob(b"other")
    old = target(origin.signed_url(digest))
    origin.expire_signatures()
    new = target(origin.signed_url(digest))
    foreign = f"{urlsplit(old).path}?{urlsplit(origin.signed_url(other)).query}"
    with open_cdn(origin) as connection:
        asked = [("GET", old), ("GET", new), ("GET", foreign), ("GET", urlsplit(new).path), ("HEAD", new)]
        seen: list[tuple[int, bytes]] = []
        for method, address in asked:
            response = connection.request(method, address)
            seen.append((response.status, response.read()))
    assert [status for status, _body in seen] == [403, 200, 403, 403, 403]
    assert b"Request has expired" in seen[0][1]


def spoilt(url: str) -> dict[str, str]:
    """Addresses that differ from a good one in what is signed, however little."""
    return {
        "more": f"{url}&x-id=GetObject",
        "before": url.replace("?", "?x-id=GetObject&"),
        "decoded": url.replace("%2F", "/"),
        "lower-case": url.replace("%2F", "%2f"),
        "longer": url.replace("X-Amz-Expires=86400", "X-Amz-Expires=604800"),
        "moved": url.replace("X-Amz-Algorithm=AWS4-HMAC-SHA256&", "") + "&X-Amz-Algorithm=AWS4-HMAC-SHA256",
        "other-path": url.replace("/data?", "//data?"),
    }


@pytest.mark.parametrize("change", spoilt(""))
def test_signature_is_for_the_address_byte_for_byte(origin: Origin, change: str) -> None:
    """What is added, left out or encoded anew is refused as S3 refuses it; what was given out is not."""
    url = origin.signed_url(origin.add_blob(BLOB))
    with open_cdn(origin) as connection:
        response = connection.request("GET", target(spoilt(url)[change]))
        assert (response.status, response.header("Content-Type")) == (403, "application/xml")
        assert b"<Error><Code>SignatureDoesNotMatch</Code>" in response.read()
        assert connection.request("GET", target(url)).read() == BLOB


def test_signature_is_for_the_host(origin: Origin) -> None:
    """Host is the one header that is signed."""
    url = origin.signed_url(origin.add_blob(BLOB))
    with open_cdn(origin) as connection:
        response = connection.request("GET", target(url), [("Host", "elsewhere")])
        assert response.status == 403
        assert b"SignatureDoesNotMatch" in response.read()


def test_signed_addresses_have_the_shape_of_sigv4(origin: Origin) -> None:
    """Six parameters in R2's order, the scope with its slashes encoded."""
    origin.clock_skew_s = -time.time() + 1_700_000_000.5
    url = origin.signed_url(digest := origin.add_blob(BLOB))
    hexadecimal = digest.removeprefix("sha256:")
    before, _, signature = url.rpartition("=")
    assert before == (
        f"https://{R2_HOST}/ollama/docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"
        "?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=66040c77ac1b787c3af820529859349a%2F20231114%2Fauto%2Fs3%2Faws4_request"
        "&X-Amz-Date=20231114T221320Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature"
    )
    assert len(bytes.fromhex(signature)) == 32


def test_signed_addresses_expire(origin: Origin) -> None:
    """An address is good for its lifetime by the origin's clock, which a test can move."""
    digest = origin.add_blob(BLOB)
    day = target(origin.signed_url(digest))
    origin.url_lifetime_s = 600
    short = target(origin.signed_url(digest))
    statuses = []
    with open_cdn(origin) as connection:
        for skew in (590.0, 610.0, 86_390.0, 86_410.0):
            origin.clock_skew_s = skew
            for address in (short, day):
                response = connection.request("GET", address)
                response.read()
                statuses.append(response.status)
    assert statuses == [200, 200, 403, 200, 403, 200, 403, 403]


@pytest.mark.parametrize(
    ("value", "status", "content_range", "body"),
    [
        ("bytes=0-0", 206, "bytes 0-0/16", BLOB[:1]),
        ("bytes=5-", 206, "bytes 5-15/16", BLOB[5:]),
        ("bytes=-3", 206, "bytes 13-15/16", BLOB[13:]),
        ("bytes=10-99", 206, "bytes 10-15/16", BLOB[10:]),
        ("bytes=16-", 416, "bytes */16", None),
        ("bytes=0-1,3-4", 200, None, BLOB),
        ("bytes=4-2", 200, None, BLOB),
    ],
)
def test_ranges(origin: Origin, value: str, status: int, content_range: str | None, body: bytes | None) -> None:
    """A single range as RFC 9110 section 14 says."""
    digest = origin.add_blob(BLOB)
    with open_cdn(origin) as connection:
        response = connection.request("GET", target(origin.signed_url(digest)), [("Range", value)])
        content = response.read()
    assert (response.status, response.header("Content-Range")) == (status, content_range)
    assert body is None or content == body


def test_registry_manifests(origin: Origin) -> None:
    """GET is chunked text/plain without digest headers, HEAD has the bare digest."""
    publish(origin, BLOB)
    with open_registry(origin) as connection:
        got = connection.request("GET", "/v2/library/tiny/manifests/latest")
        manifest = got.read()
        assert (got.status, got.header("Content-Type"), got.content_length) == (200, "text/plain", None)
        assert got.header("ollama-content-digest") is None
        head = connection.request("HEAD", "/v2/library/tiny/manifests/latest")
        assert head.header("ollama-content-digest") == hashlib.sha256(manifest).hexdigest()
        missing = connection.request("GET", "/v2/library/tiny/manifests/none")
        assert json.loads(missing.read())["errors"][0]["code"] == "MANIFEST_UNKNOWN"
        unknown = connection.request("GET", "/v2/_catalog")
        assert (unknown.status, unknown.read()) == (404, b"404 page not found\n")


@pytest.mark.parametrize(
    ("accept", "is_list"),
    [
        (f"{LIST_TYPE}, {MANIFEST_TYPE}", True),
        (f"{MANIFEST_TYPE};q=0.5 ,{LIST_TYPE};q=0.1", True),
        (MANIFEST_TYPE, False),
        ("*/*", False),
        (None, False),
    ],
)
def test_registry_negotiates_lists(origin: Origin, accept: str | None, is_list: bool) -> None:
    """Who names the list type gets the list, all others a plain manifest; HEAD tells of the same."""
    layer = (MODEL_TYPE, origin.add_blob(BLOB))
    config = origin.add_blob(CONFIG)
    children = [origin.manifest_of([layer], config, runner=runner, format="gguf") for runner in ("ggml", "llamacpp")]
    listed = origin.put_list("library/tiny", "latest", children, plain=children[1])
    expected = listed if is_list else children[1]
    fields = [("Accept", accept)] if accept else []
    with open_registry(origin) as connection:
        got = connection.request("GET", "/v2/library/tiny/manifests/latest", fields)
        assert (got.read(), got.header("Vary")) == (expected, "Accept")
        assert got.header("Content-Type") == (LIST_TYPE if is_list else "text/plain")
        head = connection.request("HEAD", "/v2/library/tiny/manifests/latest", fields)
        assert head.header("Content-Type") == (LIST_TYPE if is_list else "text/plain; charset=utf-8")
        assert (head.content_length, head.header("Vary")) == (len(expected), "Accept")
        assert head.header("ollama-content-digest") == hashlib.sha256(expected).hexdigest()
        for child in (*children, BLOB):
            assert connection.request("HEAD", f"/v2/library/tiny/blobs/{origin.add_blob(child)}").status == 200
    assert origin.counters.manifest_requests == {("GET", is_list): 1, ("HEAD", is_list): 1}
    entries = json.loads(listed)["manifests"]
    assert [(entry["runner"], entry["digest"]) for entry in entries] == [
        (runner, origin.add_blob(child)) for runner, child in zip(("ggml", "llamacpp"), children, strict=True)
    ]
    assert not any("size" in entry for entry in entries)


def test_tag_moves_to_a_list_and_back(origin: Origin) -> None:
    """The last publication counts."""
    publish(origin, BLOB)
    fields = [("Accept", LIST_TYPE)]
    with open_registry(origin) as connection:

        def kind() -> str | None:
            response = connection.request("GET", "/v2/library/tiny/manifests/latest", fields)
            response.read()
            return response.header("Content-Type")

        assert kind() == "text/plain"
        child = origin.manifest_of([], origin.add_blob(CONFIG), runner="ggml")
        origin.put_list("library/tiny", "latest", [child])
        assert kind() == LIST_TYPE
        publish(origin, BLOB)
        assert kind() == "text/plain"


def test_registry_has_two_names(origin: Origin, tmp_path: Path) -> None:
    """registry.ollama.com has the same models, and its own name in a challenge."""
    publish(origin, private=True)
    client = make_client(origin, tmp_path / "client")
    client.pull(f"{REGISTRY_COM}/library/tiny")
    hosts = {request.headers["host"] for request in origin.counters.requests if request.listener == "registry"}
    assert hosts == {REGISTRY_COM}
    assert len(origin.counters.tokens) == 1


def test_registry_can_be_in_trouble_alone(origin: Origin) -> None:
    """Too many requests for blobs, a probe that hangs once, no registry at all: R2 does not care."""
    digest = publish(origin, BLOB)
    blob, manifest = f"/v2/library/tiny/blobs/{digest}", "/v2/library/tiny/manifests/latest"
    busy = Fault(Mode.STATUS, where="registry", path="/blobs/", method="GET", status=429, headers={"Retry-After": "7"})
    hang = Fault(Mode.HANG, where="registry", digest=digest, method="GET")
    origin.faults += [busy, hang]
    with open_registry(origin) as connection:

        def open_when_held() -> None:
            hang.gate.wait_held()
            hang.gate.open()

        opener = threading.Thread(target=open_when_held)
        opener.start()
        response = connection.request("GET", blob)
        opener.join()
        assert (response.status, response.header("Retry-After"), hang.hits) == (429, "7", 1)
        response.read()
        response = connection.request("GET", blob)
        assert response.status == 307
        origin.faults.append(Fault(Mode.DROP, where="registry", times=None))
        with pytest.raises(ClosedBeforeResponse):
            connection.request("GET", manifest)
    with open_cdn(origin) as connection:
        assert connection.request("GET", target(response.header("Location") or "")).read() == BLOB


def test_registry_scopes_blobs_by_repository(origin: Origin) -> None:
    """A digest that another repository lists is unknown here."""
    digest = publish(origin, BLOB)
    with open_registry(origin) as connection:
        statuses = [
            connection.request("HEAD", f"/v2/library/{name}/blobs/{digest}").status for name in ("tiny", "other")
        ]
    assert statuses == [200, 404]


def test_uploads_are_counted(origin: Origin) -> None:
    """The upload endpoints take a blob in pieces and remember what came."""
    with open_registry(origin) as connection:
        opened = connection.request("POST", "/v2/me/new/blobs/uploads/", [("Content-Length", "0")])
        session = urlsplit(opened.header("Location") or "").path
        fields = [("Content-Length", "12"), ("Content-Range", "0-11"), ("X-Redirect-Uploads", "1")]
        patched = connection.request("PATCH", session, fields, iter([b"hello ", b"world!"]))
        put = connection.request("PUT", f"{session}?digest=sha256:00", [("Transfer-Encoding", "chunked")], b"0\r\n\r\n")
    assert (opened.status, patched.status, put.status) == (202, 202, 201)
    assert origin.counters.upload_bytes == 12
    assert origin.counters.uploads[1].sha256 == hashlib.sha256(b"hello world!").hexdigest()
    assert origin.counters.uploads[1].request.headers["content-range"] == "0-11"
    assert [upload.size for upload in origin.counters.uploads] == [0, 12, 0]


def test_gate_holds_matching_requests(origin: Origin) -> None:
    """A gate holds requests after counting them; one whose client leaves is forgotten."""
    digest = origin.add_blob(BLOB)
    gate = origin.gate("/data")
    line = f"GET {target(origin.signed_url(digest))} HTTP/1.1\r\nHost: {R2_HOST}\r\n\r\n".encode()
    with open_cdn(origin) as staying:
        with open_cdn(origin) as leaving:
            staying.send(line)
            leaving.send(line)
            gate.wait_held(2)
            assert (origin.counters.cdn_requests, origin.counters.cdn_bytes) == (2, 0)
        origin.counters.wait_for(lambda counters: counters.cdn_connections_open == 1)
        assert gate.held == 1
        gate.open()
        origin.counters.wait_for(lambda counters: counters.cdn_bytes == len(BLOB))


def test_stopped_origin_refuses_connections(origin: Origin, client: A2Client) -> None:
    """A stopped origin ends its connections, refuses new ones and comes back on the same ports."""
    publish(origin)
    ports = (origin.registry_port, origin.cdn_port)
    connection = open_cdn(origin)
    origin.stop()
    with pytest.raises(ClosedBeforeResponse):
        connection.request("GET", "/")
    connection.close()
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    origin.start()
    client.pull(MODEL)
    assert (origin.registry_port, origin.cdn_port) == ports


@pytest.mark.parametrize(
    ("limit", "parts", "floor_s"),
    [("rate_per_connection", 1, 0.4), ("rate_per_connection", 4, 0.07), ("rate_total", 4, 0.4)],
)
def test_rate_limit(origin: Origin, tmp_path: Path, limit: str, parts: int, floor_s: float) -> None:
    """200 000 bytes at 400 000 a second take half a second, less the credit, on one connection or on all together."""
    digest = publish(origin, Synthetic(200_000))
    setattr(origin, limit, 400_000)
    client = make_client(origin, tmp_path / "client", min_part=200_000 // parts, max_part=200_000)
    report = client.pull(MODEL)
    assert len(part_ranges(client, digest)) == parts
    assert report.seconds >= floor_s


def test_unread_body_is_not_counted(origin: Origin) -> None:
    """Backpressure reaches the origin: of a body nobody reads only some socket buffers full are written."""
    digest = origin.add_blob(Sparse(64 << 20))
    with open_cdn(origin) as connection:
        connection.request("GET", target(origin.signed_url(digest)))
        origin.counters.wait_for(lambda counters: counters.cdn_bytes > 0)
    origin.counters.wait_for(lambda counters: counters.cdn_connections_open == 0)
    assert origin.counters.cdn_bytes < 32 << 20


# --- http1


def test_only_the_given_ca_is_trusted(origin: Origin, tmp_path: Path) -> None:
    """Another CA, and a name that the certificate lacks, fail verification."""
    with Origin(tmp_path / "other") as other, pytest.raises(ssl.SSLCertVerificationError):
        connect(None, REGISTRY_HOST, 443, other.ca_file, resolve=origin.resolve)
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(None, REGISTRY_HOST, 443, origin.ca_file, resolve=origin.resolve, server_hostname="ollama.com")


def test_alpn_and_close_notify_are_visible(origin: Origin) -> None:
    """The client says what was selected, and whether TLS was ended properly."""
    with open_cdn(origin) as connection:
        assert connection.alpn == "http/1.1"
        response = connection.request("GET", "/", [("Connection", "close")])
        response.read()
        with pytest.raises(ClosedBeforeResponse):
            connection.request("GET", "/")
        assert connection.close_notify
    with connect(None, R2_HOST, 443, origin.ca_file, resolve=origin.resolve, alpn=()) as connection:
        assert connection.alpn is None


@pytest.fixture
def answer() -> Iterator[Callable[[bytes], Connection]]:
    """A connection whose peer has already sent these bytes and closed."""
    sockets: list[socket.socket] = []

    def prepare(data: bytes) -> Connection:
        ours, theirs = socket.socketpair()
        sockets.extend((ours, theirs))
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        return Connection(ours, authority="host")

    yield prepare
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("data", "body", "ended"),
    [
        pytest.param(b"Content-Length: 3\r\n\r\nabc", b"abc", "complete", id="length"),
        pytest.param(b"Content-Length: 4\r\n\r\nabc", b"abc", "fin", id="cut-length"),
        pytest.param(b"\r\nabc", b"abc", "complete", id="until-close"),
        pytest.param(
            b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: u\r\n\r\n",
            b"abc",
            "complete",
            id="chunked",
        ),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"abc", "fin", id="no-last-chunk"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n4\r\nabc", b"abc", "fin", id="cut-chunk"),
    ],
)
def test_bodies(answer: Callable[[bytes], Connection], data: bytes, body: bytes, ended: str) -> None:
    """Every framing of RFC 9112 section 6, whole and cut."""
    response = answer(b"HTTP/1.1 200 OK\r\n" + data).request("GET", "/")
    assert (response.read(), response.ended) == (body, ended)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\n", id="old-version"),
        pytest.param(b"HTTP/1.1 200\r\n\r\n", id="no-space-after-status"),
        pytest.param(b"HTTP/1.1 200 OK\n\n", id="bare-lf"),
        pytest.param(b"HTTP/1.1 200 OK\r\nName : value\r\n\r\n", id="space-before-colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", id="folded"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", id="two-lengths"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n", id="signed-length"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            id="length-and-chunked",
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\r\n", id="cut-head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n", id="odd-chunk-size"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", id="overlong-chunk"),
    ],
)
def test_malformed_responses_are_refused(answer: Callable[[bytes], Connection], data: bytes) -> None:
    """Nothing that RFC 9112 forbids is repaired."""
    with pytest.raises(ProtocolError, match=r"^expected "):
        answer(data).request("GET", "/").read()


def test_bytes_after_a_response_are_refused(answer: Callable[[bytes], Connection]) -> None:
    """A body longer than its Content-Length spoils the connection."""
    connection = answer(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab")
    assert connection.request("GET", "/").read() == b"a"
    assert not connection.is_reusable
    with pytest.raises(ProtocolError, match="between two responses"):
        connection.request("GET", "/")
