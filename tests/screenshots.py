"""The pictures of the pages in docs/: `python -m tests.screenshots` takes them anew, with a Chromium.

Of a real cache that holds the models of `support.showcase` while a client pulls another one, and of one that is empty.
"""

import asyncio
import tempfile
import threading
from pathlib import Path
from typing import Final

from tests.e2e.conftest import MB, add_model, unique
from tests.support import showcase
from tests.support.a2 import A2Client
from tests.support.browser import Browser, browsing
from tests.support.origin import Origin
from tests.support.proxy import Proxy, patched

DOCS: Final = Path(__file__).parents[1] / "docs"
SIZE: Final = 60 * MB
RATE: Final = 4 * MB
LIVE: Final = "document.getElementById('link').textContent == 'live'"
FIRST_BYTES: Final = f"{LIVE} && document.querySelector('#recordings progress')?.value > 20e6"


async def take(
    browser: Browser, address: str, name: str, *, width: int, height: int = 0, dark: bool = False, until: str = "true"
) -> None:
    """Write a picture of a page: its first `height` pixels, or all of it."""
    scale = 2 if width < 600 else 1
    await browser.show(width, height or 900, dark=dark, scale=scale)
    await browser.open(address)
    await browser.wait_for(f"document.readyState == 'complete' && document.querySelector('h1') != null && ({until})")
    await browser.show(width, height or await browser.value("document.body.scrollHeight"), dark=dark, scale=scale)
    (DOCS / name).write_bytes(await browser.photograph())


async def picture_stored(proxy: Proxy, folder: Path) -> None:
    """A cache with models, one of which is being recorded."""
    page = f"http://127.0.0.1:{proxy.front_port}"
    async with browsing(folder) as browser:
        await take(browser, f"{page}/", "status-light.png", width=1180, height=860, until=FIRST_BYTES)
        await take(browser, f"{page}/", "status-dark-phone.png", width=390, height=844, dark=True, until=FIRST_BYTES)
        await take(browser, f"{page}/model?name=llama3.2", "status-model.png", width=1180)


async def picture_empty(proxy: Proxy, folder: Path) -> None:
    """One without."""
    async with browsing(folder) as browser:
        await take(
            browser, f"http://127.0.0.1:{proxy.front_port}/", "status-empty.png", width=1180, height=620,
            until=LIVE,
        )  # fmt: skip


def main() -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with Origin(folder / "origin") as origin:
            model = add_model(origin, unique(SIZE), repository="library/phi4-mini")
            origin.rate_total = RATE
            showcase.fill(folder / "stored" / "store")
            program = patched(folder, showcase.PATCH)
            with Proxy(folder / "stored", origin, front=True, program=program) as proxy:
                client = A2Client(proxy.url, proxy.ca_file, folder / "client")
                pulling = threading.Thread(target=client.pull, args=(model.name,))
                pulling.start()
                asyncio.run(picture_stored(proxy, folder / "profile"))
                origin.rate_total = None
                pulling.join()
            empty = Proxy(folder / "empty", origin, front=True, ollama_cache_advertise="cache.lan:9200")
            empty.port = 3128  # which the picture shows
            with empty:
                asyncio.run(picture_empty(empty, folder / "second profile"))


if __name__ == "__main__":
    main()
