"""rules: where each bound lies, and that faults do not hide each other. tests/e2e/test_doctor.py plants the faults."""

from dataclasses import replace
from typing import Any, Final

import pytest

from pullthrough.doctor.rules import FEW_DESCRIPTORS, ISSUER, LEAF_S, NEAR_END_S, SKEW_S, Leg, ServerFacts, of_server

OURS: Final = f"{ISSUER} 00c0ffee"
CACHE: Final = "cache.lan:8080"
WELL: Final = ServerFacts(
    authority="",
    expires_s=NEAR_END_S,
    issuer=OURS,
    store="",
    owner="",
    unwritable="",
    index="",
    quarantined=0,
    running=True,
    elsewhere=(),
    leg=Leg(address=CACHE, issuer=OURS, left_s=LEAF_S),
    port="",
    taken=True,
    local=(),
    advertised="",
    refused="",
    descriptors=FEW_DESCRIPTORS,
    upstream="",
    displaced="",
    blob_host="",
    object_store="",
    ranges="",
    unsigned="",
    bypassed=0,
    skew_s=-SKEW_S,
    disk=100,
    free=50,
    min_free=50,
)
BOUNDS: Final[dict[str, dict[str, Any]]] = {
    "the certificate authority nears its end": {"expires_s": NEAR_END_S - 1},
    "the cache's certificate was not made anew": {"leg": Leg(address=CACHE, issuer=OURS, left_s=LEAF_S - 1)},
    "there are few descriptors": {"descriptors": FEW_DESCRIPTORS - 1},
    "the clock is wrong": {"skew_s": -SKEW_S - 1},
    "the disk is full": {"free": 49},
    "min_free is more than the disk has": {"min_free": 100},
}


def test_a_full_disk_can_be_told_to_keep_less() -> None:
    """Both findings name the option that makes room without a model that goes."""
    for facts in ({"free": 49}, {"min_free": 100}):
        (found,) = of_server(replace(WELL, **facts))
        assert "ollama_cache_min_free=SIZE" in found.mend and " B" in found.why


def test_the_registry_and_the_blob_host_are_down() -> None:
    """Each has its own reason and its own mend."""
    found = of_server(replace(WELL, upstream="registry: refused", blob_host="blobs: no address", ranges="none"))
    assert [finding.what for finding in found] == ["the registry cannot be reached", "the blob host cannot be reached"]
    assert "firewall" in found[0].mend and "DNS" in found[1].mend


def test_paths_are_quoted() -> None:
    """A folder's name is no command of whoever copies the hint."""
    stopped = replace(WELL, running=False, elsewhere=("/srv/a;b",), leg=Leg(address=CACHE, reached="refused"))
    (found,) = of_server(stopped)
    assert "ollama-cache doctor --dir '/srv/a;b'," in found.mend


def test_bounds_are_well() -> None:
    """At the edge of each bound nothing is wrong; a daemon that tells no descriptors has enough."""
    assert of_server(WELL) == of_server(replace(WELL, skew_s=SKEW_S, descriptors=0)) == []


@pytest.mark.parametrize(("what", "facts"), BOUNDS.items(), ids=BOUNDS.keys())
def test_bounds(what: str, facts: dict[str, Any]) -> None:
    """Behind it that is found, and nothing else."""
    assert [finding.what for finding in of_server(replace(WELL, **facts))] == [what]


def test_several() -> None:
    """Faults do not hide each other, and what only will be wrong is not grave."""
    found = of_server(replace(WELL, expires_s=0, quarantined=1, ranges="x", free=0, object_store="x"))
    assert [finding.grave for finding in found] == [False, False, True, True, False]


def test_one_cause() -> None:
    """What follows from another fault is not told beside it."""
    assert [finding.what for finding in of_server(replace(WELL, upstream="x", ranges="x"))] == [
        "the registry cannot be reached"
    ]
    other = Leg(address=CACHE, issuer=f"{ISSUER} 0ther", left_s=-1)
    assert [finding.what for finding in of_server(replace(WELL, leg=other, port="x"))] == [
        "the running cache has another authority"
    ]
