"""One frame to one result: decode, tail, timings. Shared by sessions and the unary call."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_server.access.fair import FairPool
from edge_server.adapting.seen import Seen
from edge_server.backends import Backend, TailWork
from edge_server.config import Limits
from edge_server.frames.assembly import ArrivedFrame
from edge_server.frames.decode import Decoded, decode_frame
from edge_server.frames.video import VideoSlots, VideoStream
from edge_server.models import Model
from edge_server.observe.metrics import Metrics
from edge_server.observe.tracing import NoTracing, Tracing
from protos.errors import HeadtailError, InternalError, OverloadedError, PayloadError
from protos.messages import PayloadKind, Result, ServerTimings
from splitters.codec import ReferenceStore

log = logging.getLogger(__name__)


@dataclass(slots=True)
class History:
    """What a session's frames may refer to, and whose turn it is to decode: a frame may refer to the one just before it.

    Attributes:
        references: decoded symbols.
        video: the H.264 stream; None: a call on its own, without any.
        turn: held while a frame is decoded.
        seen: keeps a sample of what was decoded; None: nothing is kept.
    """

    references: ReferenceStore = field(default_factory=ReferenceStore)
    video: VideoStream | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    seen: Seen | None = None

    def close(self) -> None:
        """No frame of the session will come any more."""
        if self.video is not None:
            self.video.close()
        if self.seen is not None:
            self.seen.end(id(self))


class Answerer:
    """Turns frames into results; never raises for a bad frame.

    Args:
        backend: where tails run.
        limits: of pending payloads and pictures.
        decode_threads: of the executor that decodes.
        clock: monotonic ns.
        metrics: counts.
        tracing: spans; None: none.
        seen: keeps a sample of what sessions send; None: nothing is kept.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        decode_threads: int,
        clock: Callable[[], int],
        metrics: Metrics,
        tracing: Tracing | None = None,
        seen: Seen | None = None,
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._tracing = tracing or NoTracing()
        self._seen = seen
        self.pool = FairPool(decode_threads, clock=clock)
        self.video_slots = VideoSlots(limits.max_video_streams, clock)
        self._pending_bytes = 0
        self._pending: Counter[str] = Counter()

    def history(self, *, after: History | None = None) -> History:
        """For a new session, or for one that says hello again and had another; to be closed at its end."""
        if after is not None:
            after.close()
        return History(video=VideoStream(self.video_slots), seen=self._seen)

    @property
    def pending_bytes(self) -> int:
        """Payloads that wait for their answers."""
        return self._pending_bytes

    @contextmanager
    def pending(self, client: str, size: int) -> Iterator[None]:
        """Counts bytes that wait for their answer.

        Raises:
            OverloadedError: too many wait: altogether, or of one client beside others.
        """
        most = self._limits.max_pending_bytes
        self._pending_bytes += size
        self._pending[client] += size
        try:
            own = self._pending[client]
            if self._pending_bytes > most or (own > most // 2 and len(self._pending) > 1):
                raise OverloadedError(f"{self._pending_bytes} payload bytes wait for their answers already, {own} of this client")
            yield
        finally:
            self._pending_bytes -= size
            self._pending[client] -= size
            self._pending += Counter()  # clients without any are forgotten

    async def answer(self, model: Model, frame: ArrivedFrame, history: History, client: str = "") -> Result:
        """The frame's result, an error included.

        A frame that comes too late, or that the tail refuses, is decoded all the same: the next one refers to it.

        Args:
            model: the session's.
            frame: as it arrived.
            history: the session's; the decoded symbols are added.
            client: whose frame it is.
        """
        size = frame.payload_bytes
        decoded = Decoded(arrays=())
        try:
            with self.pending(client, size):
                start_ns = self._clock()
                decoded = await self._decode_in_turn(model, frame, history, client)
                result = await self._answer(model, frame, decoded, start_ns, client)
        except HeadtailError as error:
            result = failed(frame, error, self._clock(), decoded)
        except Exception:
            log.exception("frame %d failed", frame.frame_id)
            ours = InternalError("the server failed on this frame; its log says why")
            result = failed(frame, ours, self._clock(), decoded)
        self._metrics.on_result(model.name, result, size)
        self._tracing.on_result(model.name, frame.traceparent, result)
        return result

    async def _decode_in_turn(self, model: Model, frame: ArrivedFrame, history: History, client: str) -> Decoded:
        if frame.error is not None:
            raise frame.error
        video = frame.kind is PayloadKind.VIDEO
        refers = video or (frame.kind is PayloadKind.LATENT and model.codec.supports_reference)
        if not refers and frame.deadline_ns is not None and self._clock() >= frame.deadline_ns:
            raise OverloadedError("the frame's deadline had passed before it was decoded")
        decode = functools.partial(self._decode, model, frame, history.references, late_too=refers)
        if not refers:
            return await self.pool.run(client, decode)
        async with history.turn:
            if video:
                return await self.pool.run(client, self._video(model, frame, history.video))
            decoded = await self.pool.run(client, decode)
            if decoded.symbols is not None:
                history.references.add(frame.frame_id, decoded.symbols)
                if history.seen is not None:
                    history.seen.add(id(history), model.sha256, frame.frame_id, decoded.symbols)
        return decoded

    def _video(self, model: Model, frame: ArrivedFrame, stream: VideoStream | None) -> Callable[[], Decoded]:
        """The work of decoding a video frame, once the session may have a decoder."""
        if stream is None:
            raise PayloadError("video is decoded where a session holds what its frames depend on: open a session")
        stream.admit()

        def decode() -> Decoded:
            size_px = model.bundle.manifest.preprocess.size_px
            return Decoded(
                arrays=(stream.decode(b"".join(frame.layers), frame.frame_id, size_px, self._limits.max_pixels),), layers=1
            )

        return decode

    async def _answer(self, model: Model, frame: ArrivedFrame, decoded: Decoded, start_ns: int, client: str) -> Result:
        decode_ns = self._clock() - start_ns
        if frame.deadline_ns is not None and self._clock() >= frame.deadline_ns:
            raise OverloadedError("the frame's deadline had passed before its tail could run")
        done = await self._backend.run(
            TailWork(
                bundle_sha256=model.sha256,
                kind=PayloadKind.LATENT if frame.kind is PayloadKind.LATENT else PayloadKind.IMAGE,  # to a tail, video is pictures
                arrays=decoded.arrays, size_px=frame.size_px,
                deadline_ns=frame.deadline_ns, client=client,
            )
        )  # fmt: skip
        return Result(
            frame_id=frame.frame_id, answer=done.answer, layers_decoded=decoded.layers, symbols_crc32=decoded.symbols_crc32,
            slices_held=decoded.held, echo_sent_ns=frame.echo_sent_ns,
            timings=ServerTimings(
                decode_ns=decode_ns, queue_ns=done.queue_ns, tail_ns=done.tail_ns, total_ns=self._clock() - frame.arrived_ns,
                batch_size=done.batch_size,
            ),
        )  # fmt: skip

    def _decode(self, model: Model, frame: ArrivedFrame, references: ReferenceStore, *, late_too: bool) -> Decoded:
        if not late_too and frame.deadline_ns is not None and self._clock() >= frame.deadline_ns:
            raise OverloadedError("the frame's deadline had passed before it was its turn to be decoded")
        return decode_frame(model, frame, references, max_pixels=self._limits.max_pixels)

    def close(self) -> None:
        """Ends the executor."""
        self.pool.close()


def failed(frame: ArrivedFrame, error: HeadtailError, now_ns: int, decoded: Decoded | None = None) -> Result:
    """An error as the frame's result; what was decoded of it all the same may be referred to."""
    return Result(
        frame_id=frame.frame_id, error=error, echo_sent_ns=frame.echo_sent_ns,
        layers_decoded=decoded.layers if decoded else 0, symbols_crc32=decoded.symbols_crc32 if decoded else 0,
        slices_held=decoded.held if decoded else 0,
        timings=ServerTimings(total_ns=max(0, now_ns - frame.arrived_ns) if frame.arrived_ns else 0),
    )  # fmt: skip
