"""What travels between the ingress and a replica comes out as it went in."""

import pickle

import numpy as np
import pytest

from edge_server.backends import TailAnswer, TailWork
from edge_server.backends.ray.packing import pack_answer, pack_call, pack_error, unpack_call, unpack_reply
from protos.errors import OverloadedError, UnknownModelError
from protos.messages import Answer, Box, Classification, ClassScore, Detection, PayloadKind, Tensors


@pytest.mark.parametrize("kind", list(PayloadKind))
def test_a_call_carries_the_time_left_not_the_deadline(kind: PayloadKind) -> None:
    arrays = (np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.zeros((4,), np.uint8))
    work = TailWork(bundle_sha256="ab" * 32, kind=kind, arrays=arrays, size_px=(640, 480), deadline_ns=10**15)
    there = unpack_call(pickle.loads(pickle.dumps(pack_call(work, "/bundles/a", 70))), now_ns=5000)
    assert (there.bundle_sha256, there.kind, there.size_px, there.deadline_ns) == (work.bundle_sha256, kind, (640, 480), 5070)
    for sent, come in zip(arrays, there.arrays, strict=True):
        assert come.dtype == sent.dtype
        np.testing.assert_array_equal(come, sent)
    assert unpack_call(pack_call(work, "/bundles/a", None), now_ns=5000).deadline_ns is None


@pytest.mark.parametrize(
    "answer",
    [
        Classification(top=(ClassScore(class_id=3, score=0.5), ClassScore(class_id=1, score=0.25))),
        Classification(top=()),
        Detection(boxes=(Box(class_id=7, score=0.9, box_px=(1.0, 2.0, 3.5, 4.5)),)),
        Detection(boxes=()),
        Tensors(task="depth", arrays={"a": np.zeros((2, 3), np.float32), "b": np.array([True])}),
    ],
)
def test_answers_come_back_equal(answer: Answer) -> None:
    done = TailAnswer(answer=answer, queue_ns=5, tail_ns=6, batch_size=7)
    assert unpack_reply(pickle.loads(pickle.dumps(pack_answer(done)))) == done


@pytest.mark.parametrize("error", [OverloadedError("full"), UnknownModelError("none such", retryable=True)])
def test_errors_are_raised_as_what_they_were(error: UnknownModelError) -> None:
    with pytest.raises(type(error), match=error.message) as caught:
        unpack_reply(pack_error(error))
    assert caught.value.retryable == error.retryable
