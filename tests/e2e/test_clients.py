"""What single generations of clients do beside pulling: tokens, names, digests, odd headers, expired addresses."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, Model, add_model, canonical, get, to_cdn, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.legacy import A1Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy
from tests.support.transfer import TENSOR_TYPE, TransferClient

NewClient = Callable[..., A2Client]


@pytest.mark.parametrize(
    "spelt",
    [
        pytest.param("{name}:latest", id="tag"),
        pytest.param("registry.ollama.ai/library/{name}", id="host"),
        pytest.param("Registry.Ollama.AI/library/{name}", id="host in another case"),
        pytest.param("registry.ollama.ai:443/library/{name}", id="port"),
        pytest.param("http://registry.ollama.ai/library/{name}", id="http"),
        pytest.param("http://registry.ollama.ai:80/library/{name}", id="http, port"),
    ],
)
@pytest.mark.parametrize("repository", ["library/Llama-3.2_x", "some-one/qwen2.5-Coder.GGUF"])
def test_names_and_schemes(origin: Origin, proxy: Proxy, new_client: NewClient, spelt: str, repository: str) -> None:
    """However a user spells a model, it is the same one: recorded once, then served."""
    model = add_model(origin, unique(2000), repository=f"{repository}-{hashlib.sha256(spelt.encode()).hexdigest()[:6]}")
    name = spelt.format(name=model.repository).replace("library/library/", "library/").replace("library/some", "some")
    for _ in range(2):
        client = new_client(proxy)
        client.pull(name)
        with client.blob_path(model.layer).open("rb") as file:
            assert "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == model.layer
        proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == 2000


def test_a_token_stays_with_the_registry(origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """A client that follows redirects with its token (Go, to a subdomain) never sends it to the blob host."""
    proxy = start_proxy()
    model = add_model(origin, unique(2 * MB), private=True)
    client = A1Client(proxy.url, proxy.ca_file, tmp_path / "client", min_part=MB)
    client.pull(model.name)
    assert origin.counters.tokens
    seen = [request for request in origin.counters.requests if "authorization" in request.headers]
    assert seen
    assert {request.listener for request in seen} == {"registry"}


def test_client2_pulls_by_digest(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """name@digest: the manifest comes by the blobs path, cold, warm and with the registry gone."""
    model = add_model(origin, unique(3 * MB))
    digest = "sha256:" + hashlib.sha256(model.manifest).hexdigest()
    origin.put_manifest(model.repository, digest, model.manifest)
    origin.add_blob(model.manifest)
    origin.add_member(model.repository, digest)
    for state in ("cold", "warm", "offline"):
        if state == "offline":
            origin.stop()
        client = Client2(proxy.url, proxy.ca_file, tmp_path / state, threshold=MB)
        client.pull(f"{model.name}@{digest}")
        assert client.blob_path(model.layer).stat().st_size == 3 * MB
        if state == "cold":
            proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == 3 * MB


def test_request_headers_make_no_difference(origin: Origin, proxy: Proxy) -> None:
    """Referer, User-Agent, Authorization and Accept-Encoding change neither who gets the bytes nor the bytes."""
    text = b"compressible " * 10_000
    model = add_model(origin, text)
    address = canonical(proxy, model)
    proxy.wait_for_line(model.recorded)
    origin.reset_counters()
    fields = {
        "Referer": "https://registry.ollama.ai/v2/",
        "User_Agent": "ollama-transfer/1.0",
        "Authorization": "Bearer whatever",
        "Accept_Encoding": "gzip, br, zstd",
    }
    with to_cdn(proxy) as connection:
        for more, status, body in (({}, 200, text), ({"Range": "bytes=13-25"}, 206, text[13:26])):
            got, headers, data = get(connection, address, **fields, **more)
            assert (got, data) == (status, body)
            assert headers["content-length"] == str(len(body))
            assert "content-encoding" not in headers
            assert headers["cache-status"] == "ollama-cache; hit"
    assert origin.counters.cdn_requests == 0


def test_expired_addresses_are_obtained_again(origin: Origin, proxy: Proxy, new_client: NewClient) -> None:
    """Every signature expires in the middle of a pull: the client never notices."""
    model = add_model(origin, unique(20 * MB))
    expired = False

    def expire(count: int) -> None:
        nonlocal expired
        if count > 2 * MB and not expired:
            expired = True
            origin.expire_signatures(model.layer)

    origin.rate_per_connection = 2 * MB
    client = new_client(proxy, on_progress=expire)
    report = client.pull(model.name)
    assert expired
    assert_complete(client, model)
    assert report.retries == report.stalls == 0
    assert origin.counters.cdn_bytes_by_digest[model.layer] == 20 * MB


def test_tensor_models_pass_by(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """x/transfer dials blobs directly: the manifest comes from the cache, the blobs do not, and the pull works."""
    layer = origin.add_blob(unique(MB))
    config = origin.add_blob(b'{"model_format":"safetensors"}')
    manifest = origin.add_model("library/tensors", "latest", layers=[(TENSOR_TYPE, layer)], config=config)
    model = Model("library/tensors", (layer,), config, manifest)
    roots = tmp_path / "roots.pem"
    roots.write_text(proxy.ca_file.read_text() + origin.ca_file.read_text())
    for number in range(2):
        client = TransferClient(proxy.url, roots, tmp_path / f"{number}", version="0.20.5", resolve=origin.resolve)
        client.pull(model.name)
        assert client.blob_path(layer).stat().st_size == MB
    manifests = [request for request in origin.counters.requests if request.target == model.manifest_target]
    assert len(manifests) == 1
    # The resolving answer of the CDN is drained: each blob crosses the line twice, for each client.
    assert origin.counters.cdn_bytes_by_digest[layer] >= 2 * MB
    assert not any(layer[7:19] in line for line in proxy.output)
