"""probe_server: what looking leaves behind, which is nothing, and what it does not judge."""

import socket
from pathlib import Path
from typing import Final

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.config.settings import Endpoint
from pullthrough.doctor.probe_server import _advertised_problem, _index_problem, _owner
from pullthrough.net.address_policy import local_ports
from pullthrough.store.index import DATABASE, Index

FOLDERS: Final = {"dir": Path("/store"), "certs": Path("/certs")}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """The file of an index that was closed."""
    made, _, _ = Index.open(tmp_path / "index")
    made.close()
    return tmp_path / "index" / DATABASE


def damage(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[4096:8192] = bytes(4096)
    file.write_bytes(whole)


def test_a_look_at_the_index_changes_nothing(index: Path, tmp_path: Path) -> None:
    """Whether it is whole or not, no file comes, goes or is written to."""
    for problem in (False, True):
        before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
        assert bool(_index_problem(tmp_path)) is problem
        assert {path.name: path.read_bytes() for path in index.parent.iterdir()} == before
        damage(index)


def test_an_index_with_a_journal_is_not_judged(index: Path, tmp_path: Path) -> None:
    """What is in the journal may mend it, and only a writer may put that in."""
    damage(index)
    index.with_name(f"{DATABASE}-wal").write_bytes(b"x")
    assert _index_problem(tmp_path) == ""


def test_what_is_absent_is_well(tmp_path: Path) -> None:
    """Before the first start there is nothing to find fault with."""
    assert _index_problem(tmp_path / "none") == _owner(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("proxy", "texts", "local"),
    [
        ("", {"listen": ":9200"}, ()),
        ("127.0.0.1", {"listen": ":9200"}, ("port 8080 (127.0.0.1)",)),
        ("::1", {"listen": "localhost:9200"}, ("port 9200 (localhost)", "port 8080 (::1)")),
        ("10.0.0.1", {"listen": "127.0.0.1:9200,10.0.0.1:9200"}, ()),
        ("", {"listen": "off"}, ()),
    ],
)
def test_local(proxy: str, texts: dict[str, str], local: tuple[str, ...]) -> None:
    """A port is of this machine alone where each of its addresses is."""
    assert local_ports(Endpoint("http", proxy, 8080), parse_settings(texts, **FOLDERS)) == local


def test_advertised() -> None:
    """An address of this machine is tried; one of another, as of a router that leads here, cannot be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = {
            host: _advertised_problem(parse_settings({"listen": f":{port}", "advertise": host}, **FOLDERS))
            for host in ("127.0.0.1", "192.0.2.1", "", "cache.invalid")
        }
    assert [bool(problem) for problem in found.values()] == [False, False, False, True]
    assert found["cache.invalid"].startswith("cache.invalid: ")
