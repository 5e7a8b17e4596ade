"""A frame may refer to the one just before it: frames are decoded in turn, and also when they are refused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_server.config import Limits
from edge_server.doors.answering import Answerer, History
from edge_server.frames.assembly import ArrivedFrame
from edge_server.observe.metrics import NoMetrics
from protos.errors import OverloadedError, PayloadError
from protos.messages import Classification, ClassScore, PayloadKind
from tests.golden.make_predicted import make_codec, scene

CODEC = make_codec()
BUNDLE = SimpleNamespace(points=[SimpleNamespace(id=1, codec_point="fine")])
MODEL: Any = SimpleNamespace(codec=CODEC, name="m", sha256="0" * 64, bundle=BUNDLE)
ANSWER = Classification(top=(ClassScore(class_id=1, score=0.5),))


class Tail:
    """A backend that answers, or refuses every frame named."""

    def __init__(self, *refused: float) -> None:
        self.refused = refused
        self.seen: list[np.ndarray] = []

    async def run(self, work: Any) -> Any:
        self.seen.append(work.arrays[0])
        if len(self.seen) in self.refused:
            raise OverloadedError("the tail is busy")
        return SimpleNamespace(answer=ANSWER, queue_ns=0, tail_ns=1, batch_size=1)


def chain(count: int) -> list[tuple[tuple[bytes, ...], Any]]:
    """Payloads and symbols of a clip, each frame predicted from the one before."""
    out: list[tuple[tuple[bytes, ...], Any]] = []
    for number, latent in enumerate(scene(np.random.default_rng(3), count)):
        coded = CODEC.compress([latent], "fine", out[-1][1] if out else None, number - 1 if out else None)
        out.append((coded.payloads, coded.symbols))
    return out


def frame(number: int, layers: tuple[bytes, ...], *, deadline_ns: int | None = None) -> ArrivedFrame:
    return ArrivedFrame(
        frame_id=number, kind=PayloadKind.LATENT, layers=layers, size_px=(64, 48), deadline_ns=deadline_ns, arrived_ns=1,
        echo_sent_ns=0, operating_point=1,
    )  # fmt: skip


def answerer(tail: Tail, now_ns: int = 1000) -> Answerer:
    return Answerer(tail, Limits(), decode_threads=4, clock=lambda: now_ns, metrics=NoMetrics())  # type: ignore[arg-type]


async def test_frames_that_arrive_together_are_decoded_in_turn() -> None:
    sent, tail = chain(12), Tail()
    answers, history = answerer(tail), History()
    results = await asyncio.gather(*(answers.answer(MODEL, frame(n, p), history) for n, (p, _) in enumerate(sent)))
    assert [r.error for r in results] == [None] * 12
    assert [r.symbols_crc32 for r in results] == [s.crc32() for _, s in sent]
    answers.close()


async def test_a_frame_that_comes_too_late_is_decoded_for_the_next() -> None:
    sent, tail = chain(4), Tail()
    answers, history = answerer(tail), History()
    for number, (payloads, symbols) in enumerate(sent):
        late = number in (1, 2)
        result = await answers.answer(MODEL, frame(number, payloads, deadline_ns=500 if late else None), history)
        assert isinstance(result.error, OverloadedError) == late
        assert (result.layers_decoded, result.symbols_crc32) == (symbols.layers, symbols.crc32())
    assert len(tail.seen) == 2
    answers.close()


async def test_a_frame_that_the_tail_refuses_may_be_referred_to() -> None:
    sent, tail = chain(3), Tail(2)
    answers, history = answerer(tail), History()
    results = [await answers.answer(MODEL, frame(n, p), history) for n, (p, _) in enumerate(sent)]
    assert isinstance(results[1].error, OverloadedError)
    assert results[1].symbols_crc32 == sent[1][1].crc32()
    assert results[2].error is None
    answers.close()


@pytest.mark.parametrize("missing", [0, 1])
async def test_a_frame_whose_reference_never_came_asks_for_a_key_frame(missing: int) -> None:
    sent = chain(3)
    answers, history = answerer(Tail()), History()
    for number, (payloads, _) in enumerate(sent[:2]):
        if number != missing:
            await answers.answer(MODEL, frame(number, payloads), history)
    result = await answers.answer(MODEL, frame(2, sent[2][0]), history)
    assert isinstance(result.error, PayloadError)
    assert "send a key frame" in result.error.message
    assert result.layers_decoded == 0
    answers.close()
