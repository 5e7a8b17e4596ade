"""Whatever becomes of the task that answers a frame, the client is told once, and in time."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from edge_server.backends import Load
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.config import Limits
from edge_server.doors import session as module
from edge_server.doors.answering import History
from edge_server.doors.session import Services, Session
from edge_server.frames.assembly import ArrivedFrame
from edge_server.observe.metrics import NoMetrics
from protos.errors import OverloadedError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, Classification, FrameLayer, Result

SHA = "a" * 64
MODEL = SimpleNamespace(name="tiny", sha256=SHA, bundle=SimpleNamespace(points=()))


class FakeContext:
    """The client's end."""

    def __init__(self) -> None:
        self.to_server: asyncio.Queue[Any] = asyncio.Queue()
        self.results: asyncio.Queue[Result] = asyncio.Queue()

    def peer(self) -> str:
        return "ipv4:192.0.2.1:5"

    async def read(self) -> Any:
        return await self.to_server.get()

    async def write(self, message: pb.ServerMessage) -> None:
        if message.WhichOneof("content") == "result":
            self.results.put_nowait(Result.from_proto(message.result))

    def frame(self, frame_id: int, left_ms: int) -> None:
        layer = FrameLayer(
            frame_id=frame_id, payload=b"x", deadline_remaining_ns=left_ms * 1_000_000, source_width_px=1, source_height_px=1
        )
        self.to_server.put_nowait(pb.ClientMessage(layer=layer.to_proto()))


Answer = Callable[[ArrivedFrame], Awaitable[Result]]


@contextlib.asynccontextmanager
async def opened(answer: Answer) -> Any:
    async def answers(_model: object, frame: ArrivedFrame, _references: object, client: str) -> Result:
        assert client == "ipv4:192.0.2.1"
        return await answer(frame)

    store: Any = SimpleNamespace(get=lambda _name: MODEL)
    backend: Any = SimpleNamespace(load_now=lambda: Load(waiting=0, queue_ns=0, tail_ns=0))
    answerer: Any = SimpleNamespace(answer=answers, history=lambda after=None: History())
    services = Services(
        store=store, backend=backend, answerer=answerer, bandwidth=BandwidthManager(), limits=Limits(), metrics=NoMetrics(),
        clock=time.monotonic_ns, version="test",
    )  # fmt: skip
    context = FakeContext()
    context.to_server.put_nowait(pb.ClientMessage(hello=pb.Hello(protocol_version=PROTOCOL_VERSION, bundle_sha256=SHA)))
    task = asyncio.create_task(Session(services, context).run())  # type: ignore[arg-type]
    yield context
    context.to_server.put_nowait(pb.ClientMessage(goodbye=pb.Goodbye()))
    await asyncio.wait_for(task, 5)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_NS", 10_000_000)
    monkeypatch.setattr(module, "_LEAVE_S", 0.1)


async def soon(context: FakeContext) -> Result:
    return await asyncio.wait_for(context.results.get(), 2)


def answered(frame: ArrivedFrame) -> Result:
    return Result(frame_id=frame.frame_id, answer=Classification(top=()))


async def test_a_task_that_hangs_is_given_up_at_the_deadline() -> None:
    async def hangs(frame: ArrivedFrame) -> Result:
        await asyncio.Event().wait()
        return answered(frame)

    async with opened(hangs) as context:
        context.frame(7, left_ms=20)
        result = await soon(context)
    assert result.frame_id == 7
    assert isinstance(result.error, OverloadedError)


async def test_one_that_heeds_no_cancellation_answers_too_late_and_once() -> None:
    release = asyncio.Event()

    async def stubborn(frame: ArrivedFrame) -> Result:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        return answered(frame)

    async with opened(stubborn) as context:
        context.frame(1, left_ms=20)
        assert isinstance((await soon(context)).error, OverloadedError)
        release.set()
        context.frame(2, left_ms=20)
        assert (await soon(context)).frame_id == 2  # and nothing more of frame 1
    assert context.results.empty()


@pytest.mark.parametrize("end", [asyncio.CancelledError, RuntimeError])
async def test_a_task_that_ends_without_a_result_is_an_error_to_the_client(end: type[BaseException]) -> None:
    """Whoever cancels it: Ray's client does that to calls of its own."""

    async def ends(frame: ArrivedFrame) -> Result:
        if frame.frame_id == 1:
            raise end
        return answered(frame)

    async with opened(ends) as context:
        context.frame(1, left_ms=5000)
        first = await soon(context)
        assert first.error is not None
        assert first.error.message.startswith("the peer failed: ")
        context.frame(2, left_ms=5000)
        assert (await soon(context)).error is None


async def test_a_stream_ends_although_a_task_does_not() -> None:
    enough, ended = asyncio.Event(), asyncio.Event()

    async def never(frame: ArrivedFrame) -> Result:
        while not enough.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await enough.wait()
        ended.set()
        return answered(frame)

    async with opened(never) as context:
        context.frame(1, left_ms=20)
        await soon(context)
    assert not ended.is_set()  # the stream is over, and the task is not
    enough.set()
    await ended.wait()


async def test_a_frame_that_is_late_when_it_comes_is_left_to_the_answerer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Network queues ate its time: that is everyday, not a task that hangs."""
    monkeypatch.setattr(BandwidthManager, "queue_ns", lambda *_: 1_000_000_000)

    async def refuses(frame: ArrivedFrame) -> Result:
        for _ in range(3):
            await asyncio.sleep(0)
        return Result(frame_id=frame.frame_id, error=OverloadedError("refused in so many words"))

    async with opened(refuses) as context:
        context.frame(1, left_ms=20)
        result = await soon(context)
    assert result.error is not None
    assert result.error.message == "refused in so many words"
    assert not caplog.records
