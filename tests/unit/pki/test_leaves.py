"""leaves: what clients are shown is renewed in time, in files of its own."""

import asyncio
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

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


def test_clock_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Set forward or back, at the next look clients are shown what is valid then; unless the CA itself is not."""
    now = datetime.now(UTC)
    issued: list[Sequence[Leaf]] = []
    rollover = Rollover.load_or_create(tmp_path, HOSTS, now=now)
    shown = Leaves(rollover, HOSTS, tmp_path, lambda found, files: issued.append(found))

    def validity() -> tuple[datetime, datetime]:
        leaf = x509.load_pem_x509_certificates(issued[-1][0].pem)[0]
        return leaf.not_valid_before_utc, leaf.not_valid_after_utc

    shown.look(now)
    assert len(issued) == 1
    for count, step in enumerate((timedelta(days=200), timedelta(days=3), timedelta(days=3000)), start=2):
        shown.look(now + step)
        start, end = validity()
        assert len(issued) == count and start <= now + step < end
    shown.look(now - timedelta(days=400))
    assert len(issued) == 4 and "could not be renewed, which is tried again in a minute" in caplog.text
    assert "CA" in shown.expiries()
    shown.look(now)
    start, end = validity()
    assert len(issued) == 5 and start <= now < end
