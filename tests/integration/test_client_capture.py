"""The capture thread: newest frame only, every frame of a file, and cameras that stall, vanish and come back."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from edge_client.capture.base import Delivery
from edge_client.capture.capture import Capture, CaptureConfig
from edge_client.capture.sources import Shot, Source, SourceFaults
from protos.errors import SourceError

DEVICE = Source(kind="device", target="0")
VIDEO = Source(kind="video", target="clip")


class FakeCamera:
    """Frames numbered in their first pixel; ``script`` says what each read does."""

    fps = 30.0

    def __init__(self, read: Callable[[int], bool], start: int = 0) -> None:
        self._read, self._count = read, start
        self.closed = False

    def read(self) -> Shot | None:
        if not self._read(self._count):
            return None
        image = np.full((4, 6, 3), self._count % 256, np.uint8)
        self._count += 1
        return Shot(image=image)

    def faults(self) -> SourceFaults:
        return SourceFaults()

    def close(self) -> None:
        self.closed = True


def number(delivery: Delivery | None) -> int:
    assert delivery is not None
    assert delivery.frame.image is not None
    return int(delivery.frame.image[0, 0, 0])


async def test_a_camera_gives_the_newest_frame_only_and_none_twice() -> None:
    def read(count: int) -> bool:
        time.sleep(0.005)
        return True

    capture = Capture(CaptureConfig(source=DEVICE), opener=lambda s: FakeCamera(read))
    await capture.start()
    seen, captured = [], 0
    while (superseded := captured - len(seen)) < 10 or len(seen) < 8:
        assert len(seen) < 300, f"only {superseded} frames were superseded"
        delivery = await capture.next()
        assert delivery is not None
        captured += 1 + len(delivery.superseded)
        assert all(f.image is None for f in delivery.superseded)
        seen.append(number(delivery))
        await asyncio.sleep(0.03)
    left = capture.close()
    assert seen == sorted(set(seen)), "a frame came twice"
    assert captured + len(left) >= seen[-1] + 1
    assert await capture.next() is None


async def test_a_file_gives_every_frame_and_waits() -> None:
    capture = Capture(CaptureConfig(source=VIDEO, frames=40), opener=lambda s: FakeCamera(lambda count: True))
    await capture.start()
    seen = []
    while (delivery := await capture.next()) is not None:
        assert not delivery.superseded
        seen.append(number(delivery))
        await asyncio.sleep(0.001)
    assert seen == list(range(40))


async def test_realtime_paces_a_file_and_loops() -> None:
    config = CaptureConfig(source=VIDEO, realtime=True, loop=True, frames=12, fps=50)
    capture = Capture(config, opener=lambda s: FakeCamera(lambda count: count < 5))
    start = time.monotonic()
    await capture.start()
    frames = 0
    while (delivery := await capture.next()) is not None:
        frames += 1 + len(delivery.superseded)
    assert frames == 12
    assert 0.2 <= time.monotonic() - start < 20


async def test_a_camera_that_stalls_is_opened_again() -> None:
    release = threading.Event()
    opened = []

    def open_camera(source: Source) -> FakeCamera:
        opened.append(time.monotonic())
        first = len(opened) == 1

        def read(count: int) -> bool:
            if first and count == 3:
                release.wait(20)  # the driver hangs
            time.sleep(0.01)
            return True

        return FakeCamera(read, start=0 if first else 100)

    capture = Capture(CaptureConfig(source=DEVICE, stall_timeout_s=0.3, backoff_s=(0.05, 0.1)), opener=open_camera)
    await capture.start()
    indices, notes, reopened = [], [], False
    try:
        async with asyncio.timeout(60):
            while not reopened:
                delivery = await capture.next()
                assert delivery is not None
                reopened = number(delivery) >= 100
                indices.append(delivery.frame.index)
                notes.append(capture.note)
    finally:
        release.set()
        capture.close()
    assert len(opened) == 2
    assert indices == sorted(indices)


async def test_a_camera_that_vanishes_is_opened_again_with_back_off() -> None:
    opened: list[float] = []
    notes: list[str] = []

    def open_camera(source: Source) -> FakeCamera:
        opened.append(time.monotonic())
        if 1 < len(opened) < 4:
            raise SourceError("gone")
        return FakeCamera(lambda count: (time.sleep(0.005), count < 3 or len(opened) > 1)[1])

    config = CaptureConfig(source=DEVICE, backoff_s=(0.05, 1.0), open_timeout_s=0.5)
    capture = Capture(config, opener=open_camera)
    await capture.start()

    async def watch() -> None:
        while True:
            notes.append(capture.note)
            await asyncio.sleep(0.01)

    watcher = asyncio.create_task(watch())
    async with asyncio.timeout(60):
        while len(opened) < 4:
            assert await capture.next() is not None
    watcher.cancel()
    capture.close()
    assert any("opened again in" in note for note in notes)
    waits = [b - a for a, b in itertools.pairwise(opened[1:])]
    assert waits == sorted(waits), "the back-off grows"


async def test_a_camera_that_was_never_there() -> None:
    def open_camera(source: Source) -> FakeCamera:
        raise SourceError("camera 0 does not exist")

    capture = Capture(CaptureConfig(source=DEVICE), opener=open_camera)
    with pytest.raises(SourceError, match="does not exist"):
        await capture.start()


async def test_a_camera_that_opens_and_never_answers() -> None:
    release = threading.Event()
    capture = Capture(
        CaptureConfig(source=DEVICE, open_timeout_s=0.2), opener=lambda s: FakeCamera(lambda count: not release.wait(60))
    )
    with pytest.raises(SourceError, match="no picture within"):
        await capture.start()
    release.set()


async def test_a_driver_that_raises_is_a_clear_error() -> None:
    def open_camera(source: Source) -> FakeCamera:
        raise RuntimeError("driver exploded")

    capture = Capture(CaptureConfig(source=VIDEO), opener=open_camera)
    with pytest.raises(SourceError, match="driver exploded"):
        await capture.start()


async def test_a_file_that_cannot_be_read_any_further_is_no_end() -> None:
    def read(count: int) -> bool:
        if count == 5:
            raise SourceError("clip cannot be read any further: input/output error")
        return True

    capture = Capture(CaptureConfig(source=VIDEO), opener=lambda s: FakeCamera(read))
    await capture.start()
    seen = []
    while (delivery := await capture.next()) is not None:
        seen.append(number(delivery))
    assert seen == list(range(5)), "what was read before is answered"
    assert capture.broken is not None
    assert "input/output error" in capture.broken.message


async def test_realtime_follows_the_clips_own_stamps() -> None:
    """Five frames in a burst, then one after 0.4 s; a constant frame rate would bring it after 0.17 s."""

    class Clip(FakeCamera):
        def read(self) -> Shot | None:
            shot, at_s = super().read(), (0.0, 0.02, 0.04, 0.06, 0.08, 0.4)[min(self._count - 1, 5)]
            return shot and Shot(image=shot.image, position_s=at_s)

    capture = Capture(CaptureConfig(source=VIDEO, realtime=True), opener=lambda s: Clip(lambda count: count < 6))
    before_ns = time.monotonic_ns()
    await capture.start()
    frames = []
    while (delivery := await capture.next()) is not None:
        frames += [*delivery.superseded, delivery.frame]
    assert [frame.position_ns for frame in frames] == [0, 20_000_000, 40_000_000, 60_000_000, 80_000_000, 400_000_000]
    assert frames[-1].captured_ns - before_ns >= 400_000_000


async def test_closing_ends_the_wait_for_a_camera_that_does_not_open() -> None:
    release = threading.Event()
    capture = Capture(CaptureConfig(source=DEVICE), opener=lambda s: FakeCamera(lambda count: not release.wait(60)))
    start = asyncio.create_task(capture.start())
    await asyncio.sleep(0)
    capture.close()
    await asyncio.wait_for(start, 30)
    assert await capture.next() is None
    release.set()
