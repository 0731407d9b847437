"""pages: who is given one, and what goes with it."""

import asyncio
import socket

import pytest
from aiohttp import ClientSession, web

from pullthrough.config.settings import Endpoint
from pullthrough.server.pages import FIELDS, Pages, is_ours, own_names


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        pytest.param(None, True, id="HTTP/1.0"),
        pytest.param("10.0.0.1:9200", True, id="IPv4"),
        pytest.param("[::1]:9200", True, id="IPv6"),
        pytest.param("[fe80::1%25eth0]", True, id="IPv6 with a zone"),
        pytest.param("localhost:9200", True, id="localhost"),
        pytest.param("BOX", True, id="our name in capitals"),
        pytest.param("box.local.:9200", True, id="by mDNS, with a final dot"),
        pytest.param("cache.lan", True, id="advertised"),
        pytest.param("evil.example", False, id="a stranger's name"),
        pytest.param("box.evil.example", False, id="a name below a stranger's"),
        pytest.param("localhost.evil.example:9200", False, id="a name that begins like ours"),
        pytest.param("127.1", False, id="half an address"),
        pytest.param("0x7f000001", False, id="an address as a number"),
        pytest.param("evil.example@10.0.0.1", False, id="a user"),
        pytest.param("[bad", False, id="nonsense"),
        pytest.param("", False, id="nothing"),
        pytest.param(":9200", False, id="a port alone"),
    ],
)
def test_is_ours(monkeypatch: pytest.MonkeyPatch, host: str | None, expected: bool) -> None:
    """Addresses and our names, and nothing that a stranger could have led here."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    assert is_ours(host, own_names(Endpoint("http", "cache.lan", 0))) is expected


def test_a_page() -> None:
    """Each answer carries the fields of all pages, whoever is refused and however; other paths are nobody's."""
    pages = Pages(None)

    async def page(_: web.BaseRequest) -> web.Response:
        return web.Response(text="seen", headers={"Cache-Control": "private"})

    async def handle(request: web.BaseRequest) -> web.Response:
        return await pages.answer(request) or web.Response(status=404)

    async def ask() -> list[tuple[int, str, bool]]:
        pages.add("/page", page)
        runner = web.ServerRunner(web.Server(handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        got = []
        async with ClientSession("http://{}:{}".format(*runner.addresses[0])) as session:
            for method, path, headers in (
                ("GET", "/page?x", {}),
                ("HEAD", "/page", {}),
                ("POST", "/page", {}),
                ("GET", "/page", {"Host": "evil.example"}),
                ("GET", "/pages", {}),
            ):
                async with session.request(method, path, headers=headers) as response:
                    guarded = {name: response.headers.get(name) for name in FIELDS} == {
                        **FIELDS,
                        **({"Cache-Control": "private"} if response.ok else {}),
                    }
                    got.append((response.status, await response.text(), guarded))
        await runner.cleanup()
        return got

    assert asyncio.run(ask()) == [
        (200, "seen", True),
        (200, "", True),
        (405, "", True),
        (421, "expected an address or a name of this cache, got 'evil.example'\n", True),
        (404, "", False),
    ]
