"""The pages of the blob server's port about the daemon itself.

Invariant: nothing here changes anything. The state is read once a second for all watchers, and not at all without one.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

from pullthrough.monitoring.health import Health
from pullthrough.monitoring.manual import START
from pullthrough.monitoring.metrics import Metrics
from pullthrough.monitoring.status import StatusView
from pullthrough.monitoring.status_page import MOST, SHARE, ModelQuery, StatusPage
from pullthrough.pki.client_setup import SetupGuide
from pullthrough.server.pages import Handler, Pages
from pullthrough.upstream.reachability import fetching

INTERVAL_S: Final = 1.0
HEARTBEAT: Final = 15
"""Frames without a change until watchers are sent one all the same: that shows which have gone."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What all watchers are sent about one moment."""

    number: int
    parts: dict[str, str]
    """As of StatusPage."""
    change: bytes
    """Events of what differs from the frame before."""
    made: float
    """Monotonic seconds."""
    is_empty: bool = False
    """Nothing is stored, and nothing is being recorded."""


class StatusRoutes:
    """The pages of one daemon."""

    def __init__(self, metrics: Metrics, health: Health, watch: StatusView, guide: SetupGuide) -> None:
        self._guide = guide
        self._metrics = metrics
        self._health = health
        self._watch = watch
        self._page = StatusPage()
        self._frame = Frame(0, {}, b"", -math.inf)
        self._making: asyncio.Task[Frame] | None = None

    def enter(self, pages: Pages) -> None:
        """Take the paths."""
        pages.add("/", self._show)
        pages.add("/model", self._model)
        for place, handler in (("/models", self._models), ("/clients", self._clients), ("/setup", self._setup)):
            pages.add(place, handler)
            pages.add(f"{place}/", _elsewhere(place))
        for name in self._page.manual.pages:
            pages.add(f"/docs/{name}", self._explaining(name))
            # As people write it who have seen the page somewhere else.
            for spelling in (name.removesuffix(".md"), f"{name.removesuffix('.md')}/"):
                pages.add(f"/docs/{spelling}", _elsewhere(f"/docs/{name}"))
            if name == START:
                pages.add("/docs/", self._explaining(name))
                pages.add("/docs", _elsewhere("/docs/"))
        for name, path in self._page.manual.pictures.items():
            pages.add(f"/docs/{name}", _file(path, "image/png"))
        pages.add("/events", self._follow)
        pages.add("/metrics", self._expose)
        pages.add("/healthz", self._live)
        pages.add("/readyz", self._ready)
        pages.add("/alerts.yml", _file(SHARE / "alerts.yml", "text/yaml"))
        pages.add("/dashboard.json", _file(SHARE / "dashboard.json", "application/json"))

    # --- for people

    async def _show(self, _: web.BaseRequest) -> web.Response:
        is_fresh = time.monotonic() - self._frame.made < INTERVAL_S
        frame = self._frame if is_fresh else await self._next()
        return self._html(self._page.overview(frame.parts, self._guide, welcome=frame.is_empty))

    async def _models(self, request: web.BaseRequest) -> web.Response:
        holdings = await self._watch.holdings()
        return self._html(self._page.models(holdings, ModelQuery.parse(request.query), time.time()))

    async def _model(self, request: web.BaseRequest) -> web.Response:
        model = self._watch.model(request.query.get("name", ""))
        if model is None:
            return self._html(self._page.missing(), status=404)
        return self._html(self._page.model(model, self._watch.pullers(model.name), time.time()))

    async def _clients(self, _: web.BaseRequest) -> web.Response:
        rows = list(self._watch.clients(MOST))
        return self._html(self._page.clients(rows, self._watch.client_count, time.time()))

    async def _setup(self, _: web.BaseRequest) -> web.Response:
        return self._html(self._page.setup(self._guide))

    def _explaining(self, name: str) -> Handler:
        async def explain(_: web.BaseRequest) -> web.Response:
            return self._html(self._page.docs(name), policy=self._page.docs_policy)

        return explain

    def _html(self, text: str, *, status: int = 200, policy: str = "") -> web.Response:
        fields = {"Content-Security-Policy": policy or self._page.policy}
        return web.Response(text=text, status=status, content_type="text/html", headers=fields)

    async def _follow(self, _: web.BaseRequest) -> web.Response:
        return web.Response(body=self._events(), content_type="text/event-stream", charset="utf-8")

    async def _events(self) -> AsyncIterator[bytes]:
        """Server-sent events (WHATWG HTML section 9.2): all parts, then those that change."""
        frame = await self._next()
        yield _encode(frame.parts)
        while not self._health.draining:
            before, frame = frame, await self._next()
            if frame.number != before.number + 1:
                yield _encode(frame.parts)  # a slow watcher has missed some
            elif frame.change or frame.number % HEARTBEAT == 0:
                yield frame.change or b":\n\n"

    async def _next(self) -> Frame:
        """Return the next frame, the same for all watchers."""
        if self._making is None or self._making.done():
            self._making = asyncio.get_running_loop().create_task(self._make(), name="look")
        return await asyncio.shield(self._making)

    async def _make(self) -> Frame:
        before = self._frame
        await asyncio.sleep(before.made + INTERVAL_S - time.monotonic())
        sight = await self._watch.look()
        parts = self._page.parts(sight)
        changed = {name: part for name, part in parts.items() if part != before.parts.get(name)}
        self._frame = Frame(before.number + 1, parts, _encode(changed), time.monotonic(), sight.is_empty)
        return self._frame

    # --- for programs

    async def _expose(self, request: web.BaseRequest) -> web.Response:
        body, content_type = await self._metrics.expose(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def _live(self, _: web.BaseRequest) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.BaseRequest) -> web.Response:
        problems, services = await self._health.problems(), await self._health.services()
        serving = f"serving: no, {'; '.join(problems)}" if problems else "serving: yes"
        lines = [serving, f"fetching: {fetching(services)}", *map(str, services)]
        return web.Response(status=503 if problems else 200, text="\n".join(lines) + "\n")


def _encode(parts: dict[str, str]) -> bytes:
    """Return an event for each part, named after it."""
    lines = (
        f"event: {name}\n{''.join(f'data: {line}\n' for line in part.splitlines())}\n" for name, part in parts.items()
    )
    return "".join(lines).encode()


def _elsewhere(location: str) -> Handler:
    async def lead(_: web.BaseRequest) -> web.Response:
        return web.Response(status=308, headers={hdrs.LOCATION: location})

    return lead


def _file(path: Path, content_type: str) -> Handler:
    body = path.read_bytes()
    charset = None if content_type.startswith("image/") else "utf-8"

    async def give(_: web.BaseRequest) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset=charset)

    return give
