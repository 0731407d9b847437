"""What a client may get, request by request: exact ranges, true sizes, relayed refusals, and nothing by guessing."""

import hashlib
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pullthrough.core.ranges import ByteRange, Unsatisfiable, parse_range
from tests.e2e.conftest import MB, add_model, canonical, get, to_cdn, to_registry, unique
from tests.support.http1 import connect
from tests.support.origin import R2_HOST, Fault, Mode, Origin
from tests.support.proxy import Proxy
from tests.support.storefiles import blob_file


def test_head_never_has_a_body(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Nor has an error or a refusal: what came behind the head would be taken for the next response."""
    proxy = start_proxy()
    model = add_model(origin, unique(1000))
    origin.stop()
    with to_registry(proxy) as connection:
        for target in (model.manifest_target, model.blob_target, f"/v2/{model.repository}/manifests/other") * 2:
            assert connection.request("HEAD", target, []).status >= 500
    with to_registry(proxy) as connection:
        for _ in range(2):
            assert connection.request("HEAD", model.manifest_target, [("Host", "other.example")]).status == 421


def test_manifest_is_byte_exact(origin: Origin, proxy: Proxy) -> None:
    """GET, HEAD, first and later: upstream's bytes and type; HEAD tells length and digest."""
    model = add_model(origin, unique(10))
    manifest, target = model.manifest, model.manifest_target
    with to_registry(proxy) as connection:
        status, first, body = get(connection, target)
        assert (status, first["content-type"]) == (200, "text/plain")
        assert body == manifest
        assert first["cache-status"] == "ollama-cache; fwd=miss; fwd-status=200; stored"
        status, second, again = get(connection, target)
        assert (status, again, second["cache-status"]) == (200, body, "ollama-cache; hit")
        response = connection.request("HEAD", target, [])
        assert response.status == 200
        assert response.header("content-length") == str(len(body))
        assert response.header("ollama-content-digest") == hashlib.sha256(body).hexdigest()
        assert response.read() == b""
    assert origin.counters.registry_requests["GET", "manifest"] == 1


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"WWW-Authenticate": 'Bearer realm="https://registry.ollama.ai/token",service="s",scope="x"'}),
        (403, {}),
        (404, {}),
        (412, {}),
    ],
)
def test_refusals_are_relayed_and_never_stored(
    origin: Origin, proxy: Proxy, status: int, headers: dict[str, str]
) -> None:
    """What upstream refuses, the client sees as upstream said it; the next client gets the next answer."""
    model = add_model(origin, unique(10))
    manifest, target = model.manifest, model.manifest_target
    fault = Fault(Mode.STATUS, where="registry", status=status, headers=headers, times=2)
    origin.faults.append(fault)
    with to_registry(proxy) as connection:
        for _ in range(2):
            got, fields, _ = get(connection, target)
            assert got == status
            assert all(fields[name.lower()] == value for name, value in headers.items())
        got, _, body = get(connection, target)
        assert (got, body) == (200, manifest)


def test_a_page_that_is_no_manifest_is_not_stored(origin: Origin, proxy: Proxy) -> None:
    """A captive portal's 200 reaches nobody: the client that asked is told, and the next one is answered."""
    model = add_model(origin, unique(10))
    manifest, target = model.manifest, model.manifest_target
    origin.faults.append(Fault(Mode.STATUS, where="registry", status=200, body=b"<html>please log in</html>", times=1))
    with to_registry(proxy) as connection:
        status, _, body = get(connection, target)
        assert status == 504 and b"expected a manifest, got 200 text/plain" in body and b"log in" not in body
        assert get(connection, target)[2] == manifest


def test_head_of_a_blob(origin: Origin, proxy: Proxy) -> None:
    """200 with the true length and no body for what the repository has, upstream's 404 for what it has not."""
    model = add_model(origin, unique(10).read(0, 10))
    other = origin.add_blob(unique(11))
    with to_registry(proxy) as connection:
        for spelling in (model.layer, model.layer.replace(":", "-"), "sha256:" + model.layer[7:].upper()):
            response = connection.request("HEAD", f"/v2/{model.repository}/blobs/{spelling}", [])
            assert (response.status, response.header("content-length")) == (200, "10")
            assert response.read() == b""
        response = connection.request("HEAD", f"/v2/{model.repository}/blobs/{other}", [])
        assert (response.status, response.header("content-length")) == (404, "0")
    canonical(proxy, model)
    with to_registry(proxy) as connection:
        # Its bytes are here by now; another repository's claim to them is still upstream's to judge.
        response = connection.request("HEAD", f"/v2/library/stranger/blobs/{model.layer}", [])
        assert response.status == 404
        assert get(connection, f"/v2/library/stranger/blobs/{model.layer}")[0] == 404


def test_blob_redirect_keeps_the_scheme_and_the_hosts(origin: Origin, proxy: Proxy) -> None:
    """307 to the CDN's own host, without a body, from cold and warm alike; http stays http."""
    model = add_model(origin, ten := unique(10).read(0, 10))
    address = canonical(proxy, model)
    proxy.wait_for_line(model.recorded)
    assert canonical(proxy, model).partition("?")[0] == address.partition("?")[0]
    with connect(proxy.url, "registry.ollama.ai", 80, None) as connection:
        status, headers, _ = get(connection, model.blob_target)
        assert (status, headers["content-length"]) == (307, "0")
        assert headers["location"].startswith(f"http://{R2_HOST}/ollama/docker/registry/v2/blobs/sha256/")
    with connect(proxy.url, R2_HOST, 80, None) as connection:
        assert get(connection, headers["location"].removeprefix(f"http://{R2_HOST}"))[2] == ten


def test_without_a_capability_nothing_is_served_or_recorded(origin: Origin, proxy: Proxy) -> None:
    """A request to the blob host that we did not send there goes to that very URL, and leaves no trace.

    A capability that is none is refused here: it is nothing to show to the blob host.
    """
    model = add_model(origin, unique(10).read(0, 10))
    address = canonical(proxy, model)
    proxy.wait_for_line(model.recorded)
    path, _, query = address.partition("?")
    forged = query[:-1] + ("0" if query[-1] != "0" else "1")
    other = origin.add_blob(theirs := unique(8).read(0, 8))
    presigned = origin.signed_url(other).removeprefix(f"https://{R2_HOST}")
    origin.reset_counters()
    with to_cdn(proxy) as connection:
        assert get(connection, path)[0] == 403
        status, headers, body = get(connection, f"{path}?{forged}")
        assert (status, headers["content-length"], body) == (403, "0", b"")
        assert get(connection, presigned)[2] == theirs
        assert get(connection, presigned)[2] == theirs
    hexadecimals = (model.layer[7:], other[7:])
    assert sum(any(name in request.path for name in hexadecimals) for request in origin.counters.requests) == 3
    assert not list(proxy.store.glob(f"*/{other.replace(':', '-')}*"))


def test_three_hundred_ranges_on_a_cold_blob(origin: Origin, proxy: Proxy) -> None:
    """Six clients ask for anything in any order while the blob is recorded: every answer exact, each byte once."""
    size = 24 * MB + 12345
    blob = unique(size)
    model = add_model(origin, blob)
    origin.rate_per_connection = 4 * MB
    address = canonical(proxy, model)
    rng = random.Random(5)

    def field() -> str:
        start = rng.randrange(size)
        return rng.choice(
            [
                f"bytes={start}-{start + rng.randrange(300_000)}",
                f"bytes={start}-{start}",
                f"bytes=-{rng.randrange(1, 200_000)}",
                f"bytes={size - rng.randrange(1, 100_000)}-",
                f"bytes={size + rng.randrange(10)}-",
                f"bytes={start}-{start - 1}" if start else "bytes=-0",
                "bytes=0-0",
            ]
        )

    fields = [[field() for _ in range(50)] for _ in range(6)]

    def ask(own: list[str]) -> None:
        with to_cdn(proxy) as connection:
            for text in own:
                expected = parse_range(text, size)
                if expected is None and len(own) and text != own[0]:
                    continue  # the whole blob for a malformed field: once per client is enough
                status, headers, body = get(connection, address, Range=text)
                match expected:
                    case ByteRange():
                        assert status == 206, text
                        assert headers["content-range"] == expected.content_range
                        assert headers["content-length"] == str(expected.size)
                        assert body == blob.read(expected.start, expected.stop), text
                    case Unsatisfiable():
                        assert (status, body) == (416, b""), text
                        assert headers["content-range"] == f"bytes */{size}"
                    case None:
                        assert status == 200
                        assert body == blob.read(0, size)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, fields))
    assert origin.counters.cdn_bytes_by_digest[model.layer] <= size * 1.01


def test_if_range_and_head_at_the_canonical_address(origin: Origin, proxy: Proxy) -> None:
    """A strong match keeps the range, anything else gets the whole; HEAD tells the length."""
    model = add_model(origin, ten := unique(10).read(0, 10))
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        status, headers, _ = get(connection, address)
        tag = headers["etag"]
        assert (status, headers["accept-ranges"], "content-encoding" in headers) == (200, "bytes", False)
        assert get(connection, address, Range="bytes=2-4", If_Range=tag)[::2] == (206, ten[2:5])
        assert get(connection, address, Range="bytes=2-4", If_Range='"other"')[::2] == (200, ten)
        assert get(connection, address, Range="bytes=2-4", Accept_Encoding="gzip")[::2] == (206, ten[2:5])
        response = connection.request("HEAD", address, [("Range", "bytes=2-4")])
        assert (response.status, response.header("content-length"), response.read()) == (200, "10", b"")


@pytest.mark.parametrize("size", [0, 1, 2, 65535, 65536, 65537])
def test_sizes_around_the_edges(origin: Origin, proxy: Proxy, size: int) -> None:
    """An empty blob, one byte, and one more or less than a slice."""
    data = unique(size).read(0, size)
    model = add_model(origin, data)
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        assert get(connection, address)[::2] == (200, data)
    proxy.wait_for_line(model.recorded)
    origin.stop()
    with to_cdn(proxy) as connection:
        assert get(connection, address)[::2] == (200, data)


def test_a_corrupted_byte_never_becomes_a_hit(origin: Origin, proxy: Proxy) -> None:
    """Bytes that do not hash to their name are put away; the next pull fetches anew and is right."""
    blob = unique(3 * MB)
    model = add_model(origin, blob)
    origin.faults.append(Fault(Mode.FLIP, digest=model.layer, after=2 * MB, times=1))
    address = canonical(proxy, model)
    with to_cdn(proxy) as connection:
        get(connection, address)
    proxy.wait_for_line("quarantined")
    assert not (blob_file(proxy.store, model.layer.replace(":", "-"))).exists()
    with to_cdn(proxy) as connection:
        assert get(connection, canonical(proxy, model))[2] == blob.read(0, 3 * MB)
    proxy.wait_for_line(model.recorded)


def test_missing_manifest_while_upstream_is_down(origin: Origin, proxy: Proxy) -> None:
    """What is not recorded cannot be had: 504 in the registry's own error shape, naming it."""
    origin.stop()
    with to_registry(proxy) as connection:
        status, headers, body = get(connection, "/v2/library/absent/manifests/7b")
    assert (status, headers["content-type"]) == (504, "application/json")
    assert "registry.ollama.ai/library/absent:7b is not recorded" in json.loads(body)["errors"][0]["message"]


def test_offline_option(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """Offline, upstream is not even tried: what is not here is named and answered 504, a push is not let out."""
    proxy = start_proxy(ollama_cache_offline="true")
    model = add_model(origin, unique(10).read(0, 10))
    with to_registry(proxy) as connection:
        status, _, body = get(connection, model.manifest_target)
        (error,) = json.loads(body)["errors"]
        assert (status, error["code"]) == (504, "MANIFEST_UNKNOWN")
        assert f"{model.repository}:latest is not recorded" in error["message"]
        status, headers, body = get(connection, model.blob_target)
        assert (status, headers["content-length"], body) == (504, "0", b"")
        status, headers, body = get(connection, "/v2/token?service=registry")
        assert (status, headers["content-length"], body) == (504, "0", b"")
        response = connection.request("POST", f"/v2/{model.repository}/blobs/uploads/", [("Content-Length", "0")])
        assert (response.status, b"offline" in response.read()) == (504, True)
    with to_registry(proxy) as connection, pytest.raises(Exception, match=r"EOF|closed|reset|end"):
        connection.request("PATCH", "/v2/x/y/blobs/uploads/z", [("Content-Length", "4")], b"data")
    assert not origin.counters.requests


def test_version_gate(origin: Origin, proxy: Proxy) -> None:
    """A model that the registry refuses to old versions is not served to one from the store either."""
    model = add_model(origin, b"x", requires="0.30.0")
    with to_registry(proxy) as connection:
        for version, status, cache in (("0.34.3", 200, "fwd"), ("0.5.7", 412, "fwd"), ("0.34.3", 200, "hit")):
            got, headers, _ = get(
                connection, model.manifest_target, User_Agent=f"ollama/{version} (amd64 linux) Go/go1"
            )
            assert got == status
            assert f"ollama-cache; {cache}" in headers["cache-status"]


def test_a_manifest_by_its_digest(origin: Origin, proxy: Proxy) -> None:
    """A stored manifest is also a blob of its repository, and found by digest; a stranger's repository lacks it."""
    model = add_model(origin, b"x")
    other = add_model(origin, b"y")
    digest = hashlib.sha256(model.manifest).hexdigest()
    with to_registry(proxy) as connection:
        get(connection, model.manifest_target)
        origin.reset_counters()
        for target in (f"blobs/sha256:{digest}", f"blobs/sha256-{digest}", f"manifests/sha256:{digest}"):
            status, headers, body = get(connection, f"/v2/{model.repository}/{target}")
            assert (status, body) == (200, model.manifest)
            assert headers["cache-status"] == "ollama-cache; hit"
        # Where its blobs are may be asked meanwhile: the client will want to know.
        assert not [each for each in origin.counters.requests if digest in each.path]
        assert get(connection, f"/v2/{other.repository}/blobs/sha256:{digest}")[0] == 404
