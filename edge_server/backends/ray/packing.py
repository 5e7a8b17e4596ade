"""What travels between the ingress and a tail's replica: plain tuples, quick to pickle and independent of our classes.

A call is ``(bundle's hash, its directory, kind, arrays, size, remaining ns, client)``; a reply is `Reply`. A detection of a hundred
boxes as dataclasses takes a millisecond to pickle and load, as tuples a few dozen microseconds.
"""

from __future__ import annotations

from typing import Any

from edge_server.backends import TailAnswer, TailWork
from protos.errors import HeadtailError, from_code
from protos.messages import Answer, Box, Classification, ClassScore, Detection, PayloadKind, Tensors

# (error's (code, text, retryable) or None, the answer's kind, its rows, queue ns, tail ns, batch size)
Reply = tuple[tuple[str, str, bool] | None, str, tuple[Any, ...], int, int, int]
Call = tuple[str, str, int, tuple[Any, ...], tuple[int, int], int | None, str]

_CLASSES, _BOXES, _TENSORS = "classes", "boxes", "tensors"


def pack_call(work: TailWork, path: str, remaining_ns: int | None) -> Call:
    """A frame for a replica.

    Args:
        work: the frame; its deadline is on this process's clock and does not travel.
        path: the bundle's directory, which every node sees.
        remaining_ns: until its deadline; None: none.
    """
    return (work.bundle_sha256, path, work.kind.value, tuple(work.arrays), work.size_px, remaining_ns, work.client)


def unpack_call(call: Call, now_ns: int) -> TailWork:
    """The frame in the replica, its deadline on the replica's clock.

    Args:
        call: from `pack_call`.
        now_ns: the replica's clock.
    """
    sha256, _, kind, arrays, size_px, remaining_ns, client = call
    return TailWork(
        bundle_sha256=sha256, kind=PayloadKind(kind), arrays=arrays, size_px=size_px,
        deadline_ns=None if remaining_ns is None else now_ns + remaining_ns, client=client,
    )  # fmt: skip


def pack_answer(done: TailAnswer) -> Reply:
    """An answer for the ingress."""
    kind, rows = _rows(done.answer)
    return (None, kind, rows, done.queue_ns, done.tail_ns, done.batch_size)


def pack_error(error: HeadtailError) -> Reply:
    """A frame's error for the ingress."""
    return ((error.code, error.message, error.retryable), "", (), 0, 0, 0)


def unpack_reply(reply: Reply) -> TailAnswer:
    """The answer in the ingress.

    Raises:
        HeadtailError: the reply is an error.
    """
    error, kind, rows, queue_ns, tail_ns, batch_size = reply
    if error is not None:
        code, text, retryable = error
        raise from_code(code, text, retryable=retryable)
    answer: Answer
    if kind == _CLASSES:
        answer = Classification(top=tuple(ClassScore(class_id=c, score=s) for c, s in rows))
    elif kind == _TENSORS:
        task, *pairs = rows
        answer = Tensors(task=task, arrays=dict(pairs))
    else:
        answer = Detection(boxes=tuple(Box(class_id=c, score=s, box_px=box) for c, s, box in rows))
    return TailAnswer(answer=answer, queue_ns=queue_ns, tail_ns=tail_ns, batch_size=batch_size)


def _rows(answer: Answer) -> tuple[str, tuple[Any, ...]]:
    if isinstance(answer, Classification):
        return _CLASSES, tuple((c.class_id, c.score) for c in answer.top)
    if isinstance(answer, Tensors):
        return _TENSORS, (answer.task, *answer.arrays.items())
    return _BOXES, tuple((b.class_id, b.score, b.box_px) for b in answer.boxes)
