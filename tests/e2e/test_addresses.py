"""A client that may ask past the proxy is sent to the registry's own address, which is a hit when it comes back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.conftest import MB, MODEL, Model, add_model, get, to_cdn, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.goclient import PullError
from tests.support.http1 import connect
from tests.support.modern import ModernClient
from tests.support.origin import GOOD_TOKEN, PUBLIC_ADDRESSES, R2_HOST, Fault, Mode, Origin
from tests.support.proxy import Proxy, patched
from tests.support.readers import HeadReader
from tests.support.transfer import TENSOR_TYPE

NEW: Final = "ollama/0.41.0 (amd64 linux) Go/go1.27"
"""Nobody knows whether it fetches past its proxy."""
BYPASSING: Final = "ollama/0.40.2 (amd64 linux) Go/go1.27"
PARTS: Final = "Go-http-client/1.1"

StartProxy = Callable[..., Proxy]


def probe(proxy: Proxy, model: Model, digest: str = "", *, agent: str = NEW, **fields: str) -> tuple[str, str]:
    """Ask for a blob of the model: (the target at the blob host that the answer redirects to, its Cache-Status)."""
    with to_registry(proxy) as connection:
        target = f"/v2/{model.repository}/blobs/{digest or model.layer}"
        status, headers, _ = get(connection, target, User_Agent=agent, **fields)
    assert status == 307, status
    assert headers["location"].startswith(f"https://{R2_HOST}/")
    return headers["location"].removeprefix(f"https://{R2_HOST}"), headers["cache-status"]


def part(proxy: Proxy, target: str, **fields: str) -> tuple[int, bytes]:
    """Ask for a part: by a client without a name, through the proxy."""
    with to_cdn(proxy) as connection:
        status, _, body = get(connection, target, User_Agent=PARTS, **fields)
    return status, body


def is_signed(target: str) -> bool:
    return "X-Amz-Signature=" in target


def test_cold_and_warm(origin: Origin, proxy: Proxy) -> None:
    """The probe costs one request of the registry and no byte; the parts are recorded once, and then are hits."""
    data = unique(2 * MB)
    model = add_model(origin, data)
    target, cache = probe(proxy, model)
    assert is_signed(target) and target.rpartition("=")[2] in origin.signatures
    assert cache == "ollama-cache; fwd=miss; detail=registry-address"
    assert origin.counters.cdn_requests == 0
    for start, stop in ((MB, 2 * MB), (0, MB)):
        assert part(proxy, target, Range=f"bytes={start}-{stop - 1}") == (206, data.read(start, stop))
    proxy.wait_for_line(model.recorded)
    assert part(proxy, target) == (200, data.read(0, 2 * MB))
    again, cache = probe(proxy, model)
    assert (again, cache) == (target, "ollama-cache; hit; detail=registry-address")
    assert origin.counters.cdn_bytes == 2 * MB
    assert origin.counters.registry_requests["GET", "blob"] == 1


def test_who_gets_ours(origin: Origin, proxy: Proxy) -> None:
    """Older Ollamas, x/transfer, and clients that came by another way than CONNECT."""
    model = add_model(origin, unique(1000))
    for agent in ("ollama/0.34.4 (amd64 linux) Go/go1.26", "ollama-transfer/1.0"):
        assert not is_signed(probe(proxy, model, agent=agent)[0])
    with connect(None, "127.0.0.1", proxy.front_port, None) as connection:
        _, headers, _ = get(connection, model.blob_target, User_Agent=NEW, Host="cache.lan")
    assert "X-Amz" not in headers["location"]
    with connect(proxy.url, "registry.ollama.ai", 80, None) as connection:
        _, headers, _ = get(connection, model.blob_target, User_Agent=NEW)
    assert "X-Amz" not in headers["location"]
    for agent in (NEW, BYPASSING, "ollama/0.0.0 (amd64 linux) Go/go1.27", "curl/8.1", "odd"):
        assert is_signed(probe(proxy, model, agent=agent)[0])


def test_only_what_was_handed_out_is_ours(origin: Origin, proxy: Proxy) -> None:
    """A signed address that somebody got elsewhere is passed on to where it leads, and so is one that was changed."""
    data = unique(1000)
    model = add_model(origin, data)
    target, _ = probe(proxy, model)
    with to_cdn(proxy) as connection:
        # The method is part of what is signed.
        assert connection.request("HEAD", target, []).status == 403
    assert origin.counters.cdn_requests == 0
    assert part(proxy, target) == (200, data.read(0, 1000))
    proxy.wait_for_line(model.recorded)
    origin.reset_counters()
    assert part(proxy, origin.signed_url(model.layer).removeprefix(f"https://{R2_HOST}"))[0] == 200
    assert part(proxy, target + "&x=1")[0] == 403
    assert part(proxy, target[:-1] + ("0" if target[-1] != "0" else "1"))[0] == 403
    assert origin.counters.cdn_requests == 3


def test_a_warm_pull_asks_the_registry_once(origin: Origin, start_proxy: StartProxy) -> None:
    """The addresses of five layers are obtained with the first manifest, and remembered for the next client."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="0")
    layers = [unique(1000 + number) for number in range(5)]
    model = add_model(origin, *layers)
    for state in ("cold", "warm"):
        origin.reset_counters()
        with to_registry(proxy) as connection:
            assert get(connection, model.manifest_target, User_Agent=NEW)[0] == 200
        for digest in model.blobs:
            target, _ = probe(proxy, model, digest)
            assert part(proxy, target)[1] == origin.blob(digest).read(0, 2000)
            proxy.wait_for_line(f"recorded {digest[7:19]}")
        asked = origin.counters.registry_requests
        expected = {("HEAD", "manifest"): 1} if state == "warm" else {("GET", "manifest"): 1, ("GET", "blob"): 6}
        assert dict(asked) == expected


def test_restart_between_probe_and_parts(origin: Origin, start_proxy: StartProxy) -> None:
    """The address is recognised by its HMAC, and recorded from; nothing of it lies on the disk."""
    proxy = start_proxy()
    data = unique(MB)
    model = add_model(origin, data)
    target, _ = probe(proxy, model)
    for last in (MB // 2, MB):
        proxy.restart()
        assert part(proxy, target, Range=f"bytes=0-{last - 1}") == (206, data.read(0, last))
    proxy.wait_for_line(model.recorded)
    assert origin.counters.cdn_bytes == MB
    assert origin.counters.registry_requests["GET", "blob"] == 1
    signature = target.rpartition("=")[2].encode()
    proxy.stop()
    assert not [path for path in proxy.store.rglob("*") if path.is_file() and signature in path.read_bytes()]
    assert not any("X-Amz" in line for line in proxy.output)


@pytest.mark.long
def test_an_address_that_has_expired_upstream(origin: Origin, start_proxy: StartProxy) -> None:
    """Those who come back do not notice: the recording obtains another one."""
    proxy = start_proxy()
    data = unique(MB)
    model = add_model(origin, data)
    target, _ = probe(proxy, model)
    origin.expire_signatures(model.layer)
    assert part(proxy, target) == (200, data.read(0, MB))
    proxy.wait_for_line(model.recorded)


def test_private_models(origin: Origin, start_proxy: StartProxy) -> None:
    """The address goes to the caller for whom it was obtained, is never shared, and opens that blob to its holder."""
    proxy = start_proxy()
    data = unique(MB)
    model = add_model(origin, data, private=True)
    token = {"Authorization": f"Bearer {GOOD_TOKEN}"}
    target, _ = probe(proxy, model, **token)
    assert part(proxy, target) == (200, data.read(0, MB))
    proxy.wait_for_line(model.recorded)
    assert probe(proxy, model, **token)[0] != target
    with to_registry(proxy) as connection:
        assert get(connection, model.blob_target, User_Agent=NEW)[0] == 401
    # After a restart the credentials are gone; the address goes on to mean what it meant.
    proxy.restart()
    assert part(proxy, target, Range="bytes=5-9") == (206, data.read(5, 10))
    origin.stop()
    with to_registry(proxy) as connection:
        status, _, body = get(connection, model.blob_target, User_Agent=NEW, **token)
    assert (status, body) == (502, b"")


HURRIED: Final = """
from pullthrough.registry import freshness
from pullthrough.upstream import client
freshness.REVALIDATE_TIMEOUT_S = 1.0
client.STALL_TIMEOUT_S = 2.0
"""
"""The registry is waited for as ever, but not for three and ten seconds."""


def test_a_registry_that_hangs_once(origin: Origin, start_proxy: StartProxy, tmp_path: Path) -> None:
    """Cold, the question is put again; with the bytes here, the client gets our own address after a while."""
    proxy = start_proxy(program=patched(tmp_path, HURRIED))
    data = unique(MB)
    cold, warm = add_model(origin, data), add_model(origin, unique(1000))
    origin.faults.append(fault := Fault(Mode.HANG, where="registry", digest=cold.layer))
    assert is_signed(probe(proxy, cold)[0])
    with to_registry(proxy) as connection:
        get(connection, warm.blob_target)
    origin.faults.append(second := Fault(Mode.HANG, where="registry", digest=warm.layer))
    assert not is_signed(probe(proxy, warm)[0])
    for each in (fault, second):
        assert each.hits == 1
        each.gate.open()


@pytest.mark.long
def test_without_the_registry(origin: Origin, start_proxy: StartProxy) -> None:
    """A remembered address, else ours; who is known to bypass is told what to do where neither helps."""
    proxy = start_proxy()
    data = unique(1000)
    model, other = add_model(origin, data), add_model(origin, unique(1000))
    target, _ = probe(proxy, model)
    assert part(proxy, target)[0] == 200
    proxy.wait_for_line(model.recorded)
    with to_registry(proxy) as connection:
        _, headers, _ = get(connection, other.blob_target)
    origin.stop()
    assert probe(proxy, model)[0] == target
    assert not is_signed(probe(proxy, other)[0])
    with to_registry(proxy) as connection:
        status, headers, body = get(connection, other.blob_target, User_Agent=BYPASSING)
    assert (status, headers["cache-status"]) == (403, "ollama-cache; fwd=bypass; detail=client-bypasses-proxy")
    assert all(word in body for word in (b"0.40.2", b"gateway", b"9200", b"upgrade"))
    assert probe(proxy, model, agent=BYPASSING)[0] == target
    proxy.restart()
    ours, _ = probe(proxy, model)
    assert not is_signed(ours) and part(proxy, ours) == (200, data.read(0, 1000))


def test_another_host(origin: Origin, proxy: Proxy) -> None:
    """Where the registry redirects elsewhere, its address is handed on only once a blob has been seen behind it: it may
    be a login page."""
    model = add_model(origin, unique(1000))
    there = "https://cdn.example/blob?token=secret"
    origin.faults.append(Fault(Mode.REDIRECT, status=307, headers={"Location": there}))
    with to_registry(proxy) as connection:
        status, headers, _ = get(connection, model.blob_target, User_Agent=NEW)
    assert status == 502 and "location" not in headers
    assert not any("token=secret" in line for line in proxy.output)


# --- models that are lists


def test_a_list_pulled_by_two_kinds_of_client(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """A client that takes lists gets the list and its child, an older one the plain manifest: all bytes once."""
    config = origin.add_blob(b'{"model_format":"gguf","of":"two kinds"}')
    layers = {runner: origin.add_blob(unique(2 * MB)) for runner in ("ggml", "llamacpp")}
    children = [origin.manifest_of([(MODEL, layer)], config, runner=runner) for runner, layer in layers.items()]
    listed = origin.put_list("library/twokinds", "latest", children, plain=children[0])
    new = {"version": "0.40.3", "dns": PUBLIC_ADDRESSES, "min_part": MB}
    for state in ("cold", "warm", "offline"):
        if state == "offline":
            origin.stop()
        old = A2Client(proxy.url, proxy.ca_file, tmp_path / f"old {state}", min_part=MB)
        old.pull("twokinds")
        assert old.manifest_path("twokinds").read_bytes() == children[0]
        assert old.blob_path(layers["ggml"]).exists() and not old.blob_path(layers["llamacpp"]).exists()
        client = ModernClient(proxy.url, proxy.ca_file, tmp_path / f"new {state}", **new)
        client.pull("twokinds")
        assert client.manifest_path("twokinds").read_bytes() == listed
        assert client.blob_path(layers["llamacpp"]).exists() and not client.blob_path(layers["ggml"]).exists()
        assert client.probe_update("twokinds").is_list
        for layer in layers.values():
            proxy.wait_for_line(f"recorded {layer[7:19]}")
    for digest in (*layers.values(), config):
        assert origin.counters.cdn_bytes_by_digest[digest] == origin.blob(digest).size


def test_without_dns(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """A mended client behind a proxy need not know the blob host's addresses; the older one refuses what it cannot."""
    model = add_model(origin, unique(2 * MB))
    options = {"dns": {}, "min_part": MB, "probe_deadline_s": 2.0}
    ModernClient(proxy.url, proxy.ca_file, tmp_path / "m3", version="0.40.3", **options).pull(model.name)
    assert origin.counters.cdn_bytes_by_digest[model.layer] == 2 * MB
    with pytest.raises(PullError, match="no such host"):
        ModernClient(proxy.url, proxy.ca_file, tmp_path / "m1", version="0.35.1", **options).pull(model.name)


def test_both_ways_from_one_address(origin: Origin, proxy: Proxy, tmp_path: Path) -> None:
    """Clients of one unknown version, behind one NAT: each pulls, whatever the other does."""
    model = add_model(origin, unique(4 * MB))
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(proxy.ca_file.read_bytes() + origin.ca_file.read_bytes())
    options = {"dns": PUBLIC_ADDRESSES, "resolve": origin.resolve, "min_part": MB}
    names = ["0.41.0 proxying", "0.41.0 bypassing"] * 2

    def pull(number: int) -> None:
        ModernClient(proxy.url, trusted, tmp_path / str(number), version=names[number], **options).pull(model.name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(pull, range(len(names))))
    assert origin.counters.cdn_bytes_by_digest[model.layer] == 3 * 4 * MB


@pytest.mark.parametrize("blobs", [40, pytest.param(2000, marks=pytest.mark.long)])
def test_a_model_of_tensors_through_the_proxy(origin: Origin, proxy: Proxy, tmp_path: Path, blobs: int) -> None:
    """A mended client's transfer gets our own addresses: warm, the registry is asked for no blob."""
    config = origin.add_blob(b'{"model_format":"safetensors"}')
    layers = [(TENSOR_TYPE, origin.add_blob(b"%d of %d " % (number, blobs) * 50)) for number in range(blobs)]
    origin.add_model(f"library/tensors{blobs}", "latest", layers=layers, config=config)
    for state in ("cold", "warm"):
        origin.reset_counters()
        client = ModernClient(proxy.url, proxy.ca_file, tmp_path / state, version="0.40.3", dns=PUBLIC_ADDRESSES)
        client.pull(f"tensors{blobs}")
        for _, layer in layers[::100]:
            proxy.wait_for_line(f"recorded {layer[7:19]}")
    asked = origin.counters
    assert (asked.registry_requests["GET", "blob"], asked.registry_requests["HEAD", "blob"]) == (0, 0)
    assert asked.cdn_requests == 0


# --- who reads a head pays for a head


def read_heads(proxy: Proxy, models: list[Model], size: int) -> int:
    """Read the first bytes of each model's first layer as one range; how many were read."""
    for model in models:
        target, _ = probe(proxy, model, agent="ollama/0.34.4 (amd64 linux) Go/go1.26")
        status, body = part(proxy, target, Range=f"bytes=0-{size - 1}")
        assert (status, len(body)) == (206, size)
    return size * len(models)


@pytest.mark.parametrize("finish", ["auto", pytest.param("always", marks=pytest.mark.long)])
def test_a_head_costs_a_head(origin: Origin, start_proxy: StartProxy, finish: str) -> None:
    """Neither the rest of the layer nor the next layers, whatever `finish` says; upstream and on the disk."""
    proxy = start_proxy(ollama_cache_finish=finish)
    models = [add_model(origin, unique(30 * MB), unique(10 * MB)) for _ in range(5)]
    for model in models:
        with to_registry(proxy) as connection:
            get(connection, model.manifest_target)
    read = read_heads(proxy, models, 2 * MB)
    assert read <= origin.counters.cdn_bytes <= 1.3 * read
    taken = sum(path.stat().st_blocks * 512 for path in (proxy.store / "ingest").glob("*.partial"))
    assert taken <= 1.3 * read
    # The rest is there for who pulls it.
    target, _ = probe(proxy, models[0])
    assert part(proxy, target, Range=f"bytes={2 * MB}-") == (206, origin.blob(models[0].layer).read(2 * MB, 30 * MB))
    proxy.wait_for_line(models[0].recorded)
    proxy.wait_for_line(f"recorded {models[0].layers[1][7:19]}")
    assert origin.counters.cdn_bytes_by_digest[models[0].layer] == 30 * MB


@dataclass(frozen=True)
class NeverWhole:
    """Zero bytes that nobody reads to their end: so any digest will do."""

    size: int
    number: int

    def read(self, start: int, stop: int) -> bytes:
        return bytes(max(0, min(stop, self.size) - start))

    def sha256(self) -> str:
        return f"{self.number:064x}"


@pytest.mark.long
def test_fifty_readers_of_heads(origin: Origin, start_proxy: StartProxy, tmp_path: Path) -> None:
    """The first 8, then 32 MiB of fifty layers of 4 GB: upstream and the disk pay at most 1.3 times what was read."""
    proxy = start_proxy()
    models = [add_model(origin, NeverWhole(4 << 30, number)) for number in range(50)]
    stops = (8 << 20, 32 << 20)

    def read(model: Model) -> None:
        HeadReader(proxy.url, proxy.ca_file, tmp_path / model.name, stops=stops).pull(model.name)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(read, models))
    read_bytes = sum(stops[-1] + origin.blob(model.config).size for model in models)
    taken = sum(path.stat().st_blocks * 512 for path in (proxy.store / "ingest").glob("*.partial"))
    print(f"upstream / read {origin.counters.cdn_bytes / read_bytes:.3f}, disk / read {taken / read_bytes:.3f}")
    assert origin.counters.cdn_bytes <= 1.3 * read_bytes
    assert taken <= 1.3 * read_bytes
