"""signed_urls: what was handed out is recognised to the byte, and given to nobody who may not have it."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullthrough.core.digest import Digest
from pullthrough.registry.signed_urls import GRACE_S, SignedUrls
from pullthrough.store.store import Store
from pullthrough.upstream.data_stream import Source

A, B = Digest("a" * 64), Digest("b" * 64)
HOST = "r2.example"
TARGET = f"/ollama/docker/registry/v2/blobs/sha256/aa/{'a' * 64}/data?X-Amz-Credential=k%2F20261128&X-Amz-Signature=ab"
ADDRESS = f"https://{HOST}{TARGET}"
NOW, DAY = 1_800_000_000.0, 86_400.0
PUBLIC = {A}


async def obtain() -> NoReturn:
    raise AssertionError


class FakeLedger:
    """Keeps addresses in memory."""

    def __init__(self) -> None:
        self.addresses: dict[str, tuple[Digest, float]] = {}

    def put_address(self, key: str, digest: Digest, until: float) -> None:
        self.addresses[key] = digest, until

    def drop_address(self, key: str) -> None:
        del self.addresses[key]


def made(
    ledger: FakeLedger | None = None, is_public: Callable[[Digest], bool] = PUBLIC.__contains__, **options: int
) -> SignedUrls:
    return SignedUrls(b"s" * 32, ledger or FakeLedger(), is_public, **options)  # type: ignore[arg-type]


def test_public_ones_are_shared_while_they_last() -> None:
    """With as much time left as is asked for."""
    addresses = made()
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.shared(A, left_s=DAY / 2, now=NOW) == ADDRESS
    assert addresses.shared(A, left_s=DAY / 2, now=NOW + DAY / 2 + 1) is None
    assert addresses.shared(A, left_s=600, now=NOW + DAY / 2 + 1) == ADDRESS
    assert addresses.shared(B, left_s=0, now=NOW) is None


def test_private_ones_are_their_callers() -> None:
    """Nobody else is given one, and nobody at all beyond its end."""
    addresses = made()
    addresses.add(B, ADDRESS, expires=NOW + DAY, public=False, obtain=obtain, now=NOW)
    assert addresses.shared(B, left_s=0, now=NOW) is None
    found = addresses.recognise(HOST, TARGET, now=NOW + DAY - 1)
    assert found is not None and (found.digest, found.source, found.obtain) == (B, Source(ADDRESS), obtain)
    assert addresses.recognise(HOST, TARGET, now=NOW + DAY) is None


def test_a_public_one_is_recognised_longer_than_it_lives() -> None:
    """A pull that is under way goes on here, where nobody else looks at the end."""
    addresses = made()
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.recognise(HOST, TARGET, now=NOW + DAY + GRACE_S - 1) is not None
    assert addresses.recognise(HOST, TARGET, now=NOW + DAY + GRACE_S) is None


def test_a_public_one_that_has_become_private_ends_as_upstream_says() -> None:
    """Its holder has it for as long as the object store would have let him, and not a second longer."""
    addresses = made(is_public=lambda _: False)
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.recognise(HOST, TARGET, now=NOW + DAY - 1) is not None
    assert addresses.recognise(HOST, TARGET, now=NOW + DAY) is None


def test_what_is_shared_is_recognised() -> None:
    """An address that had to make room for newer ones is not handed out any more, and takes no memory."""
    addresses = made(limit=3)
    wanted = [Digest(f"{number:064x}") for number in range(5)]
    for number, digest in enumerate(wanted):
        addresses.add(digest, f"{ADDRESS}{number}", expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert [addresses.shared(digest, left_s=0, now=NOW) is not None for digest in wanted] == [
        *(False, False, True, True, True)
    ]
    assert len(addresses._shared) == 3


@given(st.integers(0, len(TARGET) - 1), st.characters(min_codepoint=33, max_codepoint=126))
def test_every_character_counts(index: int, character: str) -> None:
    """Nothing but what was handed out is recognised."""
    addresses = made()
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    altered = TARGET[:index] + character + TARGET[index + 1 :]
    assert (addresses.recognise(HOST, altered, now=NOW) is not None) == (altered == TARGET)


@pytest.mark.parametrize("host", ["evil.example", "r2.example.evil", "r2", ""])
def test_the_host_counts(host: str) -> None:
    """The same target elsewhere is another address."""
    addresses = made()
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.recognise(host, TARGET, now=NOW) is None


@pytest.mark.parametrize("tail", ["é漢", "\udcff", "#", "%zz", " ", "?", ""])
def test_odd_targets(tail: str) -> None:
    """Whatever a client asks for, and a registry hands out: recognised if it is that, and no failure if not."""
    addresses = made()
    for target in (f"/x?{tail}", f":x?{tail}", f"@x?{tail}"):
        assert addresses.recognise(HOST, target, now=NOW) is None
    addresses.add(A, f"{ADDRESS}{tail}", expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.recognise(HOST, f"{TARGET}{tail}", now=NOW) is not None


@pytest.mark.parametrize("address", [f"https://{HOST}:443{TARGET}", f"https://R2.Example{TARGET}"])
def test_spellings_of_the_authority(address: str) -> None:
    """A client asks the server that the address names, however it is spelt."""
    addresses = made()
    addresses.add(A, address, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert addresses.recognise(HOST, TARGET, now=NOW) is not None


def test_memory_and_disk_are_bounded() -> None:
    """What has expired goes, and beyond the limit the oldest."""
    ledger = FakeLedger()
    addresses = made(ledger, limit=3)
    for number in range(5):
        addresses.add(A, f"{ADDRESS}{number}", expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    assert [addresses.recognise(HOST, f"{TARGET}{number}", now=NOW) is not None for number in range(5)] == [
        *(False, False, True, True, True)
    ]
    later = NOW + DAY + GRACE_S
    addresses.add(B, f"{ADDRESS}last", expires=later + DAY, public=True, obtain=obtain, now=later)
    assert len(ledger.addresses) == len(addresses._obtain) == 1
    assert not addresses._shared.keys() - {B}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"
    data = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"X-Amz" not in data and b"20261128" not in data, "expected no signed address on disk"


def test_a_restart(folder: Path) -> None:
    """The store remembers the HMAC alone: recognised, and its source is the address itself."""
    store = Store.open(folder)
    SignedUrls(store.secret, store.ledger, store.is_public).add(
        A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW
    )
    store.close()
    store = Store.open(folder)
    try:
        addresses = SignedUrls(store.secret, store.ledger, store.is_public)
        found = addresses.recognise(HOST, TARGET, now=NOW)
        assert found is not None and (found.digest, found.source.url, found.obtain) == (A, ADDRESS, None)
        assert addresses.shared(A, left_s=0, now=NOW) is None
        assert SignedUrls(b"t" * 32, store.ledger, store.is_public).recognise(HOST, TARGET, now=NOW) is None
    finally:
        store.close()


def test_obtain_is_what_was_given() -> None:
    """It is called by who records, not before."""
    addresses = made()
    addresses.add(A, ADDRESS, expires=NOW + DAY, public=True, obtain=obtain, now=NOW)
    found = addresses.recognise(HOST, TARGET, now=NOW)
    assert found is not None and found.obtain is not None
    with pytest.raises(AssertionError):
        asyncio.run(found.obtain())  # type: ignore[arg-type]
