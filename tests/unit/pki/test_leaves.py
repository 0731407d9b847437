"""leaves: what clients are shown is renewed in time, in files of its own."""

import asyncio
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pullthrough.pki import leaves
from pullthrough.pki.authority import Leaf
from pullthrough.pki.leaves import Leaves
from pullthrough.pki.rollover import Rollover

HOSTS = ("registry.ollama.ai", "blobs.example")


def test_renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host has its leaf; once one is due all are issued again, and the former files are left alone."""
    issued: list[tuple[Sequence[Leaf], list[str]]] = []
    rollover = Rollover.load_or_create(tmp_path, HOSTS, now=datetime.now(UTC))

    def is_due(leaf: Leaf, now: datetime) -> bool:
        return leaf.host == HOSTS[1] and len(issued) == 1

    async def work() -> None:
        renewed = asyncio.Event()

        def on_issue(new: Sequence[Leaf], files: list[str]) -> None:
            issued.append((new, files))
            if len(issued) == 2:
                renewed.set()

        shown = Leaves(rollover, HOSTS, tmp_path, on_issue)
        assert set(shown.expiries()) == {"CA", *HOSTS}
        renewal = asyncio.create_task(shown.renew())
        async with asyncio.timeout(20):
            await renewed.wait()
        renewal.cancel()
        assert not set(issued[0][1]) & set(issued[1][1])

    monkeypatch.setattr(leaves, "LOOK_S", 0.0)
    monkeypatch.setattr(leaves, "is_due", is_due)
    asyncio.run(work())
    for found, files in issued:
        assert [leaf.host for leaf in found] == [text.partition("=")[0] for text in files] == list(HOSTS)
        for leaf, text in zip(found, files, strict=True):
            path = Path(text.partition("=")[2])
            assert path.read_bytes() == leaf.pem
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
