"""What is left of a recording, when upstream's word on the blob's length is another: the blob can be pulled."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pullthrough.core.errors import CacheError
from tests.support.liar import SIZE, Cache, Model, cache


def leave(here: Cache, model: Model, length: int) -> Path:
    """A partial that takes the blob for so long, with bytes that are not the blob's; its file."""
    ingest = here.store.ingest(model.digest)
    ingest.begin(length)
    ingest.write_at(0, b"?" * 1000)
    ingest.mark([(0, 1000)])
    ingest.close()
    return ingest.partial_path


async def pull(here: Cache, model: Model) -> bytes:
    """The blob, by a client that has not asked for the manifest, and tries again."""
    for _ in range(6):
        here.upstream._down_until.clear()
        answer = await here.ask("GET", f"/v2/{model.repository}/blobs/{model.digest}")
        try:
            body = await here.body(answer)
        except CacheError:
            continue
        if answer.status == 200:
            return body
    raise AssertionError("expected the blob, got failures")


async def ask_manifest_first(here: Cache, model: Model) -> bytes:
    return await here.pull(model, None)


@pytest.mark.parametrize("length", [1500, SIZE - 1, SIZE + 1, 3 * SIZE])
@pytest.mark.parametrize("how", [ask_manifest_first, pull], ids=["the manifest tells", "only the source tells"])
def test_a_partial_of_another_length(
    tmp_path: Path, length: int, how: Callable[[Cache, Model], Awaitable[bytes]]
) -> None:
    """It is not defended: the blob comes whole, and nothing of the partial is in it or stays."""

    async def scenario() -> None:
        async with cache(tmp_path) as here:
            model = here.origin.add(1, private=False)
            path = leave(here, model, length)
            assert await how(here, model) == model.blob
            recording = here.recorder.find(model.digest)
            if recording is not None:
                await recording.over.wait()
                await recording.closed()
            assert here.store.held(model.digest) is not None
            assert not path.exists()

    asyncio.run(scenario())


def test_a_partial_of_the_right_length_is_used(tmp_path: Path) -> None:
    """What it has is not asked for again."""

    async def scenario() -> None:
        async with cache(tmp_path) as here:
            model = here.origin.add(1, private=False)
            ingest = here.store.ingest(model.digest)
            ingest.begin(SIZE)
            ingest.write_at(0, model.blob[: SIZE // 2])
            ingest.mark([(0, SIZE // 2)])
            ingest.close()
            before = here.recorder.counters.upstream_bytes
            assert await pull(here, model) == model.blob
            assert here.recorder.counters.upstream_bytes - before == SIZE - SIZE // 2

    asyncio.run(scenario())
