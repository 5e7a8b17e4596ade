"""The server's page over real HTTP: who may come in, what it says of sessions, models and refusals, what a browser shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from edge_server.doors import wire
from edge_server.server import Server
from protos.headtail.v1 import headtail_pb2 as pb
from splitters.bundle import Bundle
from tests.fakes.browser import CHROMIUM, browser_tab
from tests.fakes.client_process import client
from tests.fakes.server_running import running

TOKEN = "correct-horse-battery"


@asynccontextmanager
async def page(bundle: Bundle) -> AsyncIterator[tuple[str, Server]]:
    async with running(bundle.path, web="127.0.0.1:0") as server:
        yield f"http://127.0.0.1:{server.page_port}", server


async def state(url: str, since: str = "0") -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/state", params={"since": since}) as answer:
        assert answer.status == 200
        found: dict[str, Any] = await answer.json()
        return found


async def test_it_says_who_is_connected_and_what_was_answered(tmp_path: Path, bundle: Bundle) -> None:
    async with page(bundle) as (url, server):
        before = await state(url)
        assert before["session_count"] == 0
        assert [model["frames"] for model in before["models"]] == [{}]
        source = ["--camera", "synthetic:fps=10,size=160x120", "--change-gate", "off"]
        with client(tmp_path, *source, "--server", server.address, "--json") as camera:
            await asyncio.to_thread(camera.wait_frame, 10)
            during = await state(url)
            (session,) = during["sessions"]
            assert session["model"] == during["models"][0]["name"]
            assert session["answered"] > 0
            assert session["who"]
            assert during["models"][0]["sessions"] == 1
            camera.process.terminate()
            done = await asyncio.to_thread(camera.finish)
        answered = done.summary["outcomes"]["result"]
        async with asyncio.timeout(30):
            while (after := await state(url))["session_count"]:
                await asyncio.sleep(0.05)
        assert after["models"][0]["frames"]["result"] >= answered > 0
        assert sum(second[1] for second in after["seconds"]) == after["models"][0]["frames"]["result"]
        assert after["models"][0]["payload_bytes"] > 0
        assert [model["sessions"] for model in after["models"]] == [0]
        for since in ("x", "9" * 400, "-1"):
            assert (await state(url, since))["now"] >= after["now"]


async def test_what_it_refuses_is_counted_with_its_reason(bundle: Bundle) -> None:
    async with page(bundle) as (url, server), grpc.aio.insecure_channel(server.address) as channel:
        fetch = channel.unary_stream(f"/{wire.SERVICE}/FetchBundle", pb.FetchBundleRequest.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError):
            await fetch(pb.FetchBundleRequest(model="another")).read()
        found = await state(url)
        assert found["refused_calls"] == {"unknown_model": 1}
        assert [refusal[1] for refusal in found["refusals"]] == ["unknown_model"]


async def test_with_a_token_nothing_is_shown_without_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_WEB_TOKEN", TOKEN)
    async with page(bundle) as (url, _), aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            async with session.get(f"{url}/api/state", headers=headers) as answer:
                assert answer.status == 401
        async with session.get(f"{url}/api/state", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
            assert answer.status == 200


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
async def test_a_browser_shows_it_and_loads_nothing_from_elsewhere(tmp_path: Path, bundle: Bundle, width: int) -> None:
    async with page(bundle) as (url, server), browser_tab() as tab:
        with client(tmp_path, "--camera", "synthetic:fps=10,size=160x120", "--server", server.address, "--json") as camera:
            await asyncio.to_thread(camera.wait_frame, 5)
            await tab.open(url, width=width)
            await tab.wait_for("document.getElementById('connection').textContent === 'serving'")
            await tab.wait_for("document.querySelectorAll('#sessions tbody tr').length === 1")
            assert await tab.value("document.querySelectorAll('#models tbody tr').length") == 1
            assert await tab.value("document.images.length") == 0
            assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
            await server.stop()
            await tab.wait_for("document.getElementById('connection').textContent === 'server not reached'")
        assert [u for u in tab.requested if not u.startswith(url)] == []
