"""The source's own thread, and the slot through which frames reach the event loop.

Live (cameras, and files with ``--realtime``): the slot holds the newest frame; one that was not taken in time is
handed over beside its successor as *superseded*, so that it is counted. Otherwise the thread waits until a frame was
taken, and every frame comes.

Time is the source's: a file is paced by its own stamps, and each frame carries its place in the source.

A camera that stalls cannot be interrupted inside its driver. Its thread is left to itself (whatever it still delivers
is ignored) and a new one opens the camera again, with back-off.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from edge_client.capture.base import Delivery
from edge_client.capture.sources import DEFAULT_FPS, Camera, Shot, Source, SourceFaults, open_camera
from edge_client.frames import NS_PER_S, CapturedFrame, Clock
from protos.errors import HeadtailError, SourceError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureConfig:
    """How a source is read.

    Attributes:
        realtime: pace a file by its own stamps and treat it as a camera from there on.
        loop: begin again at the end (files).
        frames: end after this many captured frames; 0: no limit.
        fps: overrides the pace of ``realtime``; 0: the file's own stamps, or 25 where it has none.
        camera_id: what results call the source; empty: as people may see it.
        open_timeout_s: for the first frame at start.
        stall_timeout_s: a camera silent for so long is opened again.
        backoff_s: (first, longest) wait between attempts to open it again.
    """

    source: Source
    realtime: bool = False
    loop: bool = False
    frames: int = 0
    fps: float = 0.0
    camera_id: str = ""
    open_timeout_s: float = 15.0
    stall_timeout_s: float = 5.0
    backoff_s: tuple[float, float] = (0.5, 10.0)

    @property
    def live(self) -> bool:
        """Newest frame only, and a frame not answered in time is worthless."""
        return self.realtime or self.source.camera


class Capture:
    """An asyncio view of a source. All methods belong to the event loop's thread."""

    def __init__(
        self, config: CaptureConfig, *, clock: Clock = time.monotonic_ns, opener: Callable[[Source], Camera] = open_camera
    ) -> None:
        self.config = config
        self.live = config.live
        self.fps = 0.0
        self.note = ""
        self.faults = SourceFaults()
        self.broken: HeadtailError | None = None
        self._clock = clock
        self._opener = opener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slot: CapturedFrame | None = None
        self._superseded: list[CapturedFrame] = []
        self._changed = asyncio.Event()
        self._opened: asyncio.Future[None] | None = None
        self._index = 0
        self._first_ns = 0
        self._ended = False
        self._reader: _Reader | None = None
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens the source and waits for its first frame.

        Raises:
            SourceError: it cannot be opened, or gives nothing within the time limit.
        """
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._begin()
        try:
            await asyncio.wait_for(asyncio.shield(self._opened), self.config.open_timeout_s)
        except TimeoutError:
            self.close()
            raise SourceError(f"{self.config.source.shown} gave no picture within {self.config.open_timeout_s:g} s") from None

    async def next(self) -> Delivery | None:
        """The newest frame (live) or the next one; None at the end, which ``broken`` says was none where reading failed."""
        while True:
            if self._slot is not None:
                frame, self._slot = self._slot, None
                superseded, self._superseded = tuple(self._superseded), []
                if self._reader:
                    self._reader.taken.release()
                return Delivery(frame=frame, superseded=superseded)
            if self._ended:
                return None
            self._changed.clear()
            watched = self.config.source.camera and self._restart is None
            try:
                async with asyncio.timeout(self.config.stall_timeout_s if watched else None):
                    await self._changed.wait()
            except TimeoutError:
                self._again("the camera stalled")

    def close(self) -> tuple[CapturedFrame, ...]:
        """Ends the source and returns the frames that were captured but never taken."""
        self._ended = True
        if self._reader:
            self._reader.stop()
            self._reader = None
        if self._restart:
            self._restart.cancel()
        if self._opened and not self._opened.done():
            self._opened.set_result(None)  # nobody waits for the first frame any longer
        self._changed.set()
        left = [*self._superseded, *([self._slot] if self._slot else [])]
        self._superseded, self._slot = [], None
        return tuple(left)

    # ------------------------------------------------------------------ called for the reader, on the loop

    def _begin(self) -> None:
        assert self._loop is not None  # noqa: S101 - start() set it
        limit = self.config.frames - self._index if self.config.frames else 0
        self._reader = _Reader(self, self._loop, self._clock, self._opener, limit)
        self._reader.start()

    def publish(self, reader: _Reader, shot: Shot, position_s: float | None, captured_ns: int, captured_unix_ns: int) -> None:
        """A frame arrived."""
        if reader is not self._reader:
            return
        self._first_ns = self._first_ns or captured_ns
        if position_s is None and self.live:
            position_s = (captured_ns - self._first_ns) / NS_PER_S
        frame = CapturedFrame(
            index=self._index, image=shot.image, raw=shot.raw, captured_ns=captured_ns, captured_unix_ns=captured_unix_ns,
            camera=self.config.camera_id or self.config.source.shown,
            source=shot.name or self.config.source.shown,
            position_ns=None if position_s is None else round(position_s * NS_PER_S),
            width_px=shot.image.shape[1], height_px=shot.image.shape[0],
        )  # fmt: skip
        self._index += 1
        if self._slot is not None:
            self._superseded.append(replace(self._slot, image=None))
        self._slot = frame
        self.note = ""
        if self._opened and not self._opened.done():
            self._opened.set_result(None)
        self._changed.set()

    def report_end(self, reader: _Reader, failure: HeadtailError | None, complete: bool, faults: SourceFaults) -> None:
        """The reader came to an end."""
        if reader is not self._reader:
            return
        self.faults = faults
        if self._opened and not self._opened.done():
            self._ended = True
            self._opened.set_exception(failure or SourceError(f"{self.config.source.shown} holds no picture"))
        elif self.config.source.camera and not complete:
            self._again(failure.message if failure else "the camera vanished")
        else:
            # What was captured before a file failed is answered first; the run then ends with the error.
            self.broken, self._ended = failure, True
        self._changed.set()

    def _again(self, why: str) -> None:
        if self._ended:
            return
        if self._reader:
            self._reader.stop()
            self._reader = None
        if self._restart is None:
            self._restart = asyncio.get_running_loop().create_task(self._reopen(why))

    async def _reopen(self, why: str) -> None:
        wait_s, longest_s = self.config.backoff_s
        try:
            while not self._ended:
                self.note = f"{why}; opened again in {wait_s:g} s"
                log.warning("%s", self.note)
                await asyncio.sleep(wait_s)
                before = self._index
                self._begin()
                until = self._clock() + int(self.config.open_timeout_s * NS_PER_S)
                while self._index == before and self._reader is not None and self._clock() < until:
                    await asyncio.sleep(0.05)
                if self._index > before:
                    log.info("the camera is back")
                    return
                if self._reader:
                    self._reader.stop()
                    self._reader = None
                wait_s = min(2 * wait_s, longest_s)
        finally:
            self._restart = None
            self._changed.set()


class _Reader(threading.Thread):
    """Opens and reads one camera until told to stop; speaks to the loop only by ``call_soon_threadsafe``."""

    def __init__(
        self, owner: Capture, loop: asyncio.AbstractEventLoop, clock: Clock, opener: Callable[[Source], Camera], limit: int
    ) -> None:
        super().__init__(name="capture", daemon=True)
        self.taken = threading.Semaphore(1)
        self._owner = owner
        self._loop = loop
        self._clock = clock
        self._opener = opener
        self._limit = limit
        self._halt = threading.Event()
        self._faults = SourceFaults()
        self._delivered = 0
        self._start_ns = 0

    def stop(self) -> None:
        """Asks the thread to end; it does so after the read it is in."""
        self._halt.set()
        self.taken.release()

    def run(self) -> None:
        """The thread."""
        failure: HeadtailError | None = None
        complete = False
        try:
            complete = self._read_all()
        except HeadtailError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is the source's failure
            source = self._owner.config.source
            log.debug("capture failed\n%s", traceback.format_exc().replace(source.target, source.shown))
            failure = SourceError(f"{source.shown} cannot be read: {str(error).replace(source.target, source.shown)}")
        if not self._halt.is_set():
            self._tell(self._owner.report_end, self, failure, complete, self._faults)

    def _read_all(self) -> bool:
        """Reads until the end, or until told to stop; whether the end was wanted."""
        config = self._owner.config
        begun_s = 0.0
        while not self._halt.is_set():
            camera = self._opener(config.source)
            self._owner.fps = fps = config.fps or camera.fps or (DEFAULT_FPS if config.live else 0.0)
            at_s: float | None = None
            try:
                while (shot := camera.read()) is not None and not self._halt.is_set():
                    at_s = self._place(shot, fps, begun_s)
                    if not self._wait_turn(at_s, fps):
                        break
                    self._tell(self._owner.publish, self, shot, at_s, self._clock(), time.time_ns())
                    self._delivered += 1
                    if self._delivered == self._limit:
                        return True
            finally:
                self._see_faults(camera)
                camera.close()
            if config.source.camera:
                return False
            if not config.loop:
                break
            begun_s = at_s + 1 / fps if at_s is not None and fps else begun_s
        return True

    def _place(self, shot: Shot, fps: float, begun_s: float) -> float | None:
        """Seconds since the source began, by its own stamps or by the pace asked for; None where it has no time of its own."""
        config = self._owner.config
        if config.source.camera:
            return None
        if config.realtime and (config.fps or shot.position_s is None):
            return self._delivered / fps
        return None if shot.position_s is None else begun_s + shot.position_s

    def _wait_turn(self, at_s: float | None, fps: float) -> bool:
        """Waits until a frame is due (paced) or wanted (files); False when there will be no more."""
        config = self._owner.config
        self._start_ns = self._start_ns or self._clock()
        if config.source.kind == "synthetic":
            at_s = self._delivered / fps
        if (config.realtime or config.source.kind == "synthetic") and at_s is not None:
            due_ns = self._start_ns + at_s * NS_PER_S
            if self._halt.wait(max(0.0, (due_ns - self._clock()) / NS_PER_S)):
                return False
        if not config.live:
            self.taken.acquire()
        return not self._halt.is_set()

    def _see_faults(self, camera: Camera) -> None:
        """Keeps what the source lacked, and says it once, however often the source is looped."""
        found, known = camera.faults(), self._faults
        if found.video and not known.video:
            log.warning("%s", found.video)
        self._faults = SourceFaults(unreadable=found.unreadable, left_out=found.left_out, video=found.video or known.video)

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._halt.set()
