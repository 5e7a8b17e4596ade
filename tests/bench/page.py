"""What ten browsers on a page cost the camera: frames answered without and with them, in turns.

    HEADTAIL_DATA=... python -m tests.bench.page [--page device|server] [--turns 2] [--frames 300] [--browsers 10] [--http]

A real client plays vtest.avi at its own pace against a real server; one of the two serves the page. The browsers are tabs of
headless Chromium with a context each, at the least priority, as if they were on machines of their own; with ``--http`` (or without
Chromium) they are HTTP clients that read what the page would. Counted are the frames captured while all of them look. Ends with one
JSON line.

    python -m tests.bench.page --look URL --screenshot FILE [--width 390] [--axe axe.min.js]

takes a picture of a page instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.fakes.browser import CHROMIUM, browser_tab, browser_tabs
from tests.fakes.client_process import client
from tests.fakes.server_running import child

_SETTLED = 30
_SHOWN = "document.getElementById('picture')?.naturalWidth > 0 || !!document.querySelector('#models tbody tr')"
_FRESH = "['connected', 'serving'].includes(document.getElementById('connection').textContent)"


@asynccontextmanager
async def tabs(url: str, count: int) -> AsyncIterator[None]:
    """Tabs that show the page from here on, and still do at the end."""
    async with browser_tabs(count, nice=19) as opened:
        for tab in opened:
            await tab.open(url)
            await tab.wait_for(_SHOWN)
        yield
        for tab in opened:
            assert await tab.value(_FRESH), "a browser no longer shows the page"


@asynccontextmanager
async def readers(url: str, count: int, *, pictures: bool) -> AsyncIterator[None]:
    """HTTP clients that ask for the state once a second and read the pictures."""

    async def read(session: aiohttp.ClientSession) -> None:
        async with session.get("/stream.mjpg") as stream:
            async for _ in stream.content.iter_any():
                pass

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get("/api/state") as answer:
                await answer.read()
            await asyncio.sleep(1)

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        looks = [ask, read] if pictures else [ask]
        tasks = [asyncio.create_task(look(session)) for look in looks for _ in range(count)]
        yield
        assert not any(task.done() for task in tasks), "a reader no longer reads the page"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def nobody() -> AsyncIterator[None]:
    """No browser looks."""
    yield


async def turn(args: argparse.Namespace, browsers: int) -> dict[str, float]:
    """One run; its frames while the browsers looked."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    web, on_device, url = ["--web", f"127.0.0.1:{port}"], args.page == "device", f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as tmp, child(Path(tmp), Path(args.model), arguments=() if on_device else web) as server:
        play = ["--camera", str(args.video), "--realtime", "--loop", "--server", server.address, *(web if on_device else [])]
        with client(Path(tmp), *play, cache=args.cache) as camera:
            await asyncio.to_thread(camera.wait_frame, _SETTLED)
            looking = nobody() if not browsers else readers(url, browsers, pictures=on_device) if args.http else tabs(url, browsers)
            async with looking:
                first = camera.lines()[-1]["frame"] + 1
                await asyncio.to_thread(camera.wait_frame, first + args.frames - 1)
            camera.process.send_signal(signal.SIGINT)
            done = await asyncio.to_thread(camera.finish)
    counts = done.outcomes(first, first + args.frames - 1)
    took_ms = [
        line["latency_ms"]["total"] for line in done.lines if line["frame"] >= first and line["outcome"] in ("result", "local")
    ]
    assert sum(counts.values()) == args.frames
    return {"answered": (counts.get("result", 0) + counts.get("local", 0)) / args.frames, "ms_p50": statistics.median(took_ms)}


async def screenshot(url: str, to: Path, width: int, axe: Path | None) -> list[str]:
    """A picture of a page (the device's or the server's) as it is now; what axe-core finds wrong with it."""
    async with browser_tab() as tab:
        await tab.open(url, width=width, height=800)
        await tab.wait_for(_SHOWN)
        await asyncio.sleep(2)
        to.write_bytes(await tab.screenshot())
        if axe is None:
            return []
        await tab.value(axe.read_text(encoding="utf-8") + ";0")
        found = await tab.value("axe.run().then((r) => r.violations.map((v) => `${v.impact}: ${v.id}, ${v.nodes.length} places`))")
        return list(found)


async def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Turns without and with browsers."""
    rows: dict[int, list[dict[str, float]]] = {0: [], args.browsers: []}
    for _ in range(args.turns):
        for browsers, found in rows.items():
            found.append(await turn(args, browsers))
            print(browsers, found[-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
    alone, watched = (statistics.mean(row["answered"] for row in found) for found in rows.values())
    return {
        "page": args.page, "browsers": args.browsers, "chromium": not args.http, "frames": args.turns * args.frames,
        "answered_alone": round(alone, 4), "answered_watched": round(watched, 4), "lost": round(alone - watched, 4),
    }  # fmt: skip


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", choices=("device", "server"), default="device")
    parser.add_argument("--model", default="detector")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--browsers", type=int, default=10)
    parser.add_argument("--http", action="store_true", default=CHROMIUM is None, help="HTTP clients instead of Chromium")
    parser.add_argument("--screenshot", type=Path, help="instead: a picture of the page at --look, as PNG")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core: the screenshot's page is tried with it")
    parser.add_argument("--width", type=int, default=1100, help="of the screenshot, px")
    parser.add_argument("--look", help="the page whose picture is taken")
    args = parser.parse_args()
    if args.screenshot:
        print(json.dumps({"axe": asyncio.run(screenshot(args.look, args.screenshot, args.width, args.axe))}))
        return 0
    args.video = Path(os.environ["HEADTAIL_DATA"]) / "video" / "vtest.avi"
    args.cache = Path.home() / ".cache/headtail"
    print(json.dumps(asyncio.run(compare(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
