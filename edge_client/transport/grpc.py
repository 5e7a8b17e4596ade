"""The stream to the server: hello and welcome, frames out, results in, pings, and coming back after every failure.

The only part of the client that touches the network while frames flow. It decides nothing about frames: what happens
is told to ``SessionEvents`` on the event loop, and what is in flight belongs to the pipeline.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import grpc.aio

from edge_client.frames import NS_PER_S, Clock
from edge_client.transport.base import Gate, SessionEvents, Welcome
from edge_client.transport.choice import LaneChoice
from edge_client.transport.rpc import Endpoint, open_channel, stub, translated
from protos.errors import HeadtailError, ProtocolError, UnreachableError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, FrameLayer, Grant, Result, bundle_hash

if TYPE_CHECKING:
    from edge_client.transport.lane import Lane
    from edge_client.transport.rpc import Call

log = logging.getLogger(__name__)

_LEAVE_S = 1.0  # for the server to close the stream, once there is no more to say
_NO_MESSAGE = "the server sent bytes that are no message"  # for which gRPC gives None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """How patient the session is.

    Attributes:
        welcome_timeout_s: from dialling to the welcome; every third attempt waits four times as long, for slow links.
        silence_s: a server that leaves a ping unanswered for so long counts as hung.
        ping_s: a ping is sent at the latest after so much silence.
        backoff_s: (first, longest) wait between attempts; each is drawn from half to the whole of it.
    """

    welcome_timeout_s: float = 2.5
    silence_s: float = 4.0
    ping_s: float = 1.0
    backoff_s: tuple[float, float] = (0.15, 1.0)


@dataclass(slots=True)
class _Outgoing:
    layers: list[FrameLayer]
    deadline_ns: int | None
    gate: Gate | None


class GrpcLink:
    """One server, reconnected for as long as it takes."""

    def __init__(
        self,
        endpoint: Endpoint,
        events: SessionEvents,
        *,
        clock: Clock,
        config: SessionConfig | None = None,
        seed: int | None = None,
        datagrams: Literal["never", "lossy", "always"] = "never",
    ) -> None:
        self.up = False
        self.attempts = 0
        self.reconnects = 0
        self.error: HeadtailError | None = None
        self.welcomed = asyncio.Event()
        self.failed = asyncio.Event()
        self._endpoint = endpoint
        self._events = events
        self._clock = clock
        self._config = config or SessionConfig()
        self._random = random.Random(seed)  # noqa: S311 - jitter, no secret
        self._least_rtt_ns: int | None = None  # of this stream, the server's own time not counted
        self._queue: deque[_Outgoing | pb.ClientMessage] = deque()
        self._wake = asyncio.Event()
        self._next_id = 0
        self._closing = False
        self._again = False
        self._heard_ns = self._began_ns = 0
        self._unanswered_ns: int | None = None
        self._lane = self._open_lane() if datagrams != "never" else None
        self._beside = False
        self._lost: tuple[float, float] | None = None
        self._choice = LaneChoice(always=datagrams == "always")
        if self._lane is not None:
            self._lane.idle = datagrams == "lossy"

    def _open_lane(self) -> Lane:
        from edge_client.transport.lane import Lane

        host, _, port = self._endpoint.address.rpartition(":")
        return Lane((host.strip("[]"), int(port)), self._events, self._on_other_result, clock=self._clock)

    # ------------------------------------------------------------------ for the pipeline

    def send(self, layers: list[FrameLayer], *, deadline_ns: int | None, gate: Gate | None = None) -> int:
        """Queues a frame's layers, base first, and returns the id the answer will carry.

        Args:
            layers: whose ``frame_id`` and times are filled in here.
            deadline_ns: on our clock; a frame later than that is not sent.
            gate: asked before each layer; a refused one ends the frame.
        """
        frame_id = self._next_id
        self._next_id += 1
        layers = [replace(layer, frame_id=frame_id) for layer in layers]
        if self._lane is not None and deadline_ns is not None and self._goes_beside(self._lane, layers, deadline_ns):
            # After the caller knows the id: what becomes of the frame is told by it.
            asyncio.get_running_loop().call_soon(self._send_beside, layers, deadline_ns, gate)
        else:
            self._queue.append(_Outgoing(layers, deadline_ns, gate))
            self._wake.set()
        return frame_id

    def _goes_beside(self, lane: Lane, layers: list[FrameLayer], deadline_ns: int) -> bool:
        now_ns = self._clock()
        beside = lane.open_now and self._choice.beside(lane.loss, lane.counted, now_ns)
        lost = lane.lost if beside else None
        if (beside, lost) != (self._beside, self._lost):
            self._beside, self._lost = beside, lost
            lane.idle = lane.open_now and not beside
            self._events.on_reliable(not beside, lost)
        return beside and lane.takes(layers, deadline_ns)

    def _send_beside(self, layers: list[FrameLayer], deadline_ns: int, gate: Gate | None) -> None:
        if self._lane is not None and self._lane.open_now:
            self._lane.send(layers, deadline_ns, gate)
        else:
            self._queue.append(_Outgoing(layers, deadline_ns, gate))
            self._wake.set()

    def restart(self) -> None:
        """Says goodbye and hello again: with another bundle."""
        self._again = True
        self._say(pb.ClientMessage(goodbye=pb.Goodbye()))

    def close(self) -> None:
        """Says goodbye; ``run`` returns when the server has closed the stream, or after a second."""
        self._closing = True
        self._say(pb.ClientMessage(goodbye=pb.Goodbye()))

    def _say(self, message: pb.ClientMessage) -> None:
        self._queue.append(message)
        self._wake.set()

    # ------------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Connects, and connects again, until ``close``.

        Raises:
            HeadtailError: before the first welcome, a failure that another attempt cannot mend.
        """
        wait_s, longest_s = self._config.backoff_s
        told = ""
        while not self._closing:
            self._again = False
            self.attempts += 1
            try:
                await self._one_stream()
                error: HeadtailError = UnreachableError(f"the server at {self._endpoint.address} closed the stream")
            except HeadtailError as failure:
                error = failure
            was_up, self.up = self.up, False
            self._queue.clear()
            if was_up:
                # A server that breaks the protocol in every session is not dialled several times a second.
                wait_s = wait_s if isinstance(error, ProtocolError) else self._config.backoff_s[0]
                self._events.on_down(error)
            if self._closing:
                return
            self.error = error
            self.failed.set()
            if self._again:
                continue
            if not error.retryable and not self.welcomed.is_set():
                raise error
            # The same failure again and again is no news; another one is: a server that is back and wants a token.
            log.log(logging.DEBUG if was_up or error.code == told else logging.WARNING, "no session: %s", error.message)
            told = error.code
            await asyncio.sleep(wait_s * self._random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 1.7, longest_s)

    async def _one_stream(self) -> None:
        patience_s = self._config.welcome_timeout_s * (4 if self.attempts % 3 == 0 else 1)
        with translated(self._endpoint):
            async with open_channel(self._endpoint) as channel:
                call = stub(channel).Session(metadata=self._endpoint.metadata)
                try:
                    async with asyncio.timeout(patience_s):
                        hello = self._events.hello()
                        hello.datagrams = self._lane is not None
                        await call.write(pb.ClientMessage(hello=hello))
                        welcome = self._check_welcome(await call.read())
                except TimeoutError:
                    raise UnreachableError(
                        f"what listens at {self._endpoint.address} did not answer as a headtail server within {patience_s:g} s"
                    ) from None
                except asyncio.InvalidStateError as error:  # the call ended while we wrote
                    raise UnreachableError(f"the stream to {self._endpoint.address} ended") from error
                self._stand(welcome)
                try:
                    await self._converse(call)
                finally:
                    if self._lane is not None:
                        self._lane.close()

    def _check_welcome(self, message: object) -> Welcome:
        if message is None:
            raise ProtocolError(_NO_MESSAGE)
        if not isinstance(message, pb.ServerMessage):
            raise ProtocolError(f"the server at {self._endpoint.address} closed the stream without a welcome", retryable=True)
        if message.WhichOneof("content") != "welcome":
            raise ProtocolError(f"the server at {self._endpoint.address} did not begin with a welcome")
        w = message.welcome
        if w.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the server at {self._endpoint.address} speaks protocol version {w.protocol_version}, "
                f"this client {PROTOCOL_VERSION}; update the older of the two"
            )
        return Welcome(
            session_id=w.session_id, model=w.model, bundle_sha256=bundle_hash(w.bundle_sha256), max_in_flight=w.max_in_flight,
            max_payload_bytes=w.max_payload_bytes, datagrams=w.datagrams if w.HasField("datagrams") else None,
            takes_video=pb.PAYLOAD_KIND_VIDEO in w.payload_kinds,
        )  # fmt: skip

    def _stand(self, welcome: Welcome) -> None:
        self._queue.clear()
        self._next_id = 0
        self.up = True
        self.reconnects += self.welcomed.is_set()
        self.welcomed.set()
        self._heard_ns = self._began_ns = self._clock()
        self._unanswered_ns = None
        self._least_rtt_ns = None
        self.error = None
        self._beside, self._lost = False, None
        self._events.on_reliable(True)
        self._events.on_up(welcome)
        if self._lane is not None and welcome.datagrams is not None:
            self._lane.open(welcome.datagrams)

    async def _converse(self, call: Call) -> None:
        tasks = [asyncio.create_task(f(call)) for f in (self._write, self._read, self._watch)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: Call) -> None:
        while isinstance(message := await call.read(), pb.ServerMessage):
            now_ns = self._heard_ns = self._clock()
            self._unanswered_ns = None
            match message.WhichOneof("content"):
                case "result":
                    self._on_result(message.result, now_ns)
                case "grant":
                    self._events.on_grant(Grant.from_proto(message.grant), now_ns)
                case "pong":
                    rtt_ns = now_ns - message.pong.echo_sent_ns
                    if not 0 <= rtt_ns <= now_ns - self._began_ns:
                        raise ProtocolError("the server answers a ping that was never sent")
                    self._note_round_trip(rtt_ns)
                    self._events.on_pong(rtt_ns, now_ns)
                case "bundle_changed":
                    self._events.on_bundle_changed(bundle_hash(message.bundle_changed.bundle_sha256))
                case "draining":
                    self._events.on_draining(message.draining.grace_ns)
                case other:
                    raise ProtocolError(f"the server sent {other or 'an empty message'} in the middle of a session")
        if message is None:
            raise ProtocolError(_NO_MESSAGE)
        if await call.code() is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details(), None
            )

    def _on_result(self, message: pb.Result, now_ns: int) -> None:
        result = Result.from_proto(message)
        if result.echo_sent_ns and not self._began_ns <= result.echo_sent_ns <= now_ns:
            failure = ProtocolError("an answer echoes a time at which this session sent nothing")
            result = Result(frame_id=result.frame_id, error=failure)
        if result.echo_sent_ns:
            self._note_round_trip(now_ns - result.echo_sent_ns - result.timings.total_ns)
        self._events.on_result(result, now_ns)

    def _on_other_result(self, message: pb.Result) -> None:
        """An answer that came beside the stream: the server is there, however silent the stream."""
        self._on_result(message, self._clock())

    async def _write(self, call: Call) -> None:
        with suppress(asyncio.InvalidStateError):  # the call is over, of which the reader is told the reason
            await self._write_until_goodbye(call)
        await asyncio.sleep(_LEAVE_S)

    async def _write_until_goodbye(self, call: Call) -> None:
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            item = self._queue.popleft()
            if isinstance(item, _Outgoing):
                await self._write_frame(call, item)
                continue
            await call.write(item)
            if item.WhichOneof("content") == "goodbye":
                await call.done_writing()
                return

    async def _write_frame(self, call: Call, item: _Outgoing) -> None:
        for layer in item.layers:
            now_ns = self._clock()
            left_ns = item.deadline_ns - now_ns if item.deadline_ns is not None else 0
            late = item.deadline_ns is not None and left_ns <= 0
            if late or (item.gate is not None and not item.gate(layer.layer, len(layer.payload))):
                if layer.layer == 0:
                    self._events.on_unsent(layer.frame_id)
                return
            # Told before the write: once gRPC has the bytes, the answer may be faster than this task.
            self._events.on_sent(layer.frame_id, layer.layer, len(layer.payload), now_ns)
            # The server has what the way there and back leaves of it; 0 would mean that there is no deadline.
            there_ns = max(1, left_ns - (self._least_rtt_ns or 0)) if item.deadline_ns is not None else 0
            await call.write(pb.ClientMessage(layer=replace(layer, sent_ns=now_ns, deadline_remaining_ns=there_ns).to_proto()))

    def _note_round_trip(self, rtt_ns: int) -> None:
        if rtt_ns > 0 and (self._least_rtt_ns is None or rtt_ns < self._least_rtt_ns):
            self._least_rtt_ns = rtt_ns
            if self._lane is not None:
                self._lane.least_rtt_ns = rtt_ns

    async def _watch(self, call: Call) -> None:
        del call
        while True:
            await asyncio.sleep(0.1)
            now_ns = self._clock()
            if self._lane is not None and self._lane.heard_within(self._config.ping_s):
                self._heard_ns, self._unanswered_ns = now_ns, None  # the server is there; a stream that stalls does not end it
            quiet = self._unanswered_ns is None and now_ns - self._heard_ns >= self._config.ping_s * NS_PER_S
            if self._events.ping_due(now_ns) or quiet:
                self._unanswered_ns = self._unanswered_ns or now_ns
                self._say(pb.ClientMessage(ping=pb.Ping(sent_ns=now_ns)))
            if self._unanswered_ns is not None and now_ns - self._unanswered_ns >= self._config.silence_s * NS_PER_S:
                raise UnreachableError(f"the server at {self._endpoint.address} has been silent for {self._config.silence_s:g} s")
