import pytest

from edge_server.frames.assembly import Assembler
from protos.errors import LimitError, PayloadError, ProtocolError
from protos.messages import FrameLayer

MS = 1_000_000


def layer(frame_id: int, index: int = 0, count: int = 1, *, payload: bytes = b"x", deadline_ns: int = 0) -> FrameLayer:
    return FrameLayer(
        frame_id=frame_id, layer=index, layer_count=count, payload=payload, deadline_remaining_ns=deadline_ns, source_width_px=4,
        source_height_px=3, sent_ns=frame_id * 100 + index,
    )  # fmt: skip


def assembler() -> Assembler:
    return Assembler(max_frame_bytes=100, wait_ns=50 * MS)


def test_one_layer_is_a_frame() -> None:
    (frame,) = assembler().add(layer(0, deadline_ns=5), 10)
    assert (frame.frame_id, frame.layers, frame.deadline_ns, frame.size_px) == (0, (b"x",), 15, (4, 3))


def test_layers_make_a_frame_when_the_last_one_is_there() -> None:
    a = assembler()
    assert a.add(layer(3, 0, 3, payload=b"a"), 1) == []
    assert a.add(layer(3, 1, 3, payload=b"b"), 2) == []
    (frame,) = a.add(layer(3, 2, 3, payload=b"c"), 3)
    assert frame.layers == (b"a", b"b", b"c")
    assert (frame.begun_ns, frame.arrived_ns, frame.echo_sent_ns) == (1, 3, 302)
    assert a.flush() == []


def test_the_next_frame_ends_the_one_before() -> None:
    a = assembler()
    a.add(layer(0, 0, 3, payload=b"a"), 1)
    a.add(layer(0, 1, 3, payload=b"b"), 2)
    first, second = a.add(layer(1), 3)
    assert (first.frame_id, first.layers) == (0, (b"a", b"b"))
    assert second.frame_id == 1
    assert a.add(layer(0, 2, 3), 4) == []  # too late, and no harm


def test_a_gap_ends_the_prefix() -> None:
    a = assembler()
    a.add(layer(0, 0, 4, payload=b"a"), 1)
    (frame,) = a.add(layer(0, 2, 4, payload=b"c"), 2)
    assert frame.layers == (b"a",)


def test_without_a_base_layer_a_frame_is_an_error() -> None:
    (frame,) = assembler().add(layer(7, 1, 2), 1)
    assert isinstance(frame.error, PayloadError)
    assert frame.frame_id == 7


@pytest.mark.parametrize("again", [0, 4, 5])
def test_ids_count_up(again: int) -> None:
    a = assembler()
    a.add(layer(5), 0)
    with pytest.raises(ProtocolError, match="count up"):
        a.add(layer(again), 1)


def test_too_large_a_frame_is_an_error_and_the_next_one_works() -> None:
    a = assembler()
    a.add(layer(0, 0, 2, payload=b"x" * 60), 0)
    (frame,) = a.add(layer(0, 1, 2, payload=b"x" * 60), 1)
    assert isinstance(frame.error, LimitError)
    assert a.add(layer(1), 2)[0].error is None


def test_a_damaged_base_layer_loses_the_frame_a_damaged_later_one_does_not() -> None:
    a = assembler()
    (lost,) = a.damaged(0, 0, PayloadError("bad"), 1)
    assert lost.error is not None
    a.add(layer(1, 0, 3, payload=b"a"), 2)
    (kept,) = a.damaged(1, 1, PayloadError("bad"), 3)
    assert (kept.error, kept.layers) == (None, (b"a",))
    assert a.damaged(1, 2, PayloadError("bad"), 4) == []
    with pytest.raises(ProtocolError):
        a.damaged(0, 0, PayloadError("bad"), 5)


def test_due_before_the_deadline_or_after_the_wait() -> None:
    a = assembler()
    assert a.due_ns(5) is None
    a.add(layer(0, 0, 2), 10)
    assert a.due_ns(5 * MS) == 10 + 50 * MS
    a.flush()
    a.add(layer(1, 0, 2, deadline_ns=30 * MS), 10)
    assert a.due_ns(5 * MS) == 10 + 25 * MS
    assert a.due_ns(90 * MS) == 10  # at once: there is no time to wait


def test_a_later_layer_may_tighten_the_deadline_but_not_loosen_it() -> None:
    a = assembler()
    a.add(layer(0, 0, 3, deadline_ns=30), 0)
    a.add(layer(0, 1, 3, deadline_ns=10), 5)
    (frame,) = a.add(layer(0, 2, 3, deadline_ns=100), 6)
    assert frame.deadline_ns == 15
