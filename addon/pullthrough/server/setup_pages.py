"""Pages that set up a client, and the doctor's scripts, on the blob server's port.

Invariant: they are what they were when the cache started, whoever asks and however.
"""

from collections.abc import Mapping

from aiohttp import hdrs, web

from pullthrough.config.settings import Settings
from pullthrough.doctor.client_scripts import scripts
from pullthrough.pki.client_setup import SetupDocument
from pullthrough.server.pages import Handler, Pages


def add(pages: Pages, settings: Settings, documents: Mapping[str, SetupDocument]) -> None:
    """Give each document at its path, and the doctor's scripts."""
    for path, document in {**documents, **scripts(settings)}.items():
        pages.add(path, _giving(document))


def _giving(document: SetupDocument) -> Handler:
    async def give(_: web.BaseRequest) -> web.Response:
        return web.Response(body=document.body, headers={hdrs.CONTENT_TYPE: document.content_type})

    return give
