"""status_routes: one look for all who watch, and none for nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import ClientResponse, ClientSession, web
from yarl import URL

from pullthrough.monitoring.health import Health
from pullthrough.monitoring.metrics import Metrics
from pullthrough.monitoring.status import StatusView
from pullthrough.monitoring.status_page import PARTS
from pullthrough.server import status_routes
from pullthrough.server.pages import Pages
from pullthrough.server.status_routes import StatusRoutes
from tests.unit.monitoring.test_status_page import GUIDE, QUIET


class Site:
    """The pages, over a cache whose number of mismatches is `now`."""

    def __init__(self, folder: Path) -> None:
        self.looks = 0
        self.now = 0
        self.asked: list[str] = []
        """Models that pages were asked for of; none is there."""
        self.health = Health(folder, dict)
        self.pages = Pages(None)
        seen = SimpleNamespace(
            look=self._look, holdings=self._sum_up, model=self.asked.append, clients=lambda _: iter(()), client_count=0
        )
        watch = cast(StatusView, seen)
        StatusRoutes(cast(Metrics, None), self.health, watch, GUIDE).enter(self.pages)

    async def _look(self) -> Any:
        self.looks += 1
        return replace(QUIET, mismatches=self.now)

    async def _sum_up(self) -> Any:
        return QUIET.holdings

    @asynccontextmanager
    async def open(self) -> AsyncIterator[ClientSession]:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            return await self.pages.answer(request) or web.Response(status=404)

        runner = web.ServerRunner(web.Server(handle), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession("http://{}:{}".format(*runner.addresses[0])) as session:
            yield session
        await runner.cleanup()


async def event(response: ClientResponse) -> tuple[str, str]:
    """The name of the next event, and what a reader of its data sees."""
    block = (await asyncio.wait_for(response.content.readuntil(b"\n\n"), 20)).decode()
    name, *data = block.rstrip("\n").split("\n")
    assert all(line.startswith("data: ") for line in data)
    return name.removeprefix("event: "), "\n".join(line.removeprefix("data: ") for line in data)


def test_watchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is sent all parts, then those that change; ten cost as many looks as one; when they have gone, none."""
    monkeypatch.setattr(status_routes, "INTERVAL_S", 0.05)
    monkeypatch.setattr(status_routes, "HEARTBEAT", 1)

    async def main() -> None:
        site = Site(tmp_path)
        async with site.open() as session:
            async with session.get("/") as page:
                assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
            assert site.looks == 1
            watchers = [await session.get("/events") for _ in range(10)]
            for watcher in watchers:
                names = [(await event(watcher))[0] for _ in range(len(PARTS))]
                assert names == list(PARTS)
            site.now = 7
            before = site.looks
            for watcher in watchers:
                while (seen := await event(watcher))[0] == ":":
                    pass
                assert seen[0] == "health" and "7 blobs did not hash" in seen[1]
            assert site.looks - before <= 20, "expected ten watchers to share the looks"
            for watcher in watchers:
                watcher.close()
            async with asyncio.timeout(20):
                looks = -1
                while looks != site.looks:
                    looks = site.looks
                    await asyncio.sleep(0.2)

    asyncio.run(main())


def test_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchers keep no daemon from ending."""
    monkeypatch.setattr(status_routes, "INTERVAL_S", 0.05)

    async def main() -> bytes:
        site = Site(tmp_path)
        async with site.open() as session, session.get("/events") as watcher:
            await event(watcher)
            site.health.draining = True
            return await asyncio.wait_for(watcher.read(), 20)

    assert asyncio.run(main()).endswith(b"\n\n")


def test_a_head(tmp_path: Path) -> None:
    """A HEAD of the events is answered, and ends."""

    async def main() -> tuple[int, str, bytes]:
        async with Site(tmp_path).open() as session, session.head("/events") as response:
            return response.status, response.content_type, await response.read()

    assert asyncio.run(main()) == (200, "text/event-stream", b"")


def test_documentation(tmp_path: Path) -> None:
    """Its pages and pictures are there, under a policy that lets pictures of ours be loaded."""

    async def main() -> list[tuple[int, str, bool]]:
        got = []
        async with Site(tmp_path).open() as session:
            for path in (
                "/docs/",
                "/docs",
                "/docs/clients.md",
                "/docs/clients",
                "/docs/clients/",
                "/docs/status-light.png",
                "/docs/../pyproject.toml",
                "/docs/none.md",
            ):
                async with session.get(URL(path, encoded=True)) as response:
                    allowed = "img-src 'self' data:" in response.headers.get("Content-Security-Policy", "")
                    got.append((response.status, response.content_type, allowed))
        return got

    page, missing = (200, "text/html", True), (404, "application/octet-stream", False)
    assert asyncio.run(main()) == [page] * 5 + [(200, "image/png", False), missing, missing]


def test_pages(tmp_path: Path) -> None:
    """Each has the policy; a model that is not here is 404; what a query says reaches the page as it was meant."""

    async def main() -> list[tuple[int, str]]:
        site = Site(tmp_path)
        got = []
        async with site.open() as session:
            paths = (
                "/",
                "/models?q=%3Cb%3E&page=2",
                "/model?name=a/b%26c:1",
                "/model",
                "/model?name=%ff%00",
                "/clients",
                "/setup",
            )
            for path in paths:
                async with session.get(URL(path, encoded=True)) as response:
                    assert "script-src 'sha256-" in response.headers["Content-Security-Policy"]
                    assert response.content_type == "text/html"
                    got.append((response.status, await response.text()))
        assert site.asked[:2] == ["a/b&c:1", ""]
        return got

    overview, models, *missing, clients, setup = asyncio.run(main())
    assert [status for status, _ in missing] == [404, 404, 404]
    assert "run linux" in overview[1] and "run linux" in setup[1]
    assert "0 seen since the start" in clients[1]
    assert models[0] == 200 and 'value="&lt;b&gt;"' in models[1]
