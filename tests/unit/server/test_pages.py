"""pages: who is given one, and what goes with it."""

import asyncio

from aiohttp import ClientSession, web

from pullthrough.server.pages import FIELDS, Pages


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
        (
            421,
            "this cache is not known as 'evil.example': ask by its address, or let the option advertise name it so\n",
            True,
        ),
        (404, "", False),
    ]
