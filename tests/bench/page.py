"""What ten browsers on the live page cost the camera: frames answered in time without and with them, in turns.

    HEADTAIL_DATA=... python -m tests.bench.page [--turns 2] [--frames 300] [--browsers 10] [--screenshot FILE]

A real client with a real server in a child process plays vtest.avi at its own pace; the browsers are HTTP clients of another
process that read the MJPEG stream and ask for the state once a second, as the page does. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp

from tests.fakes.browser import CHROMIUM, browser_tab
from tests.fakes.client_process import run_client
from tests.fakes.server_running import environment


async def browse(url: str, browsers: int) -> None:
    """Looks at the page until it is gone."""

    async def one(session: aiohttp.ClientSession) -> int:
        read = 0
        async with session.get("/stream.mjpg") as stream:
            async for data in stream.content.iter_any():
                read += len(data)
        return read

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get("/api/state") as answer:
                await answer.read()
            await asyncio.sleep(1)

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        while True:
            try:
                async with session.get("/picture.jpg") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
        jobs = [asyncio.gather(one(session), ask(session), return_exceptions=True) for _ in range(browsers)]
        await asyncio.gather(*jobs)


def turn(video: Path, frames: int, browsers: int) -> dict[str, float]:
    """One run; shares of its frames."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    look = [sys.executable, "-m", "tests.bench.page", "--look", f"http://127.0.0.1:{port}", "--browsers", str(browsers)]
    lookers = subprocess.Popen(look, env=environment(), stderr=subprocess.DEVNULL) if browsers else None
    try:
        with tempfile.TemporaryDirectory() as tmp:
            done = run_client(
                Path(tmp), "--camera", str(video), "--realtime", "--loop", "--frames", str(frames), "--server", "embedded",
                "--model", "detector", "--web", f"127.0.0.1:{port}", "--json", cache=Path.home() / ".cache/headtail", timeout_s=600,
            )  # fmt: skip
    finally:
        if lookers is not None:
            lookers.kill()
            lookers.wait()
    counts = done.summary["outcomes"]
    answered = counts["result"] + counts["local"]
    return {"answered": answered / done.summary["frames"], "latency_ms_p50": done.summary["latency_ms_p50"]}


async def screenshot(url: str, to: Path, width: int, axe: Path | None) -> list[str]:
    """A picture of a page (the device's or the server's) as it is now; what axe-core finds wrong with it."""
    async with browser_tab() as tab:
        await tab.open(url, width=width, height=800)
        await tab.wait_for("document.getElementById('picture')?.naturalWidth > 0 || !!document.querySelector('#models tbody tr')")
        await asyncio.sleep(2)
        to.write_bytes(await tab.screenshot())
        if axe is None:
            return []
        await tab.value(axe.read_text(encoding="utf-8") + ";0")
        found = await tab.value("axe.run().then((r) => r.violations.map((v) => `${v.impact}: ${v.id}, ${v.nodes.length} places`))")
        return list(found)


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--browsers", type=int, default=10)
    parser.add_argument("--screenshot", type=Path, help="instead: a picture of the page at --look, as PNG")
    parser.add_argument("--axe", type=Path, help="axe.min.js of axe-core: the screenshot's page is tried with it")
    parser.add_argument("--width", type=int, default=1100, help="of the screenshot, px")
    parser.add_argument("--look", help="instead: only look at the page there")
    args = parser.parse_args()
    if args.screenshot:
        assert CHROMIUM is not None, "Chromium is not installed"
        print(json.dumps({"axe": asyncio.run(screenshot(args.look, args.screenshot, args.width, args.axe))}))
        return 0
    if args.look:
        asyncio.run(browse(args.look, args.browsers))
        return 0
    video = Path(os.environ["HEADTAIL_DATA"]) / "video" / "vtest.avi"
    found: dict[int, list[dict[str, float]]] = {0: [], args.browsers: []}
    for _ in range(args.turns):
        for browsers, rows in found.items():
            rows.append(turn(video, args.frames, browsers))
            print(browsers, rows[-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
    share = {n: sum(r["answered"] for r in rows) / len(rows) for n, rows in found.items()}
    print(json.dumps({"answered_alone": share[0], "answered_watched": share[args.browsers], "browsers": args.browsers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
