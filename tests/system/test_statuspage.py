"""The status page in a real Chromium: alive, without a complaint, on any screen, and deaf to hostile names."""

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pullthrough.core.records import ManifestRecord, Name
from pullthrough.store.store import Store
from tests.e2e.conftest import MB, add_model, unique
from tests.support.a2 import A2Client
from tests.support.browser import browsing
from tests.support.origin import Origin
from tests.support.proxy import Proxy

pytestmark = pytest.mark.long

SIZE: Final = 24 * MB
RATE: Final = 6 * MB
LONG: Final = "a-model-with-a-name-that-no-phone-has-the-room-for-" + "x" * 80
HOSTILE: Final = "<img/src='x'/onerror='document.title=1'><script>document.title=2</script>"
PROGRESS: Final = "document.querySelector('#recordings progress')"
FITS: Final = "document.documentElement.scrollWidth <= window.innerWidth"
PAPER: Final = "getComputedStyle(document.body).backgroundColor"


def fill(folder: Path) -> None:
    """A store with a long name, a private one, and a hostile one, which no registry has: it is not read back."""
    store = Store.open(folder)
    for number, name in enumerate((LONG, HOSTILE, "secret")):
        layer = {"digest": f"sha256:{hashlib.sha256(name.encode()).hexdigest()}", "size": 1000 + number}
        record = ManifestRecord.parse(json.dumps({"layers": [layer]}).encode(), "", now=time.time())
        assert record is not None
        record = record._replace(denied=name == "secret", pulled=time.time())
        store.put_manifest(Name("registry.ollama.ai", f"library/{name}", "latest"), record)
    store.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Origin, Proxy]]:
    """A slow origin, and a cache that holds models."""
    fill(tmp_path / "store")
    with Origin(tmp_path / "origin") as origin, Proxy(tmp_path, origin, front=True) as proxy:
        origin.rate_total = RATE
        yield origin, proxy


def test_the_page(pair: tuple[Origin, Proxy], tmp_path: Path) -> None:
    """A recording's progress is shown without a reload, then the model; hostile names are texts; any screen will do."""
    origin, proxy = pair
    model = add_model(origin, unique(SIZE))

    def pull() -> None:
        A2Client(proxy.url, proxy.ca_file, tmp_path / "client").pull(model.name)

    async def watch() -> list[str]:
        async with browsing(tmp_path / "profile") as browser:
            await browser.show(1200, 900)
            await browser.open(f"http://127.0.0.1:{proxy.front_port}/")
            await browser.wait_for("document.getElementById('link')?.textContent == 'live'")
            await browser.value("window.same = true")
            pulling = asyncio.create_task(asyncio.to_thread(pull))
            seen = await browser.wait_for(f"{PROGRESS}?.value")
            assert model.name in await browser.value("document.querySelector('#recordings').textContent")
            assert 0 < seen < SIZE
            await browser.wait_for(f"{PROGRESS}?.value > {seen}")
            await pulling
            await browser.wait_for("document.querySelector('#recordings small').textContent == 'nothing'")
            await browser.wait_for(f"document.querySelector('#models').textContent.includes('{model.name}')")
            await browser.wait_for("document.querySelector('#saved svg rect') != null")
            assert await browser.value("window.same")

            text = await browser.value("document.querySelector('#models').textContent")
            assert "onerror" not in text and "1 private, 1.0 KB" in text and "secret" not in text
            assert await browser.value("document.title") == "ollama-cache"
            assert await browser.value("document.images.length") == 0

            light = await browser.value(PAPER)
            assert await browser.value(FITS)
            await browser.show(360, 740, dark=True, scale=2)
            assert await browser.wait_for("window.innerWidth == 360")
            assert await browser.value(FITS)
            assert await browser.value(PAPER) != light

            await browser.send("Page.reload")
            await browser.wait_for("window.same !== true && document.getElementById('link')?.textContent == 'live'")
            assert browser.complaints == []
            # The policy holds, and what it forbids is told here.
            await browser.value("document.body.append(Object.assign(document.createElement('img'), {src: '/metrics'}))")
            await browser.value(f"fetch('http://localhost:{proxy.front_port}/metrics').catch(() => 0)")
            deadline = time.monotonic() + 20
            while len(browser.complaints) < 4:
                assert time.monotonic() < deadline, browser.complaints
                await asyncio.sleep(0.05)
            return browser.complaints

    told = " ".join(asyncio.run(watch()))
    assert "img-src data:" in told and "connect-src 'self'" in told and "policy: " in told


def test_a_name_of_a_stranger(pair: tuple[Origin, Proxy], tmp_path: Path) -> None:
    """A site whose name leads to the cache's address gets nothing to read."""
    _, proxy = pair

    async def watch() -> str:
        async with browsing(tmp_path / "profile", "--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
            await browser.open(f"http://evil.example:{proxy.front_port}/")
            return str(await browser.wait_for("document.body?.textContent"))

    assert asyncio.run(watch()).startswith(f"this cache is not known as 'evil.example:{proxy.front_port}': ask by")
