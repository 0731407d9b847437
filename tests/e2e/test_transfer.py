"""Models are carried from one cache to another that never sees a registry."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pullthrough.library.exporter import export_bundle_file, export_tree, select
from pullthrough.library.import_commit import Fate
from pullthrough.library.snapshot import Snapshot
from pullthrough.store.store import Store
from tests.e2e.conftest import MB, add_model, get, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.carrying import import_into
from tests.support.modelsfolder import manifest_of, pull_list, read_current, sha256
from tests.support.modern import ModernClient
from tests.support.origin import Origin
from tests.support.proxy import Proxy

NewClient = Callable[..., A2Client]


@pytest.mark.long
def test_across_an_air_gap(
    origin: Origin, start_proxy: Callable[..., Proxy], new_client: NewClient, tmp_path: Path
) -> None:
    """What an Ollama pulled is imported, and others pull it with the registry away; exported beside the daemon too.

    The blobs of a private import are nobody's while the registry cannot be asked.
    """
    model, private = add_model(origin, unique(3 * MB), b"{{ .Prompt }}"), add_model(origin, unique(MB))
    pulled = {}
    for each in (model, private):
        pulled[each.name] = A2Client(
            None, origin.ca_file, tmp_path / each.name, min_part=MB, max_part=10 * MB, resolve=origin.resolve
        )
        pulled[each.name].pull(each.name)
    with closing(Store.open(tmp_path / "proxy" / "store")) as store:
        for each, public in ((model, True), (private, False)):
            (outcome,) = import_into(store, pulled[each.name].directory, public=public, now=1.0)
            assert outcome.fate is Fate.IMPORTED
    origin.stop()

    proxy = start_proxy()
    client = new_client(proxy)
    client.pull(model.name)
    assert client.manifest_path(model.name).read_bytes() == model.manifest
    with to_registry(proxy) as connection:
        for target in (private.manifest_target, private.blob_target):
            status, _, _ = get(connection, target)
            assert status >= 500

    inventory = Snapshot.read(proxy.store)
    cargo = select(inventory, [model.name])
    export_tree(inventory, cargo, tmp_path / "out")
    exported = A2Client(None, origin.ca_file, tmp_path / "out")
    assert exported.manifest_path(model.name).read_bytes() == model.manifest
    for blob in model.blobs:
        assert exported.blob_path(blob).read_bytes() == client.blob_path(blob).read_bytes()

    export_bundle_file(inventory, cargo, tmp_path / "carried.tar")
    proxy.stop()
    with closing(Store.open(tmp_path / "far")) as store:
        (outcome,) = import_into(store, tmp_path / "carried.tar", now=1.0)
        assert outcome.fate is Fate.IMPORTED
    proxy.options["ollama_cache_dir"] = tmp_path / "far"
    proxy.options["ollama_cache_offline"] = True
    proxy.start()
    far = new_client(proxy)
    far.pull(model.name)
    assert far.blob_path(model.layer).read_bytes() == client.blob_path(model.layer).read_bytes()


@pytest.mark.long
def test_a_list_across_an_air_gap(origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """The folder of a newer Ollama is imported, and another one pulls the list with no registry: the same folder.

    A child that nobody carried in is nobody's there.
    """
    path = "registry.ollama.ai/library/listed/latest"
    children = {"ggml": [b"x" * 100, b"{}"], "llamacpp": [b"0123456789abcdef" * 200_000, b"{{ .Prompt }}", b"{}"]}
    document = pull_list(tmp_path / "models", path, children, pulled=["llamacpp"])
    with closing(Store.open(tmp_path / "proxy" / "store")) as store:
        (outcome,) = import_into(store, tmp_path / "models", now=1.0)
        assert outcome.fate is Fate.IMPORTED
    origin.stop()
    proxy = start_proxy(ollama_cache_offline=True)
    client = ModernClient(proxy.url, proxy.ca_file, tmp_path / "client", min_part=MB, max_part=10 * MB)
    client.pull("listed")
    assert read_current(client.directory) == read_current(tmp_path / "models")
    assert read_current(client.directory)[path].document == document
    with to_registry(proxy) as connection:
        status, _, body = get(connection, f"/v2/library/listed/blobs/sha256:{sha256(manifest_of(*children['ggml']))}")
        assert (status >= 500, body) == (True, b"")
        status, _, _ = get(connection, "/v2/library/listed/manifests/latest")
        assert status >= 500  # a list is nothing for a client that takes none
