"""One token's work, however much and however long, leaves room for another's."""

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_server.access.fair import FairPool
from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import Child, child, environment

log = logging.getLogger(__name__)

SIDE_PX = 224
FPS = 30
FRAMES = 180
IN_TIME_S = 0.5
CAMERA, FLOOD = "cccccccccccccccc1", "eeeeeeeeeeeeeeee1"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", size_px=SIDE_PX)


async def camera(server: Child, bundle: Bundle, frames: int) -> tuple[int, list[float]]:
    """A camera's frames at its own pace; how many were answered in time, and the times of all answers."""
    device = Device(bundle)
    payloads = [device.layers(picture(i, 320, 240), 0, deadline_ns=int(IN_TIME_S * 1e9)) for i in range(5)]
    sent: dict[int, float] = {}
    took: list[float] = []
    in_time = 0
    async with session(
        server.address, bundle.sha256, metadata=(("authorization", f"Bearer {CAMERA}"),), max_in_flight=32
    ) as stream:

        async def read() -> None:
            nonlocal in_time
            for _ in range(frames):
                result = await stream.result()
                took.append(time.monotonic() - sent[result.frame_id])
                in_time += result.error is None and took[-1] <= IN_TIME_S

        reading = asyncio.create_task(read())
        begin = time.monotonic()
        for number in range(frames):
            await asyncio.sleep(max(0.0, begin + number / FPS - time.monotonic()))
            sent[number] = time.monotonic()
            for layer in payloads[number % 5]:
                layer.frame_id, layer.sent_ns = number, time.monotonic_ns()
                await stream.send(layer=layer)
        await reading
    return in_time, took


@pytest.mark.alone
async def test_a_camera_keeps_its_frames_while_another_token_does_its_worst(bundle: Bundle, tmp_path: Path) -> None:
    """Three connections of one token: lists of millions of numbers, JPEGs of thousands of scans, whole models without end.

    The camera alone is measured before: where the machine itself is too loaded for a camera, nothing can be said of fairness.
    """
    (tmp_path / "tokens").write_text(f"camera {CAMERA}\nflood {FLOOD}\n")
    with child(tmp_path, bundle.path, arguments=["--token-file", str(tmp_path / "tokens")]) as server:
        before, _ = await camera(server, bundle, FRAMES // 2)
        arguments = (server.address, FLOOD, bundle.manifest.name, bundle.sha256, str(SIDE_PX))
        flood = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fakes.server_flood", *arguments,
            stdout=asyncio.subprocess.PIPE, cwd=ROOT, env=environment(),
        )  # fmt: skip
        try:
            assert flood.stdout is not None
            assert await asyncio.wait_for(flood.stdout.readline(), 300) == b"at it\n"
            during, took = await camera(server, bundle, FRAMES)
            assert flood.returncode is None, "the flood went on to the end"
        finally:
            flood.kill()
            await flood.wait()
    share = during / FRAMES / (before / (FRAMES // 2))
    said = f"in time: {before} of {FRAMES // 2} alone, {during} of {FRAMES} beside the flood; p50 {np.median(took) * 1e3:.0f} ms"
    assert share >= 0.95, said
    log.info(said)


# ------------------------------------------------------------------------------------------------ the pool of threads


async def test_clients_are_served_in_turn() -> None:
    pool, gate, order = FairPool(1, clock=lambda: 0), threading.Event(), list[str]()

    async def work(name: str, wait: bool = False) -> None:
        await pool.run(name, lambda: gate.wait(10) if wait else order.append(name))

    tasks = [asyncio.create_task(work("flood", wait=True)), *(asyncio.create_task(work("flood")) for _ in range(20))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(work(name)) for name in ("a", "b", "a")]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    pool.close()
    assert Counter(order) == {"flood": 20, "a": 2, "b": 1}
    assert max(i for i, name in enumerate(order) if name != "flood") <= 5


async def test_no_client_has_all_threads_while_others_are_present() -> None:
    now_ns = 0
    pool, gate = FairPool(2, clock=lambda: now_ns), threading.Event()
    await pool.run("camera", lambda: None)
    held = [asyncio.create_task(pool.run("flood", lambda: gate.wait(10))) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.wait_for(pool.run("camera", lambda: None), 5)
    now_ns = 10_000_000_000  # the camera has been silent for long: the flood may have everything
    held.append(asyncio.create_task(pool.run("flood", lambda: gate.wait(10))))
    await asyncio.sleep(0)
    late = asyncio.create_task(pool.run("camera", lambda: None))
    done, _ = await asyncio.wait({late}, timeout=0.1)
    assert not done
    gate.set()
    await asyncio.gather(late, *held)
    pool.close()


async def test_what_fails_or_is_given_up_holds_no_thread() -> None:
    pool, gate = FairPool(1, clock=lambda: 0), threading.Event()
    with pytest.raises(ZeroDivisionError):
        await pool.run("a", lambda: 1 / 0)
    first, second = (asyncio.create_task(pool.run("a", lambda: gate.wait(10))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.wait_for(pool.run("a", lambda: 7), 5) == 7
    pool.close()
