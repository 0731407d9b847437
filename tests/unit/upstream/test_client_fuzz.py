"""Whatever client answers: an error of ours or a checked value, never a traceback, and no more memory than is set."""

import asyncio
import tracemalloc
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullthrough.core.errors import UpstreamError
from pullthrough.core.records import ManifestRecord
from pullthrough.upstream import client as module
from tests.unit.upstream.test_client import (
    BLOB_TARGET,
    CLOSE,
    DATA_TARGET,
    MANIFEST_TARGET,
    SIGNED,
    World,
    read,
    world,
)

MEMORY: int = 20 << 20

_VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        (b"0", b"-1", b"1" * 25, b"bytes 0-0/1", b"bytes 0-%d/%d" % (1 << 62, 1 << 63), b"bytes */0", b"gzip", b"br")
    ),
    st.sampled_from((SIGNED.encode(), b"//", b"https://[", b"https://x:99999/", b"http://127.0.0.1/", b"\xff\xfe")),
).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
_NAMES = st.sampled_from(
    (
        b"Content-Length",
        b"Content-Range",
        b"Content-Encoding",
        b"Content-Type",
        b"Transfer-Encoding",
        b"Location",
        b"ETag",
        b"Retry-After",
        b"WWW-Authenticate",
        b"Docker-Content-Digest",
    )
)
_BODIES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        (
            b"[" * 50_000,
            b'{"layers": [' + b"{}," * 200_000 + b"{}]}",
            b'{"layers": [{"digest": "sha256:' + b"a" * 64 + b'", "size": 1e400}]}',
            b'{"errors": ' + b'{"a":' * 9000,
            b"\x1f\x8b\x08" + bytes(100),
        )
    ),
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """A response, more or less."""
    status = draw(st.one_of(st.sampled_from((200, 206, 302, 401, 403, 404, 416, 429, 500)), st.integers(0, 999)))
    fields = draw(st.lists(st.tuples(_NAMES, _VALUES), max_size=5))
    body = draw(_BODIES)
    if draw(st.booleans()):
        fields.append((b"Content-Length", b"%d" % len(body)))
    head = b"".join(b"%b: %b\r\n" % field for field in fields)
    return b"HTTP/1.1 %03d X\r\n%b\r\n%b%b" % (status, head, body, CLOSE)


async def _guarded(work: Coroutine[Any, Any, Any]) -> None:
    problem = ""
    try:
        await asyncio.wait_for(work, 20)
    except UpstreamError as error:
        problem = str(error)
    assert problem.isprintable() and len(problem) < 10_000


async def _ask(at: World) -> None:
    response = await at.ask()
    for value in response.headers.values():
        value.encode("latin-1")
    ManifestRecord.parse(response.body, response.headers.get("Content-Type", ""), now=0.0)


async def _obtain(at: World) -> None:
    _, stream = await at.obtain()
    if stream is not None:
        stream.close()


async def _open(at: World) -> None:
    stream = await at.open(length=None)
    if stream.stop - stream.start < 1 << 20:
        await read(stream)
    stream.close()


@settings(max_examples=60)
@given(st.lists(answers(), min_size=1, max_size=3))
def test_any_answer(given_answers: list[bytes]) -> None:
    """Of the registry and of the blob host, to whatever we ask."""

    async def scenario() -> None:
        async with world() as at:
            for answer in given_answers:
                at.registry.answers = {MANIFEST_TARGET: answer, BLOB_TARGET: answer}
                at.cdn.answers = {DATA_TARGET: answer}
                await _guarded(_ask(at))
                await _guarded(_obtain(at))
                await _guarded(_open(at))

    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            # A pause before each further try adds nothing to what is answered, and a second to the test.
            patch.setattr(module, "PAUSES_S", (0, 0))
            asyncio.run(scenario())
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
