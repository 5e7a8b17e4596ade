"""Headless Chromium, spoken to over its debugging protocol; for tests, which are skipped where it is not installed."""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
]  # fmt: skip


class Tab:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.requested: list[str] = []
        self.complaints: list[str] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; requests and complaints are noted meanwhile."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        given = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(given["request"]["url"])
        elif message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.complaints.append(given["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"]))

    async def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Goes to a page."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.ask(f"{domain}.enable")
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        await self.ask("Page.navigate", url=url)
        await self.wait_for("location.href !== 'about:blank' && document.readyState !== 'loading'")

    async def value(self, expression: str) -> Any:
        """What JavaScript says, awaited."""
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, expression: str, *, seconds: float = 60.0) -> None:
        """Until JavaScript says something true."""
        async with asyncio.timeout(seconds):
            while not await self.value(expression):
                await asyncio.sleep(0.2)

    async def screenshot(self) -> bytes:
        """The whole page as PNG."""
        data = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(data["data"])


@asynccontextmanager
async def browser_tabs(count: int, *, nice: int = 0) -> AsyncIterator[list[Tab]]:
    """A browser with a profile of its own and so many tabs, each as if in a browser of its own (window, cookies, connections)."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            "nice", "-n", str(nice), CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        try:
            async with asyncio.timeout(60):
                async for line in process.stderr:
                    if found := re.search(r"(ws://[0-9.:]+/devtools/)\S+", line.decode()):
                        break
                else:
                    raise AssertionError("Chromium does not start")
            async with aiohttp.ClientSession() as session, AsyncExitStack() as sockets:
                browser = Tab(await sockets.enter_async_context(session.ws_connect(found[0])))
                tabs = []
                for _ in range(count):
                    context = (await browser.ask("Target.createBrowserContext"))["browserContextId"]
                    made = await browser.ask("Target.createTarget", url="about:blank", browserContextId=context, newWindow=True)
                    page = f"{found[1]}page/{made['targetId']}"
                    tabs.append(Tab(await sockets.enter_async_context(session.ws_connect(page, max_msg_size=0))))
                yield tabs
        finally:
            process.kill()
            await process.wait()


@asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """A browser with one tab."""
    async with browser_tabs(1) as (tab,):
        yield tab
