"""Offloaded H.264 at the server: exactly the pictures that were coded, in order, or a plain error; and a bound on decoders."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_server.config import Limits
from edge_server.doors.answering import Answerer, History
from edge_server.frames.assembly import ArrivedFrame
from edge_server.frames.video import VideoSlots, VideoStream
from edge_server.observe.metrics import NoMetrics
from protos.errors import LimitError, OverloadedError, PayloadError
from protos.messages import Classification, ClassScore, PayloadKind
from splitters.runtime.h264 import SOFTWARE, H264Decoder, H264Encoder, Picture, padded_pixels
from splitters.runtime.h264_stream import VideoPayload

INPUT = (48, 64)  # (height, width)
SPEC = SimpleNamespace(manifest=SimpleNamespace(preprocess=SimpleNamespace(size_px=INPUT)))
MODEL: Any = SimpleNamespace(codec=SimpleNamespace(supports_reference=True), name="m", sha256="0" * 64, bundle=SPEC)
ANSWER = Classification(top=(ClassScore(class_id=1, score=0.5),))


class Tail:
    """A backend that answers, or refuses every frame whose turn is named."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.seen: list[np.ndarray] = []

    async def run(self, work: Any) -> Any:
        assert work.kind is PayloadKind.IMAGE
        self.seen.append(work.arrays[0])
        if len(self.seen) in self.refused:
            raise OverloadedError("the tail is busy")
        return SimpleNamespace(answer=ANSWER, queue_ns=0, tail_ns=1, batch_size=1)


def sent(count: int, keys: tuple[int, ...] = (0,), size: tuple[int, int] = (64, 48)) -> tuple[list[bytes], list[Picture]]:
    """Payloads of a clip, and the pictures that a decoder of the whole stream sees."""
    encoder, decoder, rng = H264Encoder(SOFTWARE, size), H264Decoder(padded_pixels(INPUT)), np.random.default_rng(0)
    scene = rng.integers(0, 255, (size[1], size[0] + 4 * count, 3)).astype(np.uint8)
    payloads, seen = [], []
    for n in range(count):
        units, key = encoder.encode(scene[:, 4 * n : 4 * n + size[0]], 34, key=n in keys)
        assert key == (n in keys)
        payloads.append(VideoPayload(units=units, reference=None if key else n - 1).to_bytes())
        seen.append(decoder.decode(units))
    return payloads, seen


def frame(number: int, payload: bytes, *, deadline_ns: int | None = None) -> ArrivedFrame:
    return ArrivedFrame(
        frame_id=number, kind=PayloadKind.VIDEO, layers=(payload,), size_px=(64, 48), deadline_ns=deadline_ns, arrived_ns=1
    )


def answerer(tail: Tail, **limits: int) -> Answerer:
    return Answerer(tail, Limits(**limits), decode_threads=4, clock=lambda: 1000, metrics=NoMetrics())  # type: ignore[arg-type]


async def test_frames_that_arrive_together_are_decoded_in_turn_and_exactly() -> None:
    payloads, pictures = sent(12)
    tail = Tail()
    answers = answerer(tail)
    history = answers.history()
    results = await asyncio.gather(*(answers.answer(MODEL, frame(n, p), history) for n, p in enumerate(payloads)))
    assert [r.error for r in results] == [None] * 12
    assert [r.layers_decoded for r in results] == [1] * 12
    assert all(any(np.array_equal(p, s) for s in tail.seen) for p in pictures)
    history.close()
    answers.close()


async def test_frames_that_are_late_or_refused_by_the_tail_are_decoded_for_the_next() -> None:
    payloads, pictures = sent(6)
    tail = Tail(2)
    answers = answerer(tail)
    history = answers.history()
    for number, payload in enumerate(payloads):
        late = number in (2, 3)
        result = await answers.answer(MODEL, frame(number, payload, deadline_ns=500 if late else None), history)
        assert isinstance(result.error, OverloadedError) == (late or number == 1)
        assert result.layers_decoded == 1
    assert np.array_equal(tail.seen[-1], pictures[-1])
    answers.close()


async def test_after_a_frame_that_never_came_nothing_is_guessed_until_the_next_key_frame() -> None:
    payloads, pictures = sent(8, keys=(0, 5))
    tail = Tail()
    answers = answerer(tail)
    history = answers.history()
    for number, payload in enumerate(payloads):
        if number == 2:  # lost, or refused at the door
            continue
        result = await answers.answer(MODEL, frame(number, payload), history)
        if number in (3, 4):
            assert isinstance(result.error, PayloadError)
            assert "send a key frame" in result.error.message
            assert result.layers_decoded == 0
        else:
            assert result.error is None
            assert np.array_equal(tail.seen[-1], pictures[number])
    answers.close()


async def test_a_damaged_frame_ends_the_stream_and_a_key_frame_begins_it_again() -> None:
    payloads, pictures = sent(5, keys=(0, 3))
    broken = bytearray(payloads[1])
    broken[12:] = bytes(len(broken) - 12)
    tail = Tail()
    answers = answerer(tail)
    history = answers.history()
    outcomes = []
    for number, payload in enumerate([payloads[0], bytes(broken), *payloads[2:]]):
        outcomes.append((await answers.answer(MODEL, frame(number, payload), history)).error)
    assert [isinstance(e, PayloadError) for e in outcomes] == [False, True, True, False, False]
    assert np.array_equal(tail.seen[-1], pictures[-1])
    answers.close()


async def test_a_reduced_picture_is_enlarged_and_one_of_another_shape_refused() -> None:
    tail = Tail()
    answers = answerer(tail)
    history = answers.history()
    assert (await answers.answer(MODEL, frame(0, sent(1, size=(32, 24))[0][0]), history)).error is None
    assert tail.seen[0].shape == (*INPUT, 3)
    for number, size in enumerate([(64, 32), (16, 12), (48, 48)], 1):
        error = (await answers.answer(MODEL, frame(number, sent(1, size=size)[0][0]), history)).error
        assert isinstance(error, PayloadError) == (size != (16, 12)), size  # a quarter is still taken
    large = H264Encoder(SOFTWARE, (640, 480)).encode(np.zeros((480, 640, 3), np.uint8), 30)[0]
    error = (await answers.answer(MODEL, frame(9, VideoPayload(units=large).to_bytes()), history)).error
    assert isinstance(error, PayloadError)
    assert "too large" in error.message
    answers.close()


async def test_video_needs_a_session() -> None:
    answers = answerer(Tail())
    error = (await answers.answer(MODEL, frame(0, sent(1)[0][0]), History())).error
    assert isinstance(error, PayloadError)
    assert "open a session" in error.message
    answers.close()


async def test_no_more_decoders_than_allowed_and_a_sessions_end_frees_its_own() -> None:
    payload = sent(1)[0][0]
    answers = answerer(Tail(), max_video_streams=2)
    first, second, third = (answers.history() for _ in range(3))
    for history in (first, second):
        assert (await answers.answer(MODEL, frame(0, payload), history)).error is None
    assert isinstance((await answers.answer(MODEL, frame(0, payload), third)).error, LimitError)
    assert len(answers.video_slots) == 2
    first.close()
    assert (await answers.answer(MODEL, frame(1, payload), third)).error is None
    assert isinstance((await answers.answer(MODEL, frame(1, payload), first)).error, PayloadError), "its session is over"
    for history in (second, third):
        history.close()
    assert len(answers.video_slots) == 0
    answers.close()


def test_a_decoder_long_unused_makes_room_for_another_session() -> None:
    now = [0]
    slots = VideoSlots(1, lambda: now[0])
    idle, busy = VideoStream(slots), VideoStream(slots)
    payloads, _ = sent(2)
    idle.admit()
    idle.decode(payloads[0], 0, INPUT, 1 << 20)
    with pytest.raises(LimitError, match="1 sessions send video"):
        busy.admit()
    now[0] = 11_000_000_000
    busy.admit()
    with pytest.raises(PayloadError, match="not held"):
        idle.decode(payloads[1], 1, INPUT, 1 << 20)


def test_a_server_may_take_no_video_at_all() -> None:
    slots = VideoSlots(0, lambda: 0)
    with pytest.raises(LimitError, match="0 sessions"):
        VideoStream(slots).admit()
