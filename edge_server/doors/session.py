"""One camera's stream, server side: hello, welcome, frames in, results out, and a clean end.

A task reads, a task writes, and every frame is a task of its own. A bad frame is answered with an error and the stream
goes on; a broken protocol ends the stream with a mapped status. While the stream lasts every frame has exactly one result,
by its deadline and a short grace at the latest, whatever becomes of the task that answers it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from edge_server.access.fair import Pace
from edge_server.access.quota import Caller
from edge_server.backends import Backend
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.config import Limits
from edge_server.doors.answering import Answerer, History, failed
from edge_server.doors.datagrams import MARGIN_NS, DatagramPath, Datagrams
from edge_server.doors.wire import checked
from edge_server.frames.assembly import ArrivedFrame, Assembler
from edge_server.frames.video import payload_kinds
from edge_server.models import Model, ModelStore, said_bytes
from edge_server.observe.metrics import Metrics
from edge_server.observe.tracing import NoTracing, Tracing
from protos.errors import (
    DrainingError,
    HeadtailError,
    InternalError,
    LimitError,
    OverloadedError,
    ProtocolError,
    VersionMismatchError,
)
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, FrameLayer, PayloadKind, Result
from protos.text import printable

log = logging.getLogger(__name__)

_DEFAULT_IN_FLIGHT = 8
_GRACE_NS = 250_000_000  # beyond a frame's deadline, or its arrival where that is later; a backend that keeps it needs none of this
_NO_DEADLINE_NS = 120_000_000_000  # what a frame without deadline is given
_LEAVE_S = 5.0  # for tasks that are cancelled at the end of a stream
_PAUSE_NS = 200_000_000  # longest a session that overruns its grant is left unread at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """What every session of a server shares."""

    store: ModelStore
    backend: Backend
    answerer: Answerer
    bandwidth: BandwidthManager
    limits: Limits
    metrics: Metrics
    clock: Callable[[], int]
    version: str
    tracing: Tracing = field(default_factory=NoTracing)
    pace: Pace = field(default_factory=Pace)
    datagrams: Datagrams | None = None


def host_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where a call comes from, without the port."""
    return context.peer().rpartition(":")[0]


class Session:
    """One open stream.

    Args:
        services: shared by all.
        context: the call.
        quota: of the client's token; None: none.
    """

    def __init__(self, services: Services, context: grpc.aio.ServicerContext[Any, Any], quota: Caller | None = None) -> None:
        self.id = secrets.token_hex(6)
        self.model: Model | None = None
        self._s = services
        self._context = context
        self._quota = quota
        self._who = (quota.name if quota is not None else "") or host_of(context)
        self._client_sha256 = ""
        self._max_in_flight = _DEFAULT_IN_FLIGHT
        self._assembler = self._new_assembler()
        self._history = services.answerer.history()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = {"answered": 0, "refused": 0}
        self._owed: set[int] = set()  # ids of frames taken and not answered
        self._out: deque[pb.ServerMessage] = deque()
        self._wake = asyncio.Event()
        self._finishing = False
        self._refuses = ""  # why, to new frames; empty: it takes them
        self._error: HeadtailError | None = None
        self._farewell: HeadtailError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._path = DatagramPath(
            self.id, self._begin_other, services.datagrams, bandwidth=services.bandwidth, backend=services.backend,
            limits=services.limits, clock=services.clock,
        )  # fmt: skip

    # ------------------------------------------------------------ the whole stream

    async def run(self) -> None:
        """Serves the stream to its end.

        Raises:
            HeadtailError: the client broke the protocol or a limit.
        """
        await self._greet()
        name = self._greeted().name
        self._s.metrics.on_session(name, +1)
        reader = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            reader.cancel()
            for task in self._tasks:
                task.cancel()
            if self._timer is not None:
                self._timer.cancel()
            self._history.close()
            self._path.close()
            self._s.bandwidth.close(self.id)
            self._s.metrics.on_session(name, -1)
            await asyncio.wait({reader, *self._tasks}, timeout=_LEAVE_S)
        error = self._error or self._farewell
        if error is not None:
            raise error

    def drain(self, grace_ns: int, why: str) -> None:
        """Tells the client that the stream will end; new frames are refused.

        Args:
            grace_ns: how long frames in flight may take.
            why: for who sends new frames.
        """
        self._refuses = why
        self._send(pb.ServerMessage(draining=pb.Draining(grace_ns=grace_ns)))

    def finish(self, error: HeadtailError | None = None) -> None:
        """Ends the stream once what is owed has been sent; with an error, where the client shall know why."""
        self._farewell = error
        self._flush_assembler()
        self._path.flush()
        self._finishing = True
        self._wake.set()

    def end(self, error: HeadtailError) -> None:
        """Ends the stream with an error; what is ready to be sent still is."""
        self._error = self._error or error
        self._finishing = True
        self._wake.set()

    def tell_replaced(self, model: Model) -> None:
        """The tail of this session's model was replaced; frames in hand still run on the old one."""
        if self.model is not None and self.model.name == model.name and self.model.sha256 != model.sha256:
            self._send(pb.ServerMessage(bundle_changed=pb.BundleChanged(bundle_sha256=model.sha256)))

    def facts(self) -> dict[str, object]:
        """What an operator sees of it."""
        who, model = printable(self._who), self.model.name if self.model is not None else ""
        facts = {"id": self.id, "who": who, "model": model, "in_flight": len(self._tasks), "max_in_flight": self._max_in_flight}
        return {**facts, "unsent": len(self._out), **self._sent, **self._s.bandwidth.facts(self.id)}

    # ------------------------------------------------------------ hello

    async def _greet(self) -> None:
        try:
            async with asyncio.timeout(self._s.limits.hello_s):
                message = await self._context.read()
        except TimeoutError:
            raise ProtocolError(f"no hello came within {self._s.limits.hello_s:g} s") from None
        if message is EOF or checked(message).WhichOneof("content") != "hello":
            raise ProtocolError("a session begins with hello")
        if self._refuses:
            raise DrainingError(self._refuses)
        try:
            async with asyncio.timeout(self._s.limits.write_s):
                await self._context.write(self._hello(message.hello))
        except TimeoutError:
            raise LimitError(f"the client has read nothing for {self._s.limits.write_s:g} s") from None

    def _hello(self, hello: pb.Hello) -> pb.ServerMessage:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the client speaks protocol version {hello.protocol_version}, this server {PROTOCOL_VERSION}; update the older one"
            )
        model = self._s.store.get(hello.model)
        # A client may say hello as often as it likes, and must not fill the log with it.
        level = logging.INFO if self.model is None else logging.DEBUG
        log.log(level, "session %s: %s, client %r", self.id, model.name, hello.client_version[:32])
        self.model = model
        self._client_sha256 = hello.bundle_sha256
        self._max_in_flight = min(hello.max_in_flight or _DEFAULT_IN_FLIGHT, self._s.limits.max_in_flight)
        self._history = self._s.answerer.history(after=self._history)
        points = [(p.payload_bytes.p50, p.accuracy) for p in model.bundle.points if p.payload_bytes.p50 > 0 and p.accuracy > 0]
        fps = hello.fps if 0 < hello.fps < 10_000 else 0.0
        owner = self._quota.name if self._quota is not None else ""
        self._s.bandwidth.open(self.id, hello.group[:64], owner=owner, fps=fps, points=points, model=model.sha256)
        return pb.ServerMessage(
            welcome=pb.Welcome(
                protocol_version=PROTOCOL_VERSION, session_id=self.id, model=model.name, bundle_sha256=model.sha256,
                max_in_flight=self._max_in_flight, max_payload_bytes=self._s.limits.max_payload_bytes,
                server_version=self._s.version, payload_kinds=payload_kinds(self._s.limits.max_video_streams),
                datagrams=self._path.offer(wanted=hello.datagrams),
            )
        )  # fmt: skip

    def _begin_other(self, frame: ArrivedFrame) -> None:
        """A frame that came as datagrams; ids that the stream uses are not for it."""
        if frame.frame_id not in self._owed and not self._finishing:
            self._begin(frame)

    # ------------------------------------------------------------ in

    async def _read(self) -> None:
        try:
            while True:
                message = await self._context.read()
                if message is EOF:  # the client will send no more
                    self.finish()
                    return
                if await self._take(checked(message)) or self._error is not None:
                    return
        except HeadtailError as error:
            self._error = error
        except Exception:
            log.exception("session %s: its reader failed", self.id)
            self._error = InternalError("the server failed on this session; its log says why")
        self._finishing = True
        self._wake.set()

    async def _take(self, message: pb.ClientMessage) -> bool:
        """Handles one message; whether it was the last."""
        match message.WhichOneof("content"):
            case "layer":
                self._on_layer(message.layer)
                now_ns = self._s.clock()
                wait_s = self._s.pace.wait_s(self._who, len(message.layer.payload), now_ns)
                if pause_s := max(min(self._s.bandwidth.pause_ns(self.id, now_ns), _PAUSE_NS) / 1e9, wait_s):
                    await asyncio.sleep(pause_s)
            case "ping":
                self._send(pb.ServerMessage(pong=pb.Pong(echo_sent_ns=message.ping.sent_ns)))
            case "hello":
                self._flush_assembler()
                self._assembler = self._new_assembler()
                self._send(self._hello(message.hello))
            case "goodbye":
                self.finish()
                return True
            case _:
                raise ProtocolError("a client message was empty")
        return False

    def _on_layer(self, message: pb.FrameLayer) -> None:
        now_ns = self._s.clock()
        self._s.bandwidth.on_layer(self.id, len(message.payload), message.sent_ns, now_ns)
        try:
            layer = FrameLayer.from_proto(message, max_payload_bytes=self._s.limits.max_payload_bytes)
        except HeadtailError as error:
            ready = self._assembler.damaged(message.frame_id, message.layer, error, now_ns)
        else:
            ready = self._assembler.add(layer, now_ns, self._s.bandwidth.queue_ns(self.id))
        for frame in ready:
            self._begin(frame)
        self._set_timer(now_ns)

    def _begin(self, frame: ArrivedFrame) -> None:
        now_ns = self._s.clock()
        refusal = frame.error or self._refusal(frame, now_ns)
        if refusal is not None:
            result = failed(frame, refusal, now_ns)
            self._s.metrics.on_result(self._greeted().name, result, frame.payload_bytes)
            self._send_result(result)
            return
        if frame.kind is PayloadKind.LATENT:
            self._s.bandwidth.on_payload(self.id, said_bytes(self._greeted(), frame.operating_point), frame.payload_bytes)
        task = asyncio.create_task(self._answer(self._greeted(), frame, self._history))
        self._tasks.add(task)
        self._owed.add(frame.frame_id)
        # A frame that was late when it came is refused by the answerer, in plain words: that takes a turn of the loop.
        until_ns = now_ns + _NO_DEADLINE_NS if frame.deadline_ns is None else max(now_ns, frame.deadline_ns) + _GRACE_NS
        timer = asyncio.get_running_loop().call_later(max(0, until_ns - now_ns) / 1e9, self._overdue, frame, task)
        task.add_done_callback(functools.partial(self._done, frame, timer))

    def _refusal(self, frame: ArrivedFrame, now_ns: int) -> HeadtailError | None:
        model = self._greeted()
        if self._refuses:
            return DrainingError(self._refuses)
        if len(self._tasks) >= self._max_in_flight:
            return LimitError(
                f"{len(self._tasks)} frames are unanswered; this session may have {self._max_in_flight}", retryable=True
            )
        if self._client_sha256 != model.sha256:
            return VersionMismatchError(
                f"this frame was made with bundle {self._client_sha256[:12] or '(none)'}, "
                f"the server's tail is {model.sha256[:12]}; fetch that bundle and say hello again"
            )
        if self._quota is not None:
            return self._quota.admit_frame(frame.payload_bytes, now_ns)
        return None

    async def _answer(self, model: Model, frame: ArrivedFrame, history: History) -> None:
        self._settle(frame, await self._s.answerer.answer(model, frame, history, self._who))

    def _greeted(self) -> Model:
        if self.model is None:
            raise ProtocolError("a session begins with hello")
        return self.model

    def _settle(self, frame: ArrivedFrame, result: Result) -> None:
        """A frame's one result; whatever comes later is too late."""
        if frame.frame_id in self._owed:
            self._owed.discard(frame.frame_id)
            self._send_result(result)

    def _give_up(self, frame: ArrivedFrame, error: HeadtailError) -> None:
        if frame.frame_id in self._owed:
            result = failed(frame, error, self._s.clock())
            self._s.metrics.on_result(self._greeted().name, result, frame.payload_bytes)
            self._settle(frame, result)

    def _overdue(self, frame: ArrivedFrame, task: asyncio.Task[None]) -> None:
        log.error("session %s: frame %d was not answered in time and is given up", self.id, frame.frame_id)
        self._give_up(frame, OverloadedError("no answer came before this frame's deadline"))
        task.cancel()

    def _done(self, frame: ArrivedFrame, timer: asyncio.TimerHandle, task: asyncio.Task[None]) -> None:
        timer.cancel()
        self._tasks.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session %s: a frame's task failed", self.id, exc_info=error)
        self._give_up(frame, InternalError("the server failed on this frame; its log says why"))

    # ------------------------------------------------------------ frames that wait for layers

    def _new_assembler(self) -> Assembler:
        limits = self._s.limits
        return Assembler(max_frame_bytes=limits.max_frame_bytes, wait_ns=limits.layer_wait_ns)

    def _set_timer(self, now_ns: int) -> None:
        due_ns = self._assembler.due_ns(self._s.backend.load_now().tail_ns + MARGIN_NS)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_ns is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0, due_ns - now_ns) / 1e9, self._flush_assembler)

    def _flush_assembler(self) -> None:
        for frame in self._assembler.flush():
            self._begin(frame)

    # ------------------------------------------------------------ out

    def _send_result(self, result: Result) -> None:
        message = result.to_proto()
        self._sent["answered" if result.error is None else "refused"] += 1
        if not self._path.answers(message):
            self._send(pb.ServerMessage(result=message))
        load = self._s.backend.load_now()
        self._s.bandwidth.on_tail(load.queue_ns, load.tail_ns)
        grant = self._s.bandwidth.grant(self.id, self._s.clock())
        if grant is not None:
            self._s.metrics.on_grant()
            self._send(pb.ServerMessage(grant=grant.to_proto()))

    def _send(self, message: pb.ServerMessage) -> None:
        self._out.append(message)
        self._wake.set()
        if len(self._out) > 4 * self._s.limits.max_in_flight + 64:  # while a write waits, the reader must not go on asking
            self.end(LimitError(f"{len(self._out)} answers wait because the client does not read them"))

    async def _write(self) -> None:
        while True:
            while self._out:
                try:
                    async with asyncio.timeout(self._s.limits.write_s):
                        await self._context.write(self._out.popleft())
                except TimeoutError:
                    raise LimitError(f"the client has read nothing for {self._s.limits.write_s:g} s") from None
            if self._error is not None or (self._finishing and not self._owed):
                return
            if not self._out:
                self._wake.clear()
                await self._wake.wait()
