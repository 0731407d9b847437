"""Walk every lie of the table through every entrance of the core: nobody is given what is not his, nobody gets a page
for a model, and what is really there can be pulled afterwards."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from pullthrough.core.errors import CacheError
from pullthrough.core.routes import BlobRoute
from pullthrough.library.eviction import SMALL
from tests.lies import LIES, LOGIN, MARK, PLACES
from tests.support.liar import GOOD, HOST, SIZE, Cache, Model, cache

SCENES = [(state, private) for state in ("held", "cold", "half") for private in (False, True)]
BIG: Final = 2 * SMALL
"""More than what is given only once it is whole."""


def test_the_table_is_long_enough() -> None:
    """Every place has its share, and no lie stands there twice."""
    assert len(LIES) >= 150 and len(set(map(str, LIES))) >= 150
    assert all(count >= 15 for count in Counter(lie.place for lie in LIES).values())
    assert {lie.place for lie in LIES} == set(PLACES)


@pytest.mark.parametrize(("state", "private"), SCENES, ids=lambda value: str(value).replace("True", "private"))
def test_lies(state: str, private: bool, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """No leak, no page in a file, no blob that stays unpullable."""
    # Each lie is walked in one scene; the deep profile walks it in all of them.
    every = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else len(SCENES)
    chosen = list(enumerate(LIES))[SCENES.index((state, private)) % every :: every]

    async def scenario() -> dict[str, str]:
        believed: list[str] = []
        walked: Counter[str] = Counter()
        async with cache(tmp_path) as here:
            for number, lie in chosen:
                model = here.origin.add(number, private=private, size=BIG if state == "half" else SIZE)
                await _prepare(here, model, state)
                model.lie = lie
                believed += [f"{lie}: {what}" for what in await _walk(here, model, state)]
                walked[lie.place] += 1
        assert believed == []
        return {place: str(count) for place, count in walked.items()}

    record_property("lies", (f"{state} {'private' if private else 'public'}", asyncio.run(scenario())))


async def _prepare(here: Cache, model: Model, state: str) -> None:
    owner = GOOD if model.private else None
    if state == "held":
        assert await here.pull(model, owner) == model.blob
        recording = here.recorder.find(model.digest)
        if recording is not None:
            await recording.over.wait()
        assert here.store.held(model.digest) is not None
    if state == "half":
        await here.ask("GET", f"/v2/{model.repository}/manifests/latest", authorization=owner)
        ingest = here.store.ingest(model.digest)
        ingest.begin(len(model.blob))
        half = len(model.blob) // 2
        ingest.write_at(0, model.blob[:half])
        ingest.mark([(0, half)])
        ingest.close()


async def _walk(here: Cache, model: Model, state: str) -> list[str]:
    """What went wrong with a model that is lied about."""
    found: list[str] = []
    callers = (None, GOOD) if model.private else (None,)
    for caller in callers:
        here.upstream._down_until.clear()
        found += await _listeners(here, model, caller)
    here.upstream._down_until.clear()
    with contextlib.suppress(CacheError):
        await here.grants.source(model.digest, (HOST, model.repository))
    record = here.store.blob(model.digest)
    if model.private and record is not None and record.public:
        found.append("a private blob became public")
    if not model.private and state == "held" and not _is_public(here, model):
        found.append("a public blob became private")
    model.lie = None
    if await here.pull(model, GOOD if model.private else None) != model.blob:
        found.append("a page in a file")
    if model.private:
        for method in ("GET", "HEAD"):
            answer = await here.ask(method, f"/v2/{model.repository}/blobs/{model.digest}")
            if answer.status != 401:
                found.append(f"leak: {method} {answer.status} to nobody, afterwards")
    return found


def _is_public(here: Cache, model: Model) -> bool:
    return here.grants.is_public(HOST, BlobRoute(model.repository, model.digest))


async def _listeners(here: Cache, model: Model, caller: str | None) -> list[str]:
    found: list[str] = []
    may = caller is not None or not model.private
    for method in ("GET", "HEAD"):
        target = f"/v2/{model.repository}/manifests/latest"
        answer = await here.ask(method, target, authorization=caller)
        body = await here.body(answer)
        if answer.status == 200 and method == "GET" and body != model.manifest and not body.startswith(b"{"):
            found.append(f"{method} manifest: {body[:40]!r}")
        if answer.status >= 400 and MARK in body:
            found.append(f"{method} manifest: a page's text")
        found += [f"{method} manifest: {name}" for name, value in answer.headers if _is_strange(name, value)]
    for kind, method, new in (
        ("blobs", "HEAD", False),
        ("blobs", "GET", False),
        ("blobs", "GET", True),
        ("chunksums", "GET", False),
    ):
        here.upstream._down_until.clear()
        target = f"/v2/{model.repository}/{kind}/{model.digest}"
        answer = await here.ask(method, target, authorization=caller, new=new)
        try:
            body = await here.body(answer)
        except CacheError:
            body = b""
        door = f"{method} {kind}{' by a new client' if new else ''}"
        found += [f"{door}: {name}" for name, value in answer.headers if _is_strange(name, value)]
        told = model.lie is not None and model.lie.place == "head" and method == "HEAD"  # by the lie itself
        if not may and answer.status < 400 and here.store.held(model.digest) is not None and not told:
            found.append(f"leak: {door} {answer.status} to nobody")
        # Of a big blob that begins before it is whole only the digest tells bytes of the right length from others.
        streamed = len(model.blob) > SMALL and len(body) == len(model.blob)
        if kind == "blobs" and not streamed and body and body != model.blob and (answer.status < 400 or MARK in body):
            found.append(f"{door}: a page for a model, {answer.status} {body[:40]!r}")
        if kind == "blobs" and answer.status >= 400 and body:
            found.append(f"{door}: {answer.status} with a text")
    return found


def _is_strange(name: str, value: str) -> bool:
    return LOGIN in value or not value.isascii() or not value.isprintable()
