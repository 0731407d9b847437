"""Manifest lists through a real mitmdump: each class of clients gets its own representation, and children are held."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MB, MODEL, get, to_cdn, to_registry, unique
from tests.e2e.test_cli import cli, said, told
from tests.support.a2 import A2Client
from tests.support.goclient import PullError
from tests.support.http1 import connect
from tests.support.modern import ModernClient
from tests.support.origin import GOOD_TOKEN, LIST_TYPE, MANIFEST_TYPE, PUBLIC_ADDRESSES, R2_HOST, REGISTRY_COM, Origin
from tests.support.proxy import Proxy

TAKES = f"{LIST_TYPE}, {MANIFEST_TYPE}"
LICENSE = "application/vnd.ollama.image.license"
RUNNERS = ("llamacpp", "ggml")


@dataclass(frozen=True)
class Listed:
    """A tag with a list of two children; others get the first one's layers by a manifest of other bytes."""

    repository: str
    lists: bytes
    plain: bytes
    children: tuple[bytes, bytes]
    layers: tuple[str, str]
    """Of the children, in their order."""
    license: str
    """A layer that both have."""

    @property
    def name(self) -> str:
        return self.repository.removeprefix("library/")

    @property
    def target(self) -> str:
        return f"/v2/{self.repository}/manifests/latest"

    def blob(self, digest: str) -> str:
        return f"/v2/{self.repository}/blobs/{digest}"

    @property
    def child(self) -> str:
        """The digest of the first child."""
        return digest_of(self.children[0])


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def add_list(origin: Origin, repository: str, *, size: int = MB) -> Listed:
    """Publish such a tag, or move it."""
    layers = tuple(origin.add_blob(unique(size)) for _ in RUNNERS)
    shared, config = origin.add_blob(unique(2000)), origin.add_blob(b'{"model_format":"gguf"}')
    children = tuple(
        origin.manifest_of([(MODEL, layer), (LICENSE, shared)], config, runner=runner, format="gguf")
        for runner, layer in zip(RUNNERS, layers, strict=True)
    )
    plain = origin.manifest_of([(MODEL, layers[0]), (LICENSE, shared)], config)
    lists = origin.put_list(repository, "latest", children, plain=plain)
    return Listed(repository, lists, plain, children, layers, shared)  # type: ignore[arg-type]


@pytest.fixture
def clients(tmp_path: Path) -> Callable[..., A2Client]:
    """Ollamas, each with a models folder of its own: of today's with lists, or of before."""
    made: list[A2Client] = []

    def make(proxy: Proxy, *, lists: bool) -> A2Client:
        folder = tmp_path / f"ollama{len(made)}"
        scale: dict[str, Any] = {"min_part": MB, "max_part": 10 * MB, "backoff_unit_s": 0.05}
        if lists:
            made.append(ModernClient(proxy.url, proxy.ca_file, folder, dns=PUBLIC_ADDRESSES, **scale))
        else:
            made.append(A2Client(proxy.url, proxy.ca_file, folder, **scale))
        return made[-1]

    return make


def answers(proxy: Proxy, model: Listed) -> list[tuple[str, int, bytes, dict[str, str]]]:
    """(Accept, status, body, header fields) of GET and HEAD of both classes."""
    found = []
    with to_registry(proxy) as connection:
        for accept in ("", TAKES):
            fields = [("Accept", accept)] if accept else []
            for method in ("GET", "HEAD"):
                response = connection.request(method, model.target, fields)
                headers = {name.lower(): value for name, value in response.headers}
                found.append((accept, response.status, response.read(), headers))
    return found


def check(proxy: Proxy, model: Listed) -> list[str]:
    """Both classes get their own bytes, lengths, types and digests; their Cache-Status."""
    found = answers(proxy, model)
    for number, (accept, status, body, headers) in enumerate(found):
        expected = model.lists if accept else model.plain
        assert status == 200
        assert body == (b"" if number % 2 else expected)
        assert headers["content-length"] == str(len(expected))
        if number % 2:
            assert f"sha256:{headers['ollama-content-digest']}" == digest_of(expected)
            assert (headers["content-type"] == LIST_TYPE) == bool(accept)
    return [headers["cache-status"] for *_, headers in found]


def test_both_classes(origin: Origin, start_proxy: Callable[..., Proxy], clients: Callable[..., A2Client]) -> None:
    """Cold, warm, after a restart and offline: exact bytes; what both need crosses the line once; one model in ls."""
    model = add_list(origin, "library/listed", size=3 * MB)
    proxy = start_proxy()
    check(proxy, model)
    assert all(status.startswith("ollama-cache; hit") for status in check(proxy, model))
    assert origin.counters.manifest_requests == {("GET", False): 1, ("GET", True): 1}

    for lists in (True, False):
        clients(proxy, lists=lists).pull(model.name)
    size = len(model.children[0]) + 3 * MB + 2000 + len(b'{"model_format":"gguf"}')
    assert origin.counters.cdn_bytes == size
    (row,) = told(proxy, "ls")
    plain = sum(each["size"] for each in told(proxy, "show", "listed")["layers"])
    assert (row["name"], row["held"], row["digest"]) == ("listed:latest", "complete", digest_of(model.plain))
    assert row["size"] == plain + len(model.children[0])
    shown = told(proxy, "show", "listed")
    assert shown["list"] == digest_of(model.lists)
    assert [(each["runner"], each["digest"], each["held"]) for each in shown["children"]] == [
        (runner, digest_of(child), runner == "llamacpp") for runner, child in zip(RUNNERS, model.children, strict=True)
    ]
    assert [each["digest"] for each in shown["children"][0]["layers"]][:2] == [model.layers[0], model.license]
    assert shown["children"][1]["layers"] == []
    text = said(proxy, "show", "listed")
    assert shown["list"] in text
    assert f"llamacpp gguf {model.child[7:19]}\n" in text
    assert f"ggml gguf {digest_of(model.children[1])[7:19]}: not held\n" in text
    assert told(proxy, "stats")["models"] == 1

    for restarted in (False, True):
        if restarted:
            proxy.restart()
        with to_registry(proxy) as connection:
            response = connection.request("HEAD", model.blob(model.child), [])
            assert (response.status, response.header("Content-Length")) == (200, str(len(model.children[0])))
        origin.stop()
        check(proxy, model)
        for lists in (True, False):
            clients(proxy, lists=lists).pull(model.name)
        origin.start()
    assert said(proxy, "rm", "listed").startswith("removed listed:latest\n")
    assert told(proxy, "ls") == []
    assert told(proxy, "stats")["blobs"] == 0


@pytest.mark.long
def test_offline_with_one_class(origin: Origin, proxy: Proxy, clients: Callable[..., A2Client]) -> None:
    """Who takes lists is served the manifest that others got; not the other way round."""
    first, second = add_list(origin, "library/onlyplain"), add_list(origin, "library/onlylist")
    clients(proxy, lists=False).pull(first.name)
    clients(proxy, lists=True).pull(second.name)
    origin.stop()
    clients(proxy, lists=True).pull(first.name)
    with pytest.raises(PullError, match="504"):
        clients(proxy, lists=False).pull(second.name)
    assert [status for _, status, *_ in answers(proxy, second)] == [504, 504, 200, 200]


def test_a_tag_that_becomes_a_list(
    origin: Origin, start_proxy: Callable[..., Proxy], clients: Callable[..., A2Client]
) -> None:
    """And a manifest again: the daemon's look sees it, the pull follows; a registry that hangs delays neither."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="0")
    model = add_list(origin, "library/moving")
    origin.put_manifest(model.repository, "latest", model.plain)
    ollama = clients(proxy, lists=True)
    assert isinstance(ollama, ModernClient)
    ollama.pull(model.name)
    assert ollama.probe_update(model.name).is_list is False
    origin.put_list(model.repository, "latest", model.children, plain=model.plain)
    update = ollama.probe_update(model.name)
    assert (update.is_list, update.length) == (True, len(model.lists))
    assert f"sha256:{update.digest}" == digest_of(model.lists)
    ollama.pull(model.name)
    check(proxy, model)
    gate = origin.gate("/manifests/")
    began = time.monotonic()
    assert ollama.probe_update(model.name) == update
    assert time.monotonic() - began < 2
    gate.set()
    origin.put_manifest(model.repository, "latest", model.plain)
    assert ollama.probe_update(model.name).is_list is False
    assert {body for _, _, body, _ in answers(proxy, model)} == {model.plain, b""}


def test_a_list_turns_private(origin: Origin, proxy: Proxy, clients: Callable[..., A2Client]) -> None:
    """Its children and their layers go along, for all but those whom the registry still accepts."""
    model = add_list(origin, "library/turning")
    clients(proxy, lists=True).pull(model.name)
    targets = [model.blob(digest) for digest in (model.child, model.layers[0], model.license)]
    with to_registry(proxy) as connection:
        assert [get(connection, target)[0] for target in targets] == [307] * 3
        origin.set_private(model.repository, private=True)
        assert get(connection, f"/v2/{model.repository}/manifests/other", accept=TAKES)[0] == 401
        assert [get(connection, target)[0] for target in (model.target, *targets)] == [401] * 4
        own = {"authorization": f"Bearer {GOOD_TOKEN}"}
        assert [get(connection, target, **own)[0] for target in targets] == [307] * 3
        origin.stop()
        assert [get(connection, target)[0] for target in targets] == [502] * 3


@pytest.mark.long
def test_warm(origin: Origin, start_proxy: Callable[..., Proxy], clients: Callable[..., A2Client]) -> None:
    """What both classes need is recorded, and nothing of the children that most clients do not choose."""
    model = add_list(origin, "library/warmed")
    proxy = start_proxy()
    done = cli(proxy, "warm", "warmed", "--dry-run")
    assert (done.returncode, told(proxy, "ls")) == (0, [])
    assert said(proxy, "warm", "warmed").endswith("warmed:latest: recorded 1.0 MB of 1.0 MB\n")
    (row,) = told(proxy, "ls")
    assert row["held"] == "complete"
    assert origin.counters.cdn_bytes == row["size"]
    origin.stop()
    for lists in (True, False):
        clients(proxy, lists=lists).pull(model.name)


@pytest.mark.long
def test_a_list_is_refreshed(
    origin: Origin, start_proxy: Callable[..., Proxy], clients: Callable[..., A2Client]
) -> None:
    """It moves once the child that was here is here again; meanwhile clients get the old one whole."""
    proxy = start_proxy(ollama_cache_manifest_lifetime="10d", ollama_cache_refresh="10s")
    model = add_list(origin, "library/refreshed")
    clients(proxy, lists=True).pull(model.name)
    gate = origin.gate("/blobs/")
    moved = add_list(origin, "library/refreshed")
    gate.wait_held()
    with to_registry(proxy) as connection:
        assert get(connection, model.target, accept=TAKES)[2] == model.lists
    gate.set()
    proxy.wait_for_line("library/refreshed:latest moved: sha256:")
    origin.stop()
    with to_registry(proxy) as connection:
        assert get(connection, model.target, accept=TAKES)[2] == moved.lists
    clients(proxy, lists=True).pull(model.name)


def test_the_plain_manifest_is_a_child(origin: Origin, proxy: Proxy, clients: Callable[..., A2Client]) -> None:
    """The same bytes by name and as a blob: nothing is missing, whichever of them came first."""
    model = add_list(origin, "library/same")
    lists = origin.put_list(model.repository, "latest", model.children)
    for takes_lists in (False, True):
        clients(proxy, lists=takes_lists).pull(model.name)
    found = told(proxy, "show", "same")
    assert (found["held"], found["list"], found["digest"]) == ("complete", digest_of(lists), model.child)
    assert [child["held"] for child in found["children"]] == [True, False]
    origin.stop()
    for takes_lists in (False, True):
        clients(proxy, lists=takes_lists).pull(model.name)
    with to_registry(proxy) as connection:
        head = connection.request("HEAD", model.blob(model.child), [])
        assert (head.status, head.header("Content-Length")) == (200, str(len(model.children[0])))


@pytest.mark.long
def test_a_registry_of_two_names(origin: Origin, start_proxy: Callable[..., Proxy]) -> None:
    """One blob, one model, whichever name it was pulled by."""
    model = add_list(origin, "library/twice")
    upstream = f"{origin.upstream_option},{REGISTRY_COM}=https://localhost:{origin.registry_port}"
    proxy = start_proxy(ollama_cache_registries=f"registry.ollama.ai,{REGISTRY_COM}", ollama_cache_upstream=upstream)
    with connect(proxy.url, REGISTRY_COM, 443, proxy.ca_file) as connection:
        assert get(connection, model.target, accept=TAKES)[2] == model.lists
        status, headers, _ = get(connection, model.blob(model.layers[0]))
    assert status == 307
    with to_cdn(proxy) as connection:
        get(connection, headers["location"].removeprefix(f"https://{R2_HOST}"))
    proxy.wait_for_line(f"recorded {model.layers[0][7:19]}")
    requests = len(origin.counters.requests)
    with to_registry(proxy) as connection:
        assert get(connection, model.target, accept=TAKES)[2] == model.lists
        assert get(connection, model.blob(model.layers[0]))[0] == 307
    assert len(origin.counters.requests) == requests
    (row,) = told(proxy, "ls")
    assert (row["name"], row["host"]) == ("twice:latest", "registry.ollama.ai")
    proxy.stop()
    # What is stored under the one name can be asked for under the other, where only that is configured.
    upstream = upstream.partition(",")[2]
    proxy = start_proxy(ollama_cache_registries=REGISTRY_COM, ollama_cache_upstream=upstream)
    assert said(proxy, "warm", "twice").endswith("twice:latest: recorded 2.8 KB of 1.0 MB\n")
    (row,) = told(proxy, "ls")
    assert (row["name"], row["held"]) == ("twice:latest", "complete")


def test_children_in_place(origin: Origin, proxy: Proxy, clients: Callable[..., A2Client]) -> None:
    """A list that holds its manifests itself, one layer of which stands in both, and twice in one."""
    model = add_list(origin, "library/inplace")
    both = [json.loads(child) for child in model.children]
    both[0]["layers"].append(both[0]["layers"][1] | {"from": "/srv/models/x"})
    lists = origin.put_list(model.repository, "latest", both, plain=model.plain)
    clients(proxy, lists=True).pull(model.name)
    with to_registry(proxy) as connection:
        assert get(connection, model.target, accept=TAKES)[2] == lists
    origin.stop()
    clients(proxy, lists=True).pull(model.name)
