"""Every page in a real Chromium, at desk and phone, light and dark: nothing is complained of, and everybody can use it.

By default each page is opened once. With OLLAMA_CACHE_TEST_PAGES=all, each is opened on each screen with 0, 6, 300 and
10,000 models, which takes minutes. What axe-core finds is looked at where it can be had: from the file that
OLLAMA_CACHE_TEST_AXE names, else from npm.
"""

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.support import bigstore, showcase
from tests.support.browser import Browser, browsing
from tests.support.proxy import Proxy, patched

pytestmark = pytest.mark.long

AXE: Final = "axe-core@4"
FITS: Final = "document.documentElement.scrollWidth <= window.innerWidth"
REACHABLE: Final = "[...document.querySelectorAll('a[href], button, input:not([type=hidden]), summary')]"
"""What a keyboard must reach, unless it is folded away."""
BUTTONS: Final = "[...document.querySelectorAll('pre.copy button')]"
NAME: Final = "((each) => each.outerHTML.slice(0, 200))"


class Screen(NamedTuple):
    """What a page is looked at on."""

    width: int
    dark: bool


DESK, PHONE = Screen(1280, dark=False), Screen(390, dark=True)
SCREENS: Final = (DESK, PHONE, Screen(1280, dark=True), Screen(390, dark=False))
PATHS: Final = ("/", "/models", "/model?name={model}", "/clients", "/setup", "/docs/operate.md")
FEW: Final = {
    "empty": [("/", PHONE)],
    "six": [
        ("/", DESK),
        ("/models?sort=size", PHONE),
        ("/model?name={model}", PHONE),
        ("/clients", PHONE),
        ("/setup", DESK),
        ("/docs/operate.md", PHONE),
    ],
}
EVERY: Final = [(path, screen) for path in PATHS for screen in SCREENS]
ALL: Final = {
    # A page that is not there is an error to Chromium.
    "empty": [(path, screen) for path, screen in EVERY if "{model}" not in path],
    "six": EVERY,
    "300": EVERY,
    "10000": EVERY,
}
VISITS: Final = ALL if os.environ.get("OLLAMA_CACHE_TEST_PAGES") == "all" else FEW
MODELS: Final = {"empty": "", "six": "llama3.2", "300": "m7", "10000": "m9999"}
"""One that is stored in each."""


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, "" where it cannot be had."""
    if named := os.environ.get("OLLAMA_CACHE_TEST_AXE"):
        return Path(named).read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    options = ("--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=10000", "--ignore-scripts")
    if npm is not None:
        command = [npm, "install", *options, "--prefix", folder, AXE]
        subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    source = folder / "node_modules" / "axe-core" / "axe.min.js"
    return source.read_text(encoding="utf-8") if source.exists() else ""


@pytest.fixture(scope="module", params=VISITS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Proxy]]:
    """A cache with so many models."""
    kind, folder = str(request.param), tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        patch = ""
        if kind == "six":
            showcase.fill(folder / "store")
            patch = showcase.PATCH
        elif kind != "empty":
            bigstore.fill(folder / "store", models=int(kind), layers=6, day=86.4)
        program = patched(folder, patch)
        yield kind, stack.enter_context(Proxy(folder, front=True, program=program, ollama_cache_offline="true"))


async def reached_by_keyboard(browser: Browser) -> None:
    """Press Tab until all that can be used was reached."""
    await browser.value("window.scrollTo(0, 0); document.activeElement.blur()")
    wanted = await browser.value(f"{REACHABLE}.filter((each) => each.checkVisibility()).map({NAME})")
    seen: set[str] = set()
    for _ in range(len(wanted) + 5):
        await browser.press_tab()
        seen.add(await browser.value(f"{NAME}(document.activeElement)"))
    assert set(wanted) <= seen, set(wanted) - seen


async def visit(browser: Browser, url: str, screen: Screen, axe: str) -> Sequence[Any]:
    """Look at one page; what axe finds wrong with it."""
    await browser.show(screen.width, 844, dark=screen.dark)
    began = time.monotonic()
    await browser.open(url)
    await browser.wait_for("document.readyState == 'complete' && document.querySelector('main h1') != null")
    took = time.monotonic() - began
    print(f"{took * 1000:.0f} ms {screen} {url}")
    if await browser.value("document.getElementById('link') != null"):
        await browser.wait_for("document.getElementById('link').textContent == 'live'")
    assert await browser.value(FITS), f"{url} is wider than {screen}"
    await browser.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert await browser.value(FITS), f"{url} with all unfolded is wider than {screen}"
    await reached_by_keyboard(browser)
    copied = await browser.value(f"{BUTTONS}.map((each) => {{ each.click(); return each.textContent; }})")
    assert set(copied) <= {"Copied", "Selected"}
    assert browser.complaints == []
    if not axe:
        return []
    await browser.value(f"{axe}; 0")
    found = await browser.value("axe.run().then((found) => JSON.stringify(found.violations))")
    browser.complaints.clear()  # of what axe does itself
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in json.loads(found)]


def test_pages(site: tuple[str, Proxy], axe: str, tmp_path: Path) -> None:
    """No complaint, no sideways scrolling, all within reach of a keyboard; then what axe says."""
    kind, proxy = site

    async def look() -> dict[str, Any]:
        found = {}
        async with browsing(tmp_path / "profile") as browser:
            await browser.open(f"{proxy.url}/")  # which leads to the pages' port
            await browser.wait_for(f"location.port == '{proxy.front_port}' && document.querySelector('h1') != null")
            for path, screen in VISITS[kind]:
                url = f"http://127.0.0.1:{proxy.front_port}{path.format(model=MODELS[kind])}"
                if violations := await visit(browser, url, screen, axe):
                    found[f"{path} {screen}"] = violations
        return found

    assert asyncio.run(look()) == {}
    if not axe:
        pytest.skip("all well but for axe-core, which is missing: no npm, or no way to its registry")
