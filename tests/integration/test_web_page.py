"""The live page over real HTTP: who may come in, what a stalled browser costs, what a browser shows."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import cv2
import numpy as np
import pytest

from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.web.page import LivePage
from edge_client.web.view import CameraView, Circumstances
from protos.messages import Box, Detection
from protos.web.door import COOKIE
from splitters.bundle import Bundle
from tests.fakes.browser import CHROMIUM, browser_tab
from tests.fakes.client_process import Standby, client, standby

EVIL = "<img src=x onerror=alert(1)>\x1b[2J\u202e"
TOKEN = "correct-horse-battery"


def report(index: int) -> FrameReport:
    image = np.full((120, 160, 3), index % 256, np.uint8)
    frame = CapturedFrame(index=index, image=image, captured_ns=0, captured_unix_ns=0, width_px=160, height_px=120)
    answer = Detection(boxes=(Box(class_id=0, score=0.9, box_px=(10.0, 10.0, 60.0, 60.0)),))
    return FrameReport(
        frame=frame, model=EVIL, bundle_sha256="0" * 64, outcome=Outcome.RESULT, payload_bytes=842, stages_ms={"total": 90.0},
        answer=answer, decision="split 3",
    )  # fmt: skip


@asynccontextmanager
async def page(name: str = "yard", *, up: bool = True) -> AsyncIterator[tuple[str, CameraView]]:
    live = LivePage("127.0.0.1", 0)
    around = Circumstances(server="edge:50051", up=up, error="" if up else EVIL)
    view = CameraView(name, lambda: {0: EVIL}, lambda: around, deadline_ms=500.0, draw=live.draw)
    live.add(view)
    port = await live.start()
    try:
        yield f"http://127.0.0.1:{port}", view
    finally:
        view.close()
        await live.close()


async def status(url: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers, allow_redirects=False) as answer:
        await answer.read() if "stream" not in url else None
        return answer.status


async def test_without_a_token_only_localhost_is_answered() -> None:
    async with page() as (url, view):
        view.take(report(0))
        assert await status(f"{url}/api/state") == 200
        assert await status(f"{url}/api/state", Host="localhost:8080") == 200
        for foreign in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7"):
            for path in ("/", "/api/state", "/stream.mjpg", "/picture.jpg", "/static/page.js"):
                assert await status(url + path, Host=foreign) == 403


async def test_with_a_token_nothing_is_shown_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_WEB_TOKEN", TOKEN)
    async with page() as (url, view):
        view.take(report(0))
        for path in ("/api/state", "/api/cameras", "/stream.mjpg", "/picture.jpg", "/nothing"):
            assert await status(url + path) == 401
            assert await status(url + path, Authorization="Bearer wrong") == 401
            assert await status(url + path, Cookie=f"{COOKIE}=") == 401
            assert await status(url + path, Cookie=f"{COOKIE}=ü") == 401
        assert await status(f"{url}/api/state", Authorization=f"Bearer {TOKEN}") == 200
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            async with session.get(url) as form:
                assert form.status == 401
                assert "token" in await form.text()
            async with session.post(f"{url}/login", data={"token": "wrong"}) as refused:
                assert refused.status == 403
                assert "That was not it" in await refused.text()
            async with session.post(f"{url}/login", data={"token": TOKEN}) as welcome:
                assert welcome.status == 200  # after the redirect to the page itself
                assert "chart-outcomes" in await welcome.text()
            (cookie,) = session.cookie_jar
            assert (cookie["httponly"], cookie["samesite"], TOKEN in cookie.value) == (True, "Strict", False)
            async with session.get(f"{url}/api/state") as state:
                assert state.status == 200


async def test_every_answer_forbids_what_the_page_does_not_need() -> None:
    async with page() as (url, view), aiohttp.ClientSession() as session:
        view.take(report(0))
        for path in ("/", "/static/page.js", "/api/state", "/picture.jpg", "/nothing", "/static/..%2fpage.py", "/?camera=x"):
            async with session.get(url + path) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Server"] == "headtail"
                assert answer.status in (200, 404)
        async with session.get(f"{url}/api/state?camera=other") as answer:
            assert answer.status == 404
        for since in ("x", "9" * 400, "-1", "٣"):
            async with session.get(f"{url}/api/state", params={"since": since}) as answer:
                assert len((await answer.json())["seconds"]) == 1


async def test_a_stalled_browser_holds_up_neither_the_camera_nor_other_browsers() -> None:
    async with page() as (url, view):
        port = int(url.rpartition(":")[2])
        stalled = socket.create_connection(("127.0.0.1", port))
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with aiohttp.ClientSession() as session, session.get(f"{url}/stream.mjpg") as stream:
            seen = b""
            for index in range(40):
                view.take(report(index))
                if index % 10 == 9:
                    number, jpeg = await view.picture(index - 1)
                    assert number == index
                    while jpeg not in seen:
                        seen += await stream.content.readany()
        assert b"--picture\r\nContent-Type: image/jpeg" in seen
        stalled.close()


async def test_pictures_are_drawn_only_while_somebody_looks() -> None:
    async with page() as (url, view), aiohttp.ClientSession() as session:
        view.take(report(0))
        await asyncio.sleep(0)
        assert view.watchers == 0
        async with session.get(f"{url}/picture.jpg") as answer:
            picture = cv2.imdecode(np.frombuffer(await answer.read(), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (480, 640, 3)
        assert view.watchers == 0


async def test_words_of_a_peer_reach_the_page_without_control_characters() -> None:
    async with page(EVIL, up=False) as (url, view), aiohttp.ClientSession() as session:
        view.take(report(0))
        async with session.get(f"{url}/api/state") as answer:
            assert answer.content_type == "application/json"
            state = await answer.json()
        for text in (state["camera"], state["model"], state["sees"], state["server"]["error"]):
            assert "<img" in text
            assert text.isprintable()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
async def test_a_browser_shows_it_and_obeys_nothing_that_a_peer_wrote(width: int) -> None:
    async with page(up=False) as (url, view), browser_tab() as tab:
        for index in range(5):
            view.take(report(index))
        await tab.open(url, width=width)
        await tab.wait_for("document.getElementById('decision').textContent.includes('on time')")
        assert await tab.value("document.getElementById('decision').textContent") == "split 3, 842 B, 100 % on time"
        assert await tab.value("document.getElementById('connection').textContent") == "no server: the device goes on by itself"
        assert "<img src=x" in await tab.value("document.getElementById('sees').textContent")
        assert await tab.value("document.images.length") == 1  # the camera's; the label has become no element
        await tab.wait_for("document.getElementById('picture').naturalWidth === 640")
        assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
        assert await tab.value("document.getElementById('chart-outcomes').getAttribute('aria-label')") == (
            "Frames of the last five minutes: result 5"
        )
        assert [u for u in tab.requested if not u.startswith(url)] == []
        assert tab.complaints == []


@pytest.fixture
def server(tmp_path: Path, bundle: Bundle) -> Iterator[Standby]:
    with standby(tmp_path, bundle.path) as s:
        yield s


async def test_the_page_of_a_client_goes_on_when_the_server_is_gone(tmp_path: Path, server: Standby) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = await asyncio.to_thread(server.serve)
    source = ["--camera", "synthetic:fps=10,size=160x120", "--camera-id", "yard", "--change-gate", "off"]
    with client(tmp_path, *source, "--server", address, "--web", f"127.0.0.1:{port}") as running:
        await asyncio.to_thread(running.wait_frame, 10)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/api/state") as answer:
                before = await answer.json()
            assert before["camera"] == "yard"
            assert before["server"]["up"] is True
            assert sum(before["outcomes"].values()) >= 10
            server.kill()
            async with asyncio.timeout(60):
                while True:
                    async with session.get("/api/state") as answer:
                        after = await answer.json()
                    if not after["server"]["up"] and after["server"]["error"]:
                        break
                    await asyncio.sleep(0.1)
            async with session.get("/stream.mjpg") as stream:
                await stream.content.readuntil(b"Content-Type: image/jpeg")
                await asyncio.to_thread(running.wait_frame, after["frame"]["index"] + 10)
                running.process.send_signal(signal.SIGTERM)
                assert (await asyncio.to_thread(running.finish)).code == 0


async def test_an_address_for_others_without_a_token_is_refused_before_anything_begins(tmp_path: Path) -> None:
    with client(tmp_path, "--camera", "synthetic:", "--web", "0.0.0.0:0") as running:
        done = await asyncio.to_thread(running.finish)
    assert done.code == 2
    assert "set HEADTAIL_WEB_TOKEN" in done.err
