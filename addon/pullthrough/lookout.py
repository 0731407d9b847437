"""What the blob server's port shows of the daemon itself, as pages.

Invariant: nothing here changes anything, and nothing private is named. Knows HTTP and which part tells what.
"""

from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

from pullthrough.metrics import Metrics
from pullthrough.pages import Handler, Pages
from pullthrough.vitals import Vitals

SHARE: Final = Path(__file__).parent / "share"


class Lookout:
    """The pages of one daemon."""

    def __init__(self, metrics: Metrics, vitals: Vitals) -> None:
        self._metrics = metrics
        self._vitals = vitals

    def enter(self, pages: Pages) -> None:
        """Take the paths."""
        pages.add("/metrics", self._expose)
        pages.add("/healthz", self._live)
        pages.add("/readyz", self._ready)
        pages.add("/alerts.yml", _file("alerts.yml", "text/yaml"))
        pages.add("/dashboard.json", _file("dashboard.json", "application/json"))

    async def _expose(self, request: web.BaseRequest) -> web.Response:
        body, content_type = await self._metrics.expose(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def _live(self, _: web.BaseRequest) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.BaseRequest) -> web.Response:
        problems = await self._vitals.problems()
        return web.Response(status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n")


def _file(name: str, content_type: str) -> Handler:
    body = (SHARE / name).read_bytes()

    async def give(_: web.BaseRequest) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return give
