"""earlier: an authority that clients may still trust is told, for as long as it could sign."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from pullthrough.pki.earlier import NAME, note_authorities
from pullthrough.pki.rollover import Rollover, renew, switch

NOW = datetime(2026, 11, 28, tzinfo=UTC)
NAMES = ["registry.ollama.ai"]


def served(store: Path, certs: Path, now: datetime = NOW) -> list[str]:
    store.mkdir(exist_ok=True)
    return note_authorities(store, Rollover.load_or_create(certs, NAMES, now=now), now=now)


def test_another_authority(tmp_path: Path) -> None:
    """Told at each start with the other one, with the folder to go back to; both ways."""
    store, one, other = (tmp_path / name for name in ("store", "one", "other"))
    assert served(store, one) == served(store, one) == []
    later = NOW + timedelta(days=3)
    (warning,) = served(store, other, later)
    fingerprint = Rollover.load(one, NAMES, now=NOW).current.fingerprint
    assert f"until 2026-11-28 this store was served with another authority, SHA-256 {fingerprint} in {one}:" in warning
    assert f"--set ollama_cache_certs={one}" in warning
    assert served(store, other, later) == [warning]
    (back,) = served(store, one, later)
    assert f"in {other}: clients" in back


def test_one_that_was_replaced(tmp_path: Path) -> None:
    """In its own place, by a switch, or gone: nobody can go back to it that way."""
    store, certs = tmp_path / "store", tmp_path / "certs"
    served(store, certs)
    renew(certs, NAMES, now=NOW)
    assert served(store, certs) == []
    switch(certs, now=NOW)
    assert served(store, certs) == []
    certs.rename(tmp_path / "gone")
    assert served(store, certs) == []


def test_a_note_that_is_damaged(tmp_path: Path) -> None:
    """It is written anew."""
    store = tmp_path / "store"
    store.mkdir()
    for text in ("", "[1]", '{"AB": 1}'):
        (store / NAME).write_text(text)
        assert served(store, tmp_path / "certs") == []
