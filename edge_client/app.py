"""Puts the client together: source, bundle, pipeline, sinks; runs it, and takes it apart in the right order."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.bundles.loader import Load, ModelLoader, loads_here
from edge_client.bundles.store import BundleStore
from edge_client.capture.capture import Capture, CaptureConfig
from edge_client.capture.sources import Source, SourceFaults, parse_source
from edge_client.config import EMBEDDED, ClientConfig
from edge_client.console import Console, Ending
from edge_client.control import Policy
from edge_client.device.choices import DeviceTimes, make_controller
from edge_client.device.engine import Engine
from edge_client.device.worker import DeviceWorker, Lanes, ThreadExecutor
from edge_client.events.sink import EventSink
from edge_client.extensions import SINKS, TRANSPORTS, make
from edge_client.frames import Ledger, Outcome
from edge_client.gates.interest import InterestGate, open_interest
from edge_client.gates.tracking import Follower
from edge_client.observe.facts import fact_lines, peak_memory_bytes, prefilter_facts, shown_name, source_facts
from edge_client.observe.metrics import Connection, Metrics
from edge_client.observe.status import Status
from edge_client.observe.summary import JpegSampler, Summary
from edge_client.observe.tracing import Traces, untraced
from edge_client.pipeline.files import FileStrategy
from edge_client.pipeline.live import LiveStrategy
from edge_client.pipeline.parts import Parts, PipelineConfig
from edge_client.pipeline.runner import Runner
from edge_client.sinks import InOrder, JsonLines, PictureLines, Sink, Window, open_json_file, open_video
from edge_client.sinks.jsonl import is_pipe, open_pipe
from edge_client.sinks.output_file import refuse_overwriting
from edge_client.transport.base import Link
from edge_client.transport.embedded import EmbeddedServer
from edge_client.web.opening import link_estimate, open_page
from edge_client.web.view import CameraView, Circumstances
from protos.errors import ConfigError, HeadtailError, SourceError
from protos.messages import Detection
from protos.tracing import open_spans
from protos.version import package_version

if TYPE_CHECKING:
    from edge_client.web.page import LivePage

log = logging.getLogger(__name__)

_TELL_S = 1.0

MakePolicy = Callable[[Engine, DeviceTimes, float], Policy]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What the cameras of one process have in common.

    Attributes:
        lanes: where the device's work is done.
        page: the live page; None: there is none.
        metrics: makes a camera's counters, by its name; None: nobody counts.
    """

    lanes: Lanes
    page: LivePage | None = None
    metrics: Callable[[str, Connection], Metrics] | None = None


class App:
    """One run of ``edge-client``.

    Args:
        config: what was asked for.
        console: whom it speaks to.
        load: opens bundles; None: for this device.
        policy: makes the policy of an engine for a frame rate; None: that of ``config``.
        shared: what it has in common with other cameras; None: it is alone.

    Attributes:
        ready: the model is there.
    """

    def __init__(
        self, config: ClientConfig, console: Console, *, load: Load | None = None, policy: MakePolicy | None = None,
        shared: Shared | None = None,
    ) -> None:  # fmt: skip
        self.ready = asyncio.Event()
        self._shared = shared
        self._config = config
        self._console = console
        self._clock = time.monotonic_ns
        self._store = BundleStore()
        self._runner: Runner | None = None
        self._session: Link | None = None
        self._capture: Capture | None = None
        self._load = load or loads_here(self._store, clock=self._clock, threads=config.threads, encoder=config.h264_encoder)
        self._make_policy = policy or self._policy
        self._loader: ModelLoader | None = None
        self._follower: Follower | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending = Ending()

    async def run(self) -> Ending:
        """Runs to the end, whatever ends it, and says how it was."""
        loop = asyncio.get_running_loop()
        sampler = JpegSampler(clock=self._clock, every_s=0.0)
        summary = Summary(lambda: self._runner.pipeline.ledger if self._runner else Ledger(), sampler, self._labels)
        server: EmbeddedServer | None = None
        page = self._shared.page if self._shared is not None else None
        own_page: LivePage | None = None
        try:
            source = parse_source(self._config.camera)
            self._spare_files(source)
            if self._config.web is not None:
                page = own_page = open_page(self._config.web)
                await own_page.start()
            if self._config.server == EMBEDDED:
                server = EmbeddedServer(self._config.model)
            self._task = asyncio.create_task(self._everything(source, server, summary, sampler, page))
            await self._ending.settle(self._task)
        except HeadtailError as error:
            self._ending.error = error
        finally:
            if own_page is not None:
                await own_page.close()
            if server is not None:
                await loop.run_in_executor(None, server.stop)
            sampler.close()
        self._ending.summary = {**summary.as_json(), **self._facts()}
        self._ending.text = summary.as_text() + fact_lines(self._facts())
        return self._ending

    def interrupt(self) -> None:
        """Ends the run in order: no more frames, what is in flight is settled, every output is whole."""
        self._ending.interrupted = True
        asyncio.get_running_loop().call_later(_TELL_S, self._console.status, "ending; another interrupt ends it at once\n")
        if self._runner is not None:
            self._runner.stop()
        elif self._task is not None:
            self._task.cancel()

    def _spare_files(self, source: Source) -> None:
        """Refuses outputs that would destroy what they are made from, before anything else is done."""
        config = self._config
        others = [(f"--{name.replace('_', '-')}", getattr(config, name)) for name in ("tls_ca", "tls_cert", "tls_key")]
        refuse_overwriting("--output", config.output, source, others)
        refuse_overwriting("--save-video", config.save_video, source, [*others, ("--output", config.output)])

    # ------------------------------------------------------------------ the parts

    async def _everything(
        self, source: Source, server: EmbeddedServer | None, summary: Summary, sampler: JpegSampler, page: LivePage | None
    ) -> None:
        config = self._config
        address = await server.start() if server is not None else config.server
        endpoint = replace(config.endpoint(address), shared=self._shared is not None)
        capture = self._capture = Capture(
            CaptureConfig(
                source=source,
                realtime=config.realtime,
                loop=config.loop,
                frames=config.frames,
                fps=config.fps,
                camera_id=config.camera_id,
            ),
            clock=self._clock,
        )
        live = capture.live
        model = "" if server is not None else config.model
        key = f"{EMBEDDED}:{config.model}" if server is not None else ""
        loader = self._loader = ModelLoader(endpoint, model, store=self._store, load=self._load, key=key)
        engine = await loader.first(live=live, wait_s=config.effective_wait_s(live=live))
        self.ready.set()
        if live:
            sampler.every_s = 1.0 if self._shared is None else 10.0
        follower = self._follower = Follower() if config.track and engine.task.form is Detection else None
        sinks = InOrder([summary, *await self._sinks(source, capture)], self._end_run, follower.follow if follower else None)
        spans = open_spans("headtail-client", package_version(), config.otel_endpoint)
        traces = Traces(spans) if spans is not None else None
        if traces is not None:
            sinks.add(traces)
        own = ThreadExecutor()
        worker = DeviceWorker(self._shared.lanes if self._shared is not None else Lanes(own))
        asked = bool(config.interest) or config.recall is not None
        parts = Parts(
            frames=capture, worker=worker, clock=self._clock, emit=sinks.take, sample=sampler.offer,
            fetch=loader.fetch, times=loader.times, paced=loader.paced,
            controller=lambda engine, fps: self._make_policy(engine, loader.times(engine), fps),
            traceparent=traces.sent if traces is not None else untraced,
            interest=functools.partial(self._interest, wanted=_wanted(config.prefilter, source, asked=asked)),
        )  # fmt: skip
        settings = PipelineConfig(
            model=model, deadline_ms=config.effective_deadline_ms(live=live), max_in_flight=config.max_in_flight,
            wait_for_server_s=config.effective_wait_s(live=live), point_id=self._checked_point(engine), group=config.group,
            change_gate=_wanted(config.change_gate, source), floor=config.floor(), temporal=not source.pictures,
            keep_images=config.shows_pictures or page is not None,
            client_version=package_version(),
        )  # fmt: skip
        runner = self._runner = Runner(settings, parts, engine, LiveStrategy if live else FileStrategy)
        self._session = make(TRANSPORTS, Link, config.transport, endpoint, runner.exchange, clock=self._clock)
        if self._shared is not None and self._shared.metrics is not None:
            sinks.add(self._shared.metrics(config.camera_id, self._session))
        if config.metrics_listen is not None:
            metrics = Metrics(self._session)
            log.info("metrics on port %d", metrics.serve(*config.metrics_address()))
            sinks.add(metrics)
        if page is not None:
            name = config.camera_id or shown_name(source)
            around = functools.partial(self._circumstances, address)
            view = CameraView(name, self._labels, around, deadline_ms=settings.deadline_ms, draw=page.draw, clock=self._clock)
            page.add(view)
            sinks.add(view)
        status = self._status(summary_sink=sinks)
        shower = asyncio.create_task(self._show(status))
        try:
            await runner.run(self._session)
        finally:
            shower.cancel()
            sinks.close()
            own.close()
        if sinks.failure is not None:
            raise sinks.failure
        if capture.broken is not None:
            raise capture.broken
        if runner.strategy.failure is not None:
            raise runner.strategy.failure
        if config.strict and str(capture.faults):
            raise SourceError(f"--strict: {capture.faults}")

    def _end_run(self) -> None:
        """A sink takes no more: the source ends, and what is in flight still gets its outcome."""
        if self._runner is not None:
            asyncio.get_running_loop().call_soon(self._runner.stop)

    def _checked_point(self, engine: Engine) -> int | None:
        if self._config.operating_point is not None:
            engine.bundle.point(self._config.operating_point)
        self._config.floor().check(engine.bundle)
        for rule in self._config.events:
            rule.check_classes(engine.labels.values(), engine.model)
        return self._config.operating_point

    def _policy(self, engine: Engine, times: DeviceTimes, fps: float) -> Policy:
        return make_controller(engine, times, fps=fps, explain=self._config.explain, policy=self._config.policy)

    def _interest(self, engine: Engine, *, wanted: bool) -> InterestGate | None:
        config = self._config
        if not wanted:
            return None
        names = [name.strip() for name in config.interest.split(",") if name.strip()]
        gate = open_interest(engine.bundle, interest=names, recall=config.recall, insist=config.prefilter == "on")
        asked = config.prefilter == "on" or names or config.recall is not None
        if asked and engine.bundle.manifest.head.prefilter is None and self._loader is not None and self._loader.fresh:
            raise ConfigError(f"bundle {engine.model!r} has no prefilter; leave --prefilter, --interest and --recall out")
        return gate

    # ------------------------------------------------------------------ what people see

    @property
    def _engine(self) -> Engine | None:
        return self._loader.engine if self._loader is not None else None

    def _labels(self) -> Mapping[int, str]:
        return self._engine.labels if self._engine is not None else {}

    async def _sinks(self, source: Source, capture: Capture) -> list[Sink]:
        config, sinks = self._config, list[Sink]()
        if config.output == "-":
            sinks.append(JsonLines(self._console.results, self._labels, stopping=self._console.stopping))
        elif config.output is not None and is_pipe(Path(config.output)):
            sinks.append(await open_pipe(Path(config.output), self._labels, stopping=self._console.stopping))
        elif config.output is not None:
            max_bytes = round(config.output_max_mb * 1e6)
            sinks.append(open_json_file(Path(config.output), self._labels, append=config.append, max_bytes=max_bytes))
        if config.save_video is not None:
            many = source.kind != "picture"
            clip = open_video(
                Path(config.save_video), self._labels, fps=lambda: config.fps or capture.fps, pictures=source.pictures, many=many
            )
            sinks.append(clip)
        if source.pictures and config.output != "-":
            sinks.append(PictureLines(self._console.results, self._labels))
        if config.display:
            sinks.append(Window(self._labels))
        if config.events:
            name, folder = config.camera_id or shown_name(source), self._store.root / "events"
            sinks.append(EventSink(config.events, name, self._labels, self._is_up, folder=folder))
        for text in config.sink:
            name, _, where = text.partition("=")
            sinks.append(make(SINKS, Sink, name, where, self._labels))
        return sinks

    def _status(self, *, summary_sink: InOrder) -> Status:
        status = Status(
            self._console.status,
            clock=self._clock,
            terminal=self._console.terminal,
            note=self._note,
            columns=self._console.columns,
            labels=self._labels,
        )
        summary_sink.add(status)
        return status

    def _note(self) -> str:
        notes = [self._capture.note if self._capture else "", self._runner.note if self._runner else ""]
        if self._session is not None and not self._session.up:
            notes.append("no server" + (f": {self._session.error.message}" if self._session.error else ""))
        return "; ".join(n for n in notes if n)

    @property
    def outcomes(self) -> Mapping[Outcome, int]:
        """Frames so far, by outcome."""
        return self._runner.pipeline.ledger.outcomes if self._runner is not None else {}

    @property
    def up(self) -> bool:
        """Whether the server is there."""
        return self._is_up()

    def _is_up(self) -> bool:
        return self._session is not None and self._session.up

    def _circumstances(self, address: str) -> Circumstances:
        session, runner = self._session, self._runner
        assert session is not None  # noqa: S101 - both are there before the page's camera
        assert runner is not None  # noqa: S101
        notes = (self._capture.note if self._capture else "", runner.note)
        return Circumstances(
            server=address, up=session.up, error=session.error.message if session.error and not session.up else "",
            reconnects=session.reconnects, note="; ".join(n for n in notes if n),
            link=link_estimate(runner.pipeline.model.controller),
        )  # fmt: skip

    async def _show(self, status: Status) -> None:
        while True:
            await asyncio.sleep(status.interval_s)
            status.show()

    def _facts(self) -> dict[str, Any]:
        runner, engine = self._runner, self._engine
        return {
            "model": engine.model if engine else None,
            "bundle_sha256": engine.sha256 if engine else None,
            "late_results": runner.exchange.late_results if runner else 0,
            "reconnects": self._session.reconnects if self._session else 0,
            "server_error": self._server_error(),
            "bundle_switches": runner.pipeline.bundle_switches if runner else 0,
            "prefilter": prefilter_facts(self._runner.pipeline.model.interest if self._runner else None),
            "tracking_ms_p50": self._follower.ms_p50 if self._follower else None,
            **source_facts(self._capture.faults if self._capture is not None else SourceFaults()),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _server_error(self) -> str | None:
        """Why there was no server at the end; None: there was one, or it was not waited for."""
        error = self._session.error if self._session is not None else None
        return error.message if error is not None else None


def _wanted(setting: str, source: Source, *, asked: bool = False) -> bool:
    """What ``auto`` means: gates are for cameras; of a file every frame is wanted, unless something else was asked for."""
    return setting == "on" or (setting == "auto" and (source.camera or asked))
