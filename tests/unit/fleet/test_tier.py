"""tier: a fleet's secret from its file, and an object store that is believed and asked with care."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.core.digest import Digest
from pullthrough.core.errors import SettingsError, TierError
from pullthrough.core.records import Name
from pullthrough.fleet import documents
from pullthrough.fleet.circuit_breaker import FAILURES
from pullthrough.fleet.object_store import Found, ObjectStore
from pullthrough.fleet.tier import Tier, load_secret
from pullthrough.runtime.executors import Threads
from pullthrough.upstream.client import Upstream
from pullthrough.upstream.reachability import OBJECT_STORE, Reachability, State

SECRET = b"s" * 32
DIGEST = Digest("ab" * 32)
NAME = Name("registry.ollama.ai", "library/llama3.2", "latest")


class FakeObjects:
    """An object store that has these objects, or fails."""

    def __init__(self, **found: Found | None) -> None:
        self.found = found.get("found")
        self.documents: dict[str, bytes] = {}
        self.fails = False
        self.asked = 0

    def find(self, key: str) -> Found | None:
        self.asked += 1
        if self.fails:
            raise TierError("object store: no answer")
        return self.found

    def read(self, key: str) -> bytes | None:
        return self.documents.get(key)

    def sign(self, key: str, *, lifetime_s: float) -> str:
        return f"http://store.example:8080/{key}?signed"


class Inline:
    """Threads that are none."""

    async def network(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return work(*args, **kwargs)


class Admitting:
    """An upstream that remembers whom it may connect to."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, int]] = []
        settings = {"object_store": "s3://bucket/here", "fleet_secret_file": "/s"}
        self.reachability = Reachability(parse_settings(settings, dir=Path("/d"), certs=Path("/c")))

    def admit(self, host: str, port: int) -> None:
        self.admitted.append((host, port))


def tier_of(objects: FakeObjects) -> tuple[Tier, Admitting]:
    upstream = Admitting()
    return Tier(cast(ObjectStore, objects), SECRET, cast(Threads, Inline()), cast(Upstream, upstream)), upstream


def test_a_blob_of_our_upload_is_a_source() -> None:
    """Signed, near, and of a host that may be connected to."""
    tier, upstream = tier_of(FakeObjects(found=Found(5, DIGEST.hex)))
    source = asyncio.run(tier.source(DIGEST))
    assert source is not None and source.near and documents.blob_key(DIGEST) in source.url
    assert upstream.admitted == [("store.example", 8080)]


@pytest.mark.parametrize("found", [None, Found(5, None), Found(5, "cd" * 32)], ids=["none", "unhashed", "another"])
def test_other_objects_are_none(found: Found | None) -> None:
    """What nobody has hashed, or hashed to something else, is no source."""
    tier, _ = tier_of(FakeObjects(found=found))
    assert asyncio.run(tier.source(DIGEST)) is None


def test_a_suspect_is_not_asked_for() -> None:
    """Until there are good bytes to replace it."""
    objects = FakeObjects(found=Found(5, DIGEST.hex))
    tier, _ = tier_of(objects)
    tier.mistrust(DIGEST)
    assert (asyncio.run(tier.source(DIGEST)), objects.asked, tier.counts.corrupt) == (None, 0, 1)


def test_a_store_that_fails_is_left_alone() -> None:
    """Callers get no source, and after FAILURES in a row nobody asks."""
    objects = FakeObjects()
    objects.fails = True
    tier, _ = tier_of(objects)
    assert [asyncio.run(tier.source(DIGEST)) for _ in range(FAILURES + 3)] == [None] * (FAILURES + 3)
    assert (objects.asked, tier.counts.failures, tier.is_open) == (FAILURES, FAILURES, True)


def test_forged_manifest_is_none_and_counted() -> None:
    """Whatever lies at its place."""
    objects = FakeObjects()
    objects.documents[documents.manifest_key(NAME)] = b"0" * 64 + b"\n{}"
    tier, _ = tier_of(objects)
    assert (asyncio.run(tier.manifest(NAME)), tier.counts.forged, tier.counts.manifests) == (None, 1, 0)


@pytest.mark.parametrize(
    ("mode", "data", "expected"),
    [
        pytest.param(0o644, b"s" * 32, "chmod 600", id="readable-by-others"),
        pytest.param(0o600, b"s" * 31 + b"\n", "at least 32 bytes", id="short"),
        pytest.param(0o600, None, "a readable file", id="absent"),
    ],
)
def test_bad_secret_files_are_refused(tmp_path: Path, mode: int, data: bytes | None, expected: str) -> None:
    """With what is wrong, and never with what is in them."""
    path = tmp_path / "secret"
    if data is not None:
        path.write_bytes(data)
        path.chmod(mode)
    with pytest.raises(SettingsError, match=f"fleet_secret_file: expected .*{expected}") as caught:
        load_secret(path)
    assert "sss" not in str(caught.value)


def test_secret_without_its_line_end(tmp_path: Path) -> None:
    """As an editor leaves it."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    assert load_secret(path) == SECRET


def test_whether_it_answers_is_known() -> None:
    """From its own answers, by a name without credentials; what the circuit breaker holds back is no answer."""
    objects = FakeObjects()
    tier, upstream = tier_of(objects)

    async def main() -> None:
        await tier.knock()
        assert str(upstream.reachability.find(OBJECT_STORE)).startswith("object store s3://bucket/here: up since 20")
        objects.fails = True
        for _ in range(FAILURES + 2):
            with pytest.raises(TierError):
                await tier.knock()
        found = upstream.reachability.find(OBJECT_STORE)
        assert found is not None
        assert (found.state, found.why, objects.asked) == (State.DOWN, "no answer", 1 + FAILURES)

    asyncio.run(main())
