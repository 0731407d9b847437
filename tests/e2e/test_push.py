"""What is not ours to answer passes through as it is: pushes of both kinds, tokens, challenges."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.conftest import Model, add_model, get, to_cdn, to_registry, unique
from tests.support.http1 import Connection
from tests.support.origin import GOOD_TOKEN, R2_HOST, REGISTRY_HOST, Fault, Mode, Origin, Request, Sparse
from tests.support.proxy import PeakRss, Proxy

MIB = 1 << 20
UPLOADS = "/v2/owner/pushed/blobs/uploads/"
OLLAMA = "ollama/0.34.3 (amd64 linux) Go/go1.26.0"
TRANSFER = "ollama-transfer/1.0"
TOKEN = f"Bearer {GOOD_TOKEN}"
Fields = list[tuple[str, str]]


def target_of(address: str) -> str:
    """The request target of an address, which has to be of one of the two hosts."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    assert (scheme, host in (REGISTRY_HOST, R2_HOST)) == ("https", True), address
    return slash + path


def own_fields(request: Request) -> Fields:
    """Its fields without Host, which is where the option `upstream` says that the registry is, and without CDN-Loop,
    which every cache adds as the last one (RFC 8586)."""
    (name, value), *others, (last, _) = request.fields
    assert (name, value.partition(":")[0], last) == ("Host", "localhost", "CDN-Loop")
    return others


def last(origin: Origin) -> Request:
    """The request that came last."""
    return origin.counters.requests[-1]


def send(connection: Connection, method: str, target: str, fields: Fields, body: bytes = b"") -> dict[str, str]:
    """One request; the answer's fields by lower-case name, and its status."""
    response = connection.request(method, target, fields, body=body)
    response.read()
    return {":status": str(response.status)} | {name.lower(): value for name, value in response.headers}


def zeros(mib: int) -> Iterator[bytes]:
    """A body made on the way."""
    piece = bytes(MIB)
    return (piece for _ in range(mib))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", f"{UPLOADS}?mount=sha256:{'ab' * 32}&from=library%2Fbase"),
        ("PATCH", f"{UPLOADS}d3b0?_state=a%2Bb=="),
        ("PUT", f"{UPLOADS}d3b0?digest=sha256%3A{'ab' * 32}&etag=0123-16"),
        ("DELETE", f"{UPLOADS}d3b0"),
        ("PUT", "/v2/owner/pushed/manifests/latest"),
        ("DELETE", f"/v2/owner/pushed/manifests/sha256:{'ab' * 32}"),
    ],
)
def test_a_request_arrives_as_it_was_sent(origin: Origin, proxy: Proxy, method: str, target: str) -> None:
    """Method, target and body byte for byte; the fields with their case, order, repetition and emptiness."""
    fields = [
        ("Host", REGISTRY_HOST),
        ("User-Agent", OLLAMA),
        ("content-LENGTH", "10"),
        ("X-Redirect-Uploads", "1"),
        ("Content-Range", "100000000-100000009"),
        ("x-odd", "  two  words "),
        ("X-Odd", ""),
        ("Authorization", TOKEN),
        ("Accept-Encoding", "gzip"),
    ]
    with to_registry(proxy) as connection:
        connection.request(method, target, fields, body=b"0123456789").read()
    request = last(origin)
    assert (request.method, request.target) == (method, target)
    assert own_fields(request) == [(name, value.strip()) for name, value in fields[1:]]
    if "uploads" in target:
        assert origin.counters.uploads[-1].sha256 == hashlib.sha256(b"0123456789").hexdigest()


def test_a_chunked_upload_stays_chunked(origin: Origin, proxy: Proxy) -> None:
    """A body of unknown length is passed on as it comes: its first part is there before the last is sent."""
    with to_registry(proxy) as connection:
        connection.send(
            f"PATCH {UPLOADS}1 HTTP/1.1\r\nHost: {REGISTRY_HOST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        connection.send(b"5\r\nhello\r\n")
        origin.counters.wait_for(lambda counters: counters.upload_bytes == 5)
        connection.send(b"6;odd=1\r\n world\r\n0\r\n\r\n")
        response = connection._respond("PATCH")
        assert response.status == 202
        response.read()
    (upload,) = origin.counters.uploads
    assert upload.request.headers["transfer-encoding"] == "chunked"
    assert upload.sha256 == hashlib.sha256(b"hello world").hexdigest()


def test_a_redirect_while_the_body_flows(origin: Origin, proxy: Proxy) -> None:
    """A part's early 307 comes at once, its signed address untouched; the bytes go there, without the credential."""
    origin.redirects_uploads = True
    length = ("Content-Length", str(4 * MIB))
    with to_registry(proxy) as connection:
        fields = [("Host", REGISTRY_HOST), ("Authorization", TOKEN), length, ("X-Redirect-Uploads", "1")]
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        connection.send(f"PATCH {UPLOADS}1 HTTP/1.1\r\n{head}\r\n".encode() + bytes(MIB))
        # The rest is not sent before the answer is here.
        response = connection._respond("PATCH")
        address, session = response.header("Location"), response.header("Docker-Upload-Location")
        response.read()
        assert (response.status, session) == (307, f"https://{REGISTRY_HOST}{UPLOADS}1")
    assert address is not None
    signature = origin.signatures[-1]
    assert address.endswith(signature)
    with to_cdn(proxy) as connection:
        answer = send(connection, "PUT", target_of(address), [("User-Agent", OLLAMA), length], bytes(4 * MIB))
    assert answer[":status"] == "200"
    upload = origin.counters.uploads[-1]
    assert (upload.request.listener, upload.size) == ("cdn", 4 * MIB)
    assert upload.request.target == target_of(address)
    assert "authorization" not in upload.request.headers


def test_a_push_of_tensors(origin: Origin, proxy: Proxy) -> None:
    """x/transfer: asked for, opened with a direct address, sent there with the signed fields, and finished."""
    origin.redirects_uploads = True
    data = unique(MIB).read(0, MIB)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    own = [("User-Agent", TRANSFER), ("Authorization", TOKEN)]
    with to_registry(proxy) as registry, to_cdn(proxy) as cdn:
        assert send(registry, "HEAD", f"/v2/owner/pushed/blobs/{digest}", own)[":status"] == "404"
        opening = [("X-Redirect-Uploads", "2"), ("X-Content-Length", str(MIB)), ("Content-Length", "0")]
        opened = send(registry, "POST", f"{UPLOADS}?digest={digest}", own + opening)
        assert (opened[":status"], opened["x-signed-header-x-amz-checksum-sha256"]) == ("202", digest)
        direct = [("User-Agent", TRANSFER), ("X-Amz-Checksum-Sha256", digest), ("Content-Length", str(MIB))]
        assert send(cdn, "PUT", target_of(opened["x-direct-upload-url"]), direct, data)[":status"] == "200"
        finish = f"{target_of(opened['location'])}?digest={digest}"
        assert send(registry, "PUT", finish, [*own, ("Content-Length", "0")])[":status"] == "201"
    (sent,) = [upload for upload in origin.counters.uploads if upload.request.listener == "cdn"]
    assert f"sha256:{sent.sha256}" == sent.request.headers["x-amz-checksum-sha256"] == digest
    assert not list(proxy.store.glob(f"*/{digest.replace(':', '-')}*"))


@pytest.mark.parametrize(
    "fields", [{"Authorization": TOKEN}, {"User_Agent": TRANSFER}], ids=["with a token", "of x/transfer"]
)
def test_what_a_push_asks_before_is_asked_upstream(origin: Origin, proxy: Proxy, fields: dict[str, str]) -> None:
    """A blob that is known here may be gone there: then the upload must not be skipped."""
    model = add_model(origin, unique(10))
    with to_registry(proxy) as connection:
        get(connection, model.manifest_target)
        assert get(connection, model.blob_target)[0] == 307
        proxy.wait_for_line(model.recorded)
        origin.faults.append(Fault(Mode.STATUS, where="registry", method="HEAD", status=404, times=None))
        own = [(name.replace("_", "-"), value) for name, value in fields.items()]
        assert send(connection, "HEAD", model.blob_target, own)[":status"] == "404"
        assert send(connection, "HEAD", model.blob_target, [("User-Agent", OLLAMA)])[":status"] == "200"


def test_tokens_pass_through(origin: Origin, proxy: Proxy) -> None:
    """The signed request arrives byte for byte, the answer comes back so, and none is kept."""
    signed = "/token?nonce=a-_b&scope=repository%3Ax%2Fy%3Apull&scope=b&service=registry&ts=1790000000"
    fields = [("Host", REGISTRY_HOST), ("User-Agent", OLLAMA), ("Authorization", "AAAA+/=:BBBB+/="), ("Accept", "*/*")]
    with to_registry(proxy) as connection:
        for number in range(2):
            origin.token = f"token-{number}"
            response = connection.request("GET", signed, fields)
            body = response.read()
            assert (response.status, response.header("Content-Type")) == (200, "application/json")
            assert body == json.dumps({"token": origin.token}).encode()
            assert response.header("Content-Length") == str(len(body))
            assert response.header("Cache-Status") is None
    origin.token = GOOD_TOKEN
    assert [(request.target, own_fields(request)) for request in origin.counters.tokens] == [(signed, fields[1:])] * 2


def test_challenges_are_kept(origin: Origin, proxy: Proxy) -> None:
    """WWW-Authenticate comes as upstream wrote it, on what is answered here and on what is passed through."""
    challenge = f'Bearer realm="https://{REGISTRY_HOST}/token", service="registry",scope="repository:a/b:pull,push x"'
    model: Model = add_model(origin, unique(10))
    blobs = f"/v2/{model.repository}/blobs"
    asked = [
        ("GET", model.manifest_target),
        ("HEAD", model.manifest_target),
        ("GET", model.blob_target),
        ("HEAD", model.blob_target),
        ("GET", f"/v2/{model.repository}/chunksums/{model.layer}"),
        ("POST", f"{blobs}/uploads/"),
        ("GET", "/v2/"),
    ]
    origin.faults.append(
        Fault(Mode.STATUS, where="registry", status=401, times=None, headers={"WWW-Authenticate": challenge})
    )
    with to_registry(proxy) as connection:
        for method, target in asked:
            answer = send(connection, method, target, [("Content-Length", "0")] if method == "POST" else [])
            assert (answer[":status"], answer.get("www-authenticate")) == ("401", challenge), (method, target)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_gigabytes_flow_through(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """A layer of 2 GiB beside a chunked one of 256 MiB: whole, and a few pieces of each in memory."""
    proxy = start_proxy()
    sizes = [2048, 256]
    with to_registry(proxy) as warm_up:
        send(warm_up, "PATCH", f"{UPLOADS}0", [("Content-Length", "4")], b"warm")

    def chunked() -> Iterator[bytes]:
        for piece in zeros(sizes[1]):
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
        yield b"0\r\n\r\n"

    def push(number: int, fields: Fields, body: Iterator[bytes]) -> None:
        with to_registry(proxy) as connection:
            statuses.append(connection.request("PATCH", f"{UPLOADS}{number}", fields, body=body).status)

    statuses: list[int] = []
    with PeakRss(proxy) as rss:
        pushes = [
            threading.Thread(target=push, args=(1, [("Content-Length", str(sizes[0] * MIB))], zeros(sizes[0]))),
            threading.Thread(target=push, args=(2, [("Transfer-Encoding", "chunked")], chunked())),
        ]
        for each in pushes:
            each.start()
        for each in pushes:
            each.join()
    assert statuses == [202, 202]
    sent = {(upload.size, upload.sha256) for upload in origin.counters.uploads if upload.size > 4}
    assert sent == {(mib * MIB, Sparse(mib * MIB).sha256()) for mib in sizes}
    print(f"peak {rss.mib:.0f} MiB, growth {rss.growth_mib:.0f} MiB")
    assert rss.growth_mib < 40
