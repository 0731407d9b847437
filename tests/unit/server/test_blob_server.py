"""blob_server: names and addresses, and where it listens; how it answers is in e2e/test_front."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pullthrough.config.options import parse_settings
from pullthrough.core.cache_status import CacheStatus, Outcome
from pullthrough.core.errors import SettingsError
from pullthrough.registry.messages import Answer
from pullthrough.runtime import platform
from pullthrough.server.blob_server import BlobServer, _in_words, blob_origin, is_name
from tests.support.proxy import free_port


@pytest.mark.parametrize(
    ("authority", "expected"),
    [
        ("cache", True),
        ("cache.lan:9200", True),
        ("localhost:9200", True),
        ("10.0.0.1", False),
        ("10.0.0.1:9200", False),
        ("[::1]:9200", False),
        ("[fe80::1%25eth0]:9200", False),
        ("", False),
        (":9200", False),
        ("[bad", False),
    ],
)
def test_is_name(authority: str, expected: bool) -> None:
    """Host fields that are names, and those that are addresses, nothing or nonsense."""
    assert is_name(authority) is expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1", "http://10.0.0.1:9200"),
        ("2001:db8::1", "http://[2001:db8::1]:9200"),
        ("169.254.1.1", "http://169.254.1.1:9200"),
        ("fe80::1%eth0", ""),
        ("fe80::1", ""),
    ],
)
def test_blob_origin(address: str, expected: str) -> None:
    """A local address becomes an origin, unless a client would have to know its own link's name."""
    assert blob_origin(address, 9200) == expected


@contextmanager
def server(**texts: str) -> Iterator[BlobServer]:
    made = BlobServer(parse_settings(texts, dir=Path("/d"), certs=Path("/c")))
    yield made
    asyncio.run(made.close())


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({}, [None, "http://127.0.0.1:{port}", None, None]),
        ({"listen": "off"}, [None, None, None, None]),
        ({"listen": "0.0.0.0:{port}"}, ["http://10.0.0.1:{port}", "http://127.0.0.1:{port}", None, None]),
        ({"advertise": "cache.lan"}, ["http://cache.lan:{port}"] * 4),
        ({"advertise": "[2001:db8::1]:80"}, ["http://[2001:db8::1]:80"] * 4),
    ],
)
@pytest.mark.parametrize("contained", [False, True])
def test_address_for_other_caches(
    monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], expected: list[str | None], contained: bool
) -> None:
    """Where other caches find this one, by the address that they have reached; in a container only if advertised."""
    monkeypatch.setattr(platform, "in_container", lambda: contained)
    port = free_port()
    asked = {"listen": f"127.0.0.1:{port}", "front": ""} | {k: v.format(port=port) for k, v in texts.items()}
    wanted = [None if contained and "advertise" not in texts else text and text.format(port=port) for text in expected]
    with server(**asked) as made:
        assert [
            made.address_for(address) for address in ("10.0.0.1", "127.0.0.1", "2001:db8::1", "fe80::1%2")
        ] == wanted


def test_listens_at_every_door() -> None:
    """Each port of `front` too, and on every family that `localhost` has here; nowhere when switched off."""
    ports = free_port(), free_port()
    with server(listen=f"localhost:{ports[0]}", front=f"{ports[1]}=registry.ollama.ai") as made:
        assert str(made) == f"localhost:{ports[0]} (registry.ollama.ai), localhost:{ports[1]} (registry.ollama.ai)"
        for port in ports:
            for entry in {entry[4][:2] for entry in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}:
                try:
                    socket.create_connection(entry, timeout=5).close()
                except OSError:
                    assert ":" in str(entry[0]), "expected only a machine without IPv6 to refuse"
    with server(listen="off") as made:
        assert str(made) == "off"
    with (
        pytest.raises(SettingsError, match=r"got \[2001:db8::1\]:9200: "),
        server(listen="[2001:db8::1]:9200", front=""),
    ):
        pass


def test_all_addresses() -> None:
    """No host stands for both families."""
    port = free_port()
    with server(listen=f":{port}", front="off") as made:
        assert str(made) == f"*:{port}"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        try:
            socket.create_connection(("::1", port), timeout=5).close()
        except OSError as error:
            pytest.skip(f"no IPv6 on this machine: {error}")


def test_a_port_in_use_frees_the_others() -> None:
    """The error names the address, and what was opened before is closed again."""
    first = free_port()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        message = f"expected a free address of this machine, got {taken}: it is taken by "
        with pytest.raises(SettingsError, match=message), server(listen=f"127.0.0.1:{first},{taken}", front=""):
            pass
    socket.create_server(("127.0.0.1", first)).close()


def test_an_unknown_host() -> None:
    """A name that does not resolve."""
    message = r"got absent\.invalid:9200: "
    with pytest.raises(SettingsError, match=message), server(listen="absent.invalid:9200", front=""):
        pass


def test_a_private_model_is_refused_in_words() -> None:
    """A challenge that nobody can meet here becomes a refusal whose text Ollama shows; a blob's has no text."""
    challenged = Answer(401, CacheStatus(Outcome.MISS), (("WWW-Authenticate", "Bearer"),), b"{}", 2)
    told = _in_words(challenged, "/v2/owner/secret/manifests/latest", "registry.ollama.ai")
    assert told.status == 403 and isinstance(told.body, bytes)
    assert b"registry.ollama.ai/owner/secret is private, or there is no such model" in told.body
    silent = _in_words(challenged, f"/v2/owner/secret/blobs/sha256:{'a' * 64}", "registry.ollama.ai")
    assert (silent.status, silent.headers, silent.body) == (403, (), b"")
    other = replace(challenged, status=404)
    assert _in_words(other, "/v2/owner/secret/manifests/latest", "registry.ollama.ai") is other
