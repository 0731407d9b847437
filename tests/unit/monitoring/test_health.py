"""health: what keeps clients away from a daemon."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pullthrough.monitoring import health
from pullthrough.monitoring.health import Disk, Health
from pullthrough.store.layout import write_marker

FAR = datetime.now(UTC) + timedelta(days=30)


def test_problems(tmp_path: Path) -> None:
    """Nothing, a store that has gone, a certificate that has ended, and the daemon's own end."""
    write_marker(tmp_path)
    ends = {"CA": FAR}

    async def ask() -> list[list[str]]:
        made = Health(tmp_path, lambda: ends)
        found = [await made.problems()]
        made.draining = True
        ends["registry.ollama.ai"] = datetime(2020, 1, 2, tzinfo=UTC)
        return [*found, await made.problems()]

    assert asyncio.run(ask()) == [
        [],
        ["draining", "certificate of registry.ollama.ai: expired at 2020-01-02 00:00 UTC"],
    ]
    gone = Health(tmp_path / "gone", dict)
    assert asyncio.run(gone.problems()) == ["store: No such file or directory"]
    (tmp_path / "ollama-cache.json").unlink()
    assert asyncio.run(Health(tmp_path, dict).problems()) == ["store: no store any more, ollama-cache.json has gone"]


def test_missing_folders_are_made_again(tmp_path: Path) -> None:
    """While the cache runs; a closed one stays closed."""
    write_marker(tmp_path)
    assert asyncio.run(Health(tmp_path, dict).problems()) == []
    assert (tmp_path / "public" / "blobs").is_dir()
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_a_disk_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All who ask meanwhile wait for one thread, and not for ever."""
    answers, asked = threading.Event(), []

    def look(folder: Path) -> Disk:
        asked.append(folder)
        answers.wait(20)
        return Disk(1)

    monkeypatch.setattr(health, "_look", look)
    monkeypatch.setattr(health, "PATIENCE_S", 0.05)
    monkeypatch.setattr(health, "FRESH_S", 0.0)

    async def ask() -> list[list[str]]:
        made = Health(tmp_path, dict)
        found = [await made.problems() for _ in range(3)]
        answers.set()
        monkeypatch.setattr(health, "PATIENCE_S", 20.0)
        return [*found, await made.problems()]

    assert asyncio.run(ask()) == [["store: no answer in 0 s"]] * 3 + [[]]
    assert asked == [tmp_path]
