import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_server.backends.batcher import BatchQueue, TailTimes
from edge_server.config import BatchConfig
from protos.errors import OverloadedError

MS = 1_000_000


def queue(**settings: int) -> BatchQueue[str]:
    return BatchQueue(BatchConfig(**settings))


def names(waiting: list) -> list[str]:
    return [w.item for w in waiting]


def test_earliest_deadline_goes_first_and_no_deadline_last() -> None:
    q = queue(max_batch=1)
    q.add("k", None, 0, "whenever")
    q.add("k", 90 * MS, 0, "later")
    q.add("k", 40 * MS, 0, "soon")
    assert [names(q.take(MS).run) for _ in range(3)] == [["soon"], ["later"], ["whenever"]]


def test_only_one_key_in_a_batch_and_what_waits_together_goes_together() -> None:
    q = queue(max_batch=8)
    for i, key in enumerate(["a", "b", "a", "b", "a"]):
        q.add(key, None, i, f"{key}{i}")
    assert names(q.take(10).run) == ["a0", "a2", "a4"]
    assert names(q.take(10).run) == ["b1", "b3"]
    assert q.take(10).run == []


def test_max_batch_is_kept() -> None:
    q = queue(max_batch=3)
    for i in range(7):
        q.add("k", None, 0, str(i))
    assert [len(q.take(0).run) for _ in range(3)] == [3, 3, 1]


def test_a_frame_that_cannot_be_in_time_is_refused_at_once() -> None:
    q = queue()
    q.times.add("k", 1, 30 * MS, 0)
    with pytest.raises(OverloadedError, match=r"30\.0 ms"):
        q.add("k", 20 * MS, 0, "late")
    q.add("k", 50 * MS, 0, "fine")
    assert len(q) == 1


def test_one_slow_run_does_not_refuse_frames_for_ever() -> None:
    q = queue()
    q.times.add("k", 1, 2000 * MS, 2000 * MS)  # a first run, while all else was starting too
    with pytest.raises(OverloadedError):
        q.add("k", 3000 * MS, 2100 * MS, "refused")
    q.add("k", 3600 * MS, 2600 * MS, "tried")  # nothing has confirmed that time for half a second
    batch = q.take(2600 * MS)
    assert (names(batch.run), batch.refused) == (["tried"], [])
    for i in range(1, 20):
        q.times.add("k", 1, 10 * MS, (2600 + 20 * i) * MS)
    q.add("k", 4000 * MS, 3000 * MS, "again")
    assert names(q.take(3000 * MS).run) == ["again"]


def test_a_frame_that_became_late_while_waiting_is_dropped_before_the_tail() -> None:
    q = queue(max_batch=1)
    q.times.add("k", 1, 10 * MS, 0)
    q.add("k", 20 * MS, 0, "a")
    q.add("k", 100 * MS, 0, "b")
    batch = q.take(15 * MS)
    assert names(batch.refused) == ["a"]
    assert names(batch.run) == ["b"]


def test_overload_refuses_as_few_as_possible() -> None:
    q = queue(max_batch=1, margin_ns=0)
    q.times.add("k", 1, 10 * MS, 0)
    for i in range(6):
        q.add("k", 30 * MS, 0, str(i))  # three of six fit
    ran, refused, now = [], [], 0
    while len(q):
        batch = q.take(now)
        refused += names(batch.refused)
        ran += names(batch.run)
        now += 10 * MS * len(batch.run)
    assert len(ran) == 3
    assert len(refused) == 3


def test_batch_shrinks_to_meet_the_most_urgent_deadline() -> None:
    q = queue(max_batch=16, margin_ns=0)
    q.times.add("k", 1, 10 * MS, 0)
    q.times.add("k", 8, 24 * MS, 0)
    q.add("k", 15 * MS, 0, "urgent")
    for i in range(7):
        q.add("k", 500 * MS, 0, str(i))
    first = q.take(0)
    assert names(first.run)[0] == "urgent"
    assert q.times.estimate_ns("k", len(first.run), 0) <= 15 * MS
    assert 1 < len(first.run) < 8


def test_a_full_queue_refuses() -> None:
    q = queue(max_queue=2)
    q.add("k", None, 0, "a")
    q.add("k", None, 0, "b")
    with pytest.raises(OverloadedError, match="2 frames wait"):
        q.add("k", None, 0, "c")


def test_no_artificial_delay_by_default_and_a_bounded_one_on_request() -> None:
    q = queue()
    q.add("k", None, 0, "a")
    assert q.hold_ns(0) == 0
    q = queue(max_delay_ns=5 * MS, max_batch=2)
    q.add("k", None, 0, "a")
    assert q.hold_ns(2 * MS) == 3 * MS
    assert q.hold_ns(6 * MS) == 0
    q.add("k", None, 1, "b")
    assert q.hold_ns(2 * MS) == 0  # the batch is full


def test_delay_ends_before_a_deadline_would_be_missed() -> None:
    q = queue(max_delay_ns=50 * MS, margin_ns=MS)
    q.times.add("k", 1, 10 * MS, 0)
    q.add("k", 20 * MS, 0, "a")
    assert q.hold_ns(0) == 8 * MS


def test_removed_frames_do_not_run() -> None:
    q = queue()
    gone = "gone"
    q.add("k", None, 0, gone)
    q.add("k", None, 0, "stays")
    q.remove({id(gone)})
    assert names(q.take(0).run) == ["stays"]


def test_times_are_interpolated_and_smoothed() -> None:
    t = TailTimes()
    assert t.estimate_ns("k", 4, 0) == 0
    t.add("k", 2, 20, 0)
    assert t.estimate_ns("k", 2, 0) == 20
    t.add("k", 6, 60, 0)
    assert t.estimate_ns("k", 4, 0) == 40
    assert t.estimate_ns("k", 12, 0) == 120
    t.add("k", 2, 120, 0)
    assert 20 < t.estimate_ns("k", 2, 0) < 120


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.none(), st.integers(1, 200)), st.integers(0, 20)), max_size=40),
    st.integers(1, 8),
)
def test_every_frame_is_run_or_refused_exactly_once_and_never_run_late(frames: list, max_batch: int) -> None:
    q = queue(max_batch=max_batch, margin_ns=0)
    cost = {"a": 7 * MS, "b": 3 * MS}
    for key, per_frame in cost.items():
        for n in range(1, 9):
            q.times.add(key, n, per_frame * n, 0)
    offered, told, now = set(), [], 0
    arriving = sorted(((at * MS, i, key, ms) for i, (key, ms, at) in enumerate(frames)))
    while arriving or len(q):
        if not len(q):
            now = max(now, arriving[0][0])
        while arriving and arriving[0][0] <= now:
            at, i, key, ms = arriving.pop(0)
            offered.add(i)
            try:
                q.add(key, None if ms is None else at + ms * MS, now, (i, None if ms is None else at + ms * MS))
            except OverloadedError:
                told.append(i)
        batch = q.take(now)
        told += [w.item[0] for w in batch.refused]
        if batch.run:
            assert len({w.key for w in batch.run}) == 1
            assert len(batch.run) <= max_batch
            now += cost[batch.run[0].key] * len(batch.run)
            for key, per_frame in cost.items():  # both fresh: it is the exactness of known times that is tested
                q.times.add(key, len(batch.run), per_frame * len(batch.run), now)
            assert all(w.deadline_ns is None or now <= w.deadline_ns for w in batch.run)
            told += [w.item[0] for w in batch.run]
    assert sorted(told) == sorted(offered)


# ------------------------------------------------------------------------------------------------ several clients


def test_a_flood_makes_nobody_late_but_itself() -> None:
    q = queue(max_batch=1, margin_ns=0)
    q.times.add("k", 1, 10 * MS, 0)
    for i in range(60):
        q.add("k", (40 + i) * MS, 0, f"flood{i}", client="flood")
    q.add("k", 100 * MS, 0, "camera", client="camera")
    done, now_ns = [], 0
    while (batch := q.take(now_ns)).run:
        now_ns += 10 * MS
        q.times.add("k", 1, 10 * MS, now_ns)
        done.append((batch.run[0].item, now_ns))
    assert [at_ns for name, at_ns in done if name == "camera" and at_ns <= 100 * MS]
    assert len(done) > 5, "and the flood has the rest of the tail"


def test_while_others_are_present_no_run_of_the_tail_is_long() -> None:
    q = queue(max_batch=16)
    q.times.add("k", 1, 10 * MS, 0)
    q.times.add("k", 16, 160 * MS, 0)
    for i in range(16):
        q.add("k", None, 0, str(i), client="flood")
    assert len(q.take(0).run) == 16
    q.add("k", None, 0, "camera", client="camera")
    q.take(0)
    for i in range(16):
        q.add("k", None, 0, str(i), client="flood")
    assert len(q.take(0).run) == 3


def test_one_client_cannot_fill_the_queue_while_others_are_present() -> None:
    q = queue(max_queue=8)
    q.add("k", None, 0, "camera", client="camera")
    for i in range(4):
        q.add("k", None, 0, str(i), client="flood")
    with pytest.raises(OverloadedError, match="of this client"):
        q.add("k", None, 0, "5", client="flood")
    q.add("k", None, 0, "camera", client="camera")
    alone = queue(max_queue=8)
    for i in range(8):
        alone.add("k", None, 0, str(i), client="flood")
