"""The client for programs: a frame in, its answer out.

    async with Client.open(server="host:50051", model="detector") as client:
        report = await client.infer(frame)                # NumPy (H, W, 3) uint8, blue green red
        async for report in client.run("rtsp://cam/1"):   # or a file, a directory, an iterable of frames
            ...

Without an event loop, ``with`` in place of ``async with`` gives the same methods, which block. Nothing here prints, touches a
signal or ends the process: that belongs to the command line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_client.blocking import BlockingClient
from edge_client.bundles.loader import ModelLoader, loads_here
from edge_client.bundles.store import BundleStore
from edge_client.capture.base import Frames
from edge_client.capture.capture import Capture, CaptureConfig
from edge_client.capture.given import Given, IteratedFrames, PacedFrames, PushedFrames, checked_image
from edge_client.capture.sources import parse_source
from edge_client.config import EMBEDDED, LIVE_DEADLINE_MS
from edge_client.control import Policy
from edge_client.device.choices import make_controller
from edge_client.device.engine import Engine
from edge_client.device.worker import DeviceWorker, Lanes, ThreadExecutor
from edge_client.extensions import TRANSPORTS, make
from edge_client.frames import FrameReport
from edge_client.gates.interest import InterestGate, open_interest
from edge_client.options import ClientOptions
from edge_client.pipeline.files import FileStrategy
from edge_client.pipeline.live import LiveStrategy
from edge_client.pipeline.parts import Parts, PipelineConfig
from edge_client.pipeline.runner import Runner
from edge_client.sinks import InOrder
from edge_client.sinks.answers import Answers, Inference
from edge_client.transport.base import Link
from edge_client.transport.embedded import EmbeddedServer
from protos.errors import ConfigError, HeadtailError
from protos.version import package_version
from splitters.runtime.inputs import Raw
from splitters.tasks.preprocess import BLANK, Frame


class Client:
    """One model of one server, its head on this device. Made by ``open``; belongs to the event loop it was opened in."""

    def __init__(self, server: str, model: str, options: ClientOptions) -> None:
        self._server, self._model, self._options = server, model, options
        self._clock = time.monotonic_ns
        self._executor = ThreadExecutor()
        self._stack = AsyncExitStack()
        self._inference: Inference | None = None
        self._runs: set[asyncio.Task[None]] = set()
        self._loader: ModelLoader

    @staticmethod
    def open(*, server: str = "127.0.0.1:50051", model: str = "", options: ClientOptions | None = None) -> Opening:
        """Meets the server, fetches and opens its model.

        Args:
            server: ``host:port``; ``embedded``: a server in a child process of its own (needs the server's packages).
            model: a name the server knows; with ``embedded`` a bundle's name or directory; empty: the server's first.
            options: everything else.

        Returns:
            A context manager: ``async with`` gives a ``Client``, ``with`` a ``BlockingClient``. Entering it raises a
            ``HeadtailError`` where there is no such server or model and none is remembered.
        """
        return Opening(lambda: Client(server, model, options or ClientOptions()))

    @property
    def model(self) -> str:
        """The model's name."""
        return self._engine.model

    @property
    def labels(self) -> Mapping[int, str]:
        """Class ids and their names, of the model in use."""
        return self._engine.labels

    @property
    def operating_points(self) -> Mapping[int, Mapping[str, float]]:
        """What there is to choose from: accuracy and the median payload in bytes, by id."""
        points = self._engine.bundle.points
        return {p.id: {"accuracy": p.accuracy, "payload_bytes_p50": p.payload_bytes.p50} for p in points}

    @property
    def _engine(self) -> Engine:
        assert self._loader.engine is not None  # noqa: S101 - entering loads it
        return self._loader.engine

    # ------------------------------------------------------------------ use

    async def infer(self, frame: Frame | None = None, *, raw: Raw | None = None) -> FrameReport:
        """Answers one frame; several may be under way at a time.

        Without a deadline the server answers, however long that takes; the local model does where no server was reachable for
        ``wait_for_server_s``. With one the controller chooses what is sent, and the local model answers what comes too late.

        Args:
            frame: (H, W, 3) uint8, blue green red; None: the model takes no picture.
            raw: arrays for the inputs that take none, by their names: tokens, volumes, readings of other sensors.

        Returns:
            The frame's outcome, answer, operating point, bytes and latency.

        Raises:
            SourceError: it is no such array, or arrays that the model needs are absent or do not fit.
            HeadtailError: the server cannot be reached or refuses, and nothing here can answer.
        """
        inputs = self._engine.inputs
        inputs.check(raw)
        image = BLANK if frame is None and not inputs.pictures else checked_image(frame)
        if self._inference is None or self._inference.over:
            self._inference = self._begin_inference()
        return await self._inference.infer(image, raw)

    async def run(
        self, source: str | Path | Iterable[Given] | AsyncIterable[Given], *, realtime: bool = False, loop: bool = False,
        frames: int = 0, images: bool = False,
    ) -> AsyncIterator[FrameReport]:  # fmt: skip
        """Answers a source's frames, in the order of capture; ends with the source.

        Args:
            source: what ``--camera`` takes (a camera's index, a URL, a file, a directory), or frames, or mappings of arrays, in
                which ``image`` is the frame.
            realtime: play a file at its own pace, and treat it as a camera: the newest frame wins.
            loop: begin a file again at its end.
            frames: end after this many; 0: no limit.
            images: reports carry the frame's picture.

        Raises:
            HeadtailError: the source cannot be read, or as with ``infer``.
        """
        given: Frames
        pictures, capture = False, None
        if isinstance(source, str | Path):
            parsed = parse_source(str(source))
            pictures = parsed.pictures
            settings = CaptureConfig(source=parsed, realtime=realtime, loop=loop, frames=frames)
            given = capture = Capture(settings, clock=self._clock)
        else:
            given = IteratedFrames(source, clock=self._clock, fps=self._options.fps, name="frames", limit=frames)
        answers = Answers()
        paced = PacedFrames(given, answers.has_room)
        answers.on_room = paced.room.set
        runner = self._runner(paced, InOrder([answers]).take, temporal=not pictures, keep_images=images)
        task = asyncio.create_task(self._drive(runner))
        task.add_done_callback(lambda _task: answers.close())
        self._runs.add(task)
        try:
            while (report := await answers.next()) is not None:
                yield report
            await task
            if capture is not None and capture.broken is not None:
                raise capture.broken
        finally:
            self._runs.discard(task)
            await _ended(task)

    # ------------------------------------------------------------------ inside

    def _begin_inference(self) -> Inference:
        live = bool(self._options.deadline_ms)
        frames = PushedFrames(clock=self._clock, fps=self._options.fps, name="frames", live=live)
        inference = Inference(frames)
        runner = self._runner(frames, inference.take, temporal=True, keep_images=False)
        inference.begin(asyncio.create_task(self._drive(runner)), runner.stop)
        return inference

    async def _drive(self, runner: Runner) -> None:
        link = make(TRANSPORTS, Link, self._options.transport, self._endpoint, runner.exchange, clock=self._clock)
        await runner.run(link)
        if runner.strategy.failure is not None:
            raise runner.strategy.failure

    def _runner(self, frames: Frames, emit: Callable[[FrameReport], None], *, temporal: bool, keep_images: bool) -> Runner:
        options = self._options
        deadline_ms = options.deadline_ms if options.deadline_ms is not None else LIVE_DEADLINE_MS if frames.live else 0.0
        parts = Parts(
            frames=frames, worker=DeviceWorker(Lanes(self._executor)), clock=self._clock, emit=emit, fetch=self._loader.fetch,
            controller=self._policy, times=self._loader.times, paced=self._loader.paced, interest=self._interest,
        )  # fmt: skip
        config = PipelineConfig(
            model=self._model_there, deadline_ms=deadline_ms, max_in_flight=options.max_in_flight,
            wait_for_server_s=options.wait_for_server_s, point_id=options.operating_point, group=options.group,
            floor=options.floor(), change_gate=options.change_gate, temporal=temporal, keep_images=keep_images,
            client_version=package_version(),
        )  # fmt: skip
        return Runner(config, parts, self._engine, LiveStrategy if frames.live else FileStrategy)

    def _policy(self, engine: Engine, fps: float) -> Policy:
        return make_controller(engine, self._loader.times(engine), fps=fps, policy=self._options.policy)

    def _interest(self, engine: Engine) -> InterestGate | None:
        if self._options.interest is None:
            return None
        gate = open_interest(engine.bundle, interest=self._options.interest, recall=self._options.recall, insist=True)
        if gate is None:
            raise ConfigError(f"bundle {engine.model!r} has no prefilter; leave interest out")
        return gate

    @property
    def _model_there(self) -> str:
        return "" if self._server == EMBEDDED else self._model

    async def _open(self) -> None:
        options, server = self._options, self._server
        self._stack.callback(self._executor.close)
        key = ""
        if server == EMBEDDED:
            child = EmbeddedServer(self._model)
            self._stack.push_async_callback(asyncio.to_thread, child.stop)
            server, key = await child.start(), f"{EMBEDDED}:{self._model}"
        self._endpoint = options.endpoint(server)
        store = BundleStore(options.cache)
        self._stack.callback(store.close)
        load = loads_here(store, clock=self._clock, threads=options.threads, encoder=options.h264_encoder)
        self._loader = ModelLoader(self._endpoint, self._model_there, store=store, load=load, key=key)
        engine = await self._loader.first(live=False, wait_s=options.wait_for_server_s)
        options.floor().check(engine.bundle)
        if options.operating_point is not None:
            engine.bundle.point(options.operating_point)

    async def close(self) -> None:
        """Ends what runs, in order: frames under way get their outcomes. ``async with`` does it."""
        if self._inference is not None:
            await self._inference.close()
        for task in tuple(self._runs):
            await _ended(task)
        await self._stack.aclose()


class Opening:
    """What ``Client.open`` gives: entered with ``async with`` or ``with``."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self._make = make_client
        self._client: Client | None = None
        self._blocking: BlockingClient | None = None

    async def __aenter__(self) -> Client:
        self._client = self._make()
        try:
            await self._client._open()  # noqa: SLF001 - of the same module
        except BaseException:
            await self._client.close()
            raise
        return self._client

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None:
            await self._client.close()

    def __enter__(self) -> BlockingClient:
        self._blocking = BlockingClient(lambda: Opening(self._make))
        return self._blocking

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._blocking is not None:
            self._blocking.close()


async def _ended(task: asyncio.Task[Any]) -> None:
    """Ends a run that nobody wants any more."""
    task.cancel()
    with suppress(asyncio.CancelledError, HeadtailError):
        await task
