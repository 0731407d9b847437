"""A real Chromium without a window, told what to do by the DevTools protocol.

Invariant: what the page has complained of (exceptions, console errors, blocked loads, violations of its policy) is in
`complaints`; no browser outlives its `with` block. Knows no page.
"""

import asyncio
import base64
import contextlib
import itertools
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

_START_S: Final = 30.0
_WAIT_S: Final = 20.0
_LISTENING: Final = b"DevTools listening on "


class Browser:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session = ""

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        answer = await asyncio.wait_for(waiting, _WAIT_S)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    async def attach(self) -> None:
        """Take a tab and listen to what it complains of."""
        target = (await self.send("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.send("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Audits"):
            await self.send(f"{domain}.enable")

    async def open(self, url: str) -> None:
        """Go there."""
        result = await self.send("Page.navigate", url=url)
        assert "errorText" not in result, result

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; a promise is waited for."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, expression: str, *, timeout_s: float = _WAIT_S) -> Any:
        """What it gives once that is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := await self.value(expression)):
            if time.monotonic() > deadline:
                text = await self.value("document.documentElement.outerHTML")
                raise TimeoutError(f"expected {expression}, got {value!r} in {text}")
            await asyncio.sleep(0.05)
        return value

    async def show(self, width: int, height: int, *, dark: bool = False, scale: int = 1) -> None:
        """Be a screen of so many pixels; a narrow one is a phone's."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def press_tab(self) -> None:
        """Go on to what the keyboard reaches next."""
        for kind in ("rawKeyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    async def photograph(self) -> bytes:
        """What the screen shows, as PNG."""
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"])

    async def listen(self) -> None:
        """Sort what comes, for ever."""
        async for message in self._socket:
            event = message.json()
            if event.get("id") in self._waiting:
                self._waiting.pop(event["id"]).set_result(event)
                continue
            parameters = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    self.complaints.append(f"exception: {parameters['exceptionDetails']}")
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                    self.complaints.append(f"console: {parameters['args']}")
                case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                    self.complaints.append(f"log: {parameters['entry']['text']}")
                case "Audits.issueAdded" if "ContentSecurityPolicy" in parameters["issue"]["code"]:
                    self.complaints.append(f"policy: {parameters['issue']['details']}")


@contextlib.asynccontextmanager
async def browsing(folder: Path, *arguments: str) -> AsyncIterator[Browser]:
    """A browser with an empty profile in `folder`; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    process = await asyncio.create_subprocess_exec(
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--no-proxy-server", "--hide-scrollbars",
        "--remote-debugging-port=0", f"--user-data-dir={folder}", *arguments, "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        async with asyncio.timeout(_START_S):
            while not (line := await process.stderr.readline()).startswith(_LISTENING):
                assert line, "expected a listening Chromium, got its end"
        address = line.removeprefix(_LISTENING).decode().strip()
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            browser = Browser(socket)
            listening = asyncio.create_task(browser.listen())
            await browser.attach()
            yield browser
            listening.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        # What it still says goes nowhere: a full pipe would keep it from ending.
        await process.communicate()
