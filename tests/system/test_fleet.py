"""What the caches of a fleet share: a real S3 server, a real mitmdump for each cache."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.e2e.conftest import add_model, unique
from tests.support.a2 import A2Client
from tests.support.client2 import Client2
from tests.support.goclient import PullError
from tests.support.legacy import A1Client
from tests.system.fleet import MIB, Fleet, NewClient, blob_key, fleet, manifest_key, new_client, shared_fleet

__all__ = ["fleet", "new_client", "shared_fleet"]

pytestmark = pytest.mark.long


def test_what_one_has_recorded_serves_all(fleet: Fleet, new_client: NewClient) -> None:
    """A records; B serves it while upstream is down; A that has lost its disk refills with no byte of upstream's."""
    model = fleet.recorded_by_a(new_client, 12 * MIB, 3000)
    assert {*map(blob_key, model.blobs), manifest_key(model)} <= set(fleet.listing())
    assert fleet.read(blob_key(model.layer)) == fleet.origin.blob(model.layer).read(0, 12 * MIB)
    fleet.origin.stop()
    new_client(fleet.b).pull(model.name)
    fleet.a.stop()
    shutil.rmtree(fleet.a.store)
    fleet.a.start()
    new_client(fleet.a).pull(model.name)
    fleet.origin.start()
    new_client(fleet.a).pull(model.name)
    assert (fleet.origin.counters.cdn_bytes, fleet.origin.counters.registry_bytes) == (0, 0)
    lines = fleet.a.output + fleet.b.output
    assert not [line for line in lines if fleet.secret.read_text() in line or "X-Amz-Signature" in line]


def test_tampered_objects_are_no_hit(fleet: Fleet, new_client: NewClient) -> None:
    """A blob with other bytes is quarantined and replaced; a manifest that the fleet has not signed is ignored."""
    model = fleet.recorded_by_a(new_client, 9 * MIB)
    key = blob_key(model.layer)
    attributes = {"sha256": model.layer.removeprefix("sha256:")}
    obstore.put(fleet.objects, key, bytes(9 * MIB), attributes=attributes)
    client = new_client(fleet.b)
    with contextlib.suppress(PullError):
        client.pull(model.name)
    fleet.b.wait_for_line("quarantined")
    client.pull(model.name)  # it checks every digest
    fleet.b.wait_for_line(f"uploaded {model.layer[7:19]}")
    assert fleet.read(key) == fleet.origin.blob(model.layer).read(0, 9 * MIB)

    signed = fleet.recorded_by_a(new_client, MIB)
    evil = add_model(fleet.origin, unique(MIB))
    forged = fleet.read(manifest_key(signed)).replace(b'"confirmed": 1', b'"confirmed": 9')
    obstore.put(fleet.objects, manifest_key(signed), forged)
    obstore.put(fleet.objects, manifest_key(evil), fleet.read(manifest_key(model)))
    for victim in (signed, evil):
        new_client(fleet.b).pull(victim.name)
        fleet.b.wait_for_line(f"{manifest_key(victim)}: expected a document signed by this fleet")
        assert [request for request in fleet.origin.counters.requests if request.target == victim.manifest_target]


def test_no_client_is_sent_to_a_private_object_store(fleet: Fleet, tmp_path: Path, new_client: NewClient) -> None:
    """With offload the cache serves large parts itself where the object store's address is not public, and says so."""
    scale = {"min_part": 10_000_000, "max_part": 10_000_000}
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (A2Client, scale | {"version": "0.34.2"}),
        (A1Client, scale),
        (Client2, {}),
    ]
    for kind, options in kinds:
        model = fleet.recorded_by_a(new_client, 20_000_000)
        kind(fleet.a.url, fleet.a.ca_file, tmp_path / kind.__name__, **options).pull(model.name)
        assert fleet.origin.counters.cdn_bytes == 0
    # Once, and perhaps in an earlier test of this fleet.
    assert any("clients are not redirected to it (offload)" in line for line in fleet.a.output)
    assert not [line for line in fleet.a.output if "X-Amz" in line or "detail=offload" in line]
