"""service: what becomes of a request when upstream does not answer; against an upstream that only hangs."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.core.cdn_loop import LoopGuard
from pullthrough.recording.recorder import Recorder
from pullthrough.registry import service
from pullthrough.registry.factory import build_registry
from pullthrough.registry.messages import Request
from pullthrough.store.store import Store
from pullthrough.upstream.client import Upstream

HOST = "registry.ollama.ai"
DIGEST = "sha256:" + "0123456789abcdef" * 4


class HangingUpstream:
    """Never answers."""

    loop = LoopGuard("ollama-cache-test")

    async def _hang(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    ask = obtain = _hang


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("kind", ["blobs", "chunksums"])
def test_a_blob_request_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str) -> None:
    """A registry that does not answer is a 504 without text, long before the 30 s after which a probe gives up."""
    assert service.DEADLINE_S < 30
    monkeypatch.setattr(service, "DEADLINE_S", 0.02)
    store = Store.open(tmp_path / "store")
    try:
        settings = parse_settings({}, dir=tmp_path, certs=tmp_path)
        core = build_registry(settings, store, cast(Upstream, HangingUpstream()), cast(Recorder, None)).registry
        answer = asyncio.run(core.answer(Request(method, "https", HOST, f"/v2/library/x/{kind}/{DIGEST}", {})))
    finally:
        store.close()
    if (method, kind) == ("HEAD", "chunksums"):
        assert answer is None, "expected to be passed through"
        return
    assert answer is not None
    assert (answer.status, answer.body, answer.length) == (504, b"", 0)


def test_a_transfer_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x/transfer waits for a head as long as it takes, and six errors within a second end its pull."""
    monkeypatch.setattr(service, "DEADLINE_S", 0.02)
    store = Store.open(tmp_path / "store")
    request = Request("GET", "https", HOST, f"/v2/library/x/blobs/{DIGEST}", {"user-agent": "ollama-transfer/1.0"})

    async def ask() -> None:
        settings = parse_settings({}, dir=tmp_path, certs=tmp_path)
        core = build_registry(settings, store, cast(Upstream, HangingUpstream()), cast(Recorder, None)).registry
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(core.answer(request), 0.2)

    try:
        asyncio.run(ask())
    finally:
        store.close()
