"""Detected bottlenecks: sessions of one queue are joined, those of two are not, and what is joined comes apart again."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_server.bandwidth.bottlenecks import BottleneckConfig, Bottlenecks
from edge_server.bandwidth.grants import BandwidthManager

MS, S = 1_000_000, 1_000_000_000


class Queue:
    """A FIFO link whose load comes and goes."""

    def __init__(self, bps: float, seed: int) -> None:
        self.bps = bps
        self.free_ns = 0
        self.rng = random.Random(seed)
        self.load = 1.0

    def send(self, n_bytes: int, now_ns: int) -> int:
        """Returns when it has arrived."""
        if self.rng.random() < 0.02:
            self.load = self.rng.uniform(0.4, 1.4)
        self.free_ns = max(self.free_ns, now_ns) + int(8e9 * n_bytes * self.load / self.bps)
        return self.free_ns + 10 * MS


def drive(
    found: Bottlenecks,
    links: dict[str, Queue],
    *,
    begin_s: float,
    seconds: float,
    fps: int = 10,
    lag: Callable[[int], int] = lambda _: 0,
    told: bool = False,
) -> None:
    """Every session sends 2-6 kB a frame; arrivals are told in order of time, ``lag`` ns late, which is ``told``."""
    rng = random.Random(str(begin_s))
    phase = {name: rng.randrange(S // fps) for name in links}
    sends = sorted((int(begin_s * S) + phase[name] + k * S // fps, name) for name in links for k in range(int(seconds * fps)))
    rows = []
    for at_ns, name in sends:
        arrival_ns = links[name].send(rng.randrange(2000, 6000), at_ns)
        rows.append((arrival_ns + lag(arrival_ns), name, arrival_ns + lag(arrival_ns) - at_ns - 10 * MS))
    for arrival_ns, name, queue_ns in sorted(rows):
        found.add(name, queue_ns, arrival_ns)
        if told and lag(arrival_ns):
            found.spoil(arrival_ns - lag(arrival_ns), arrival_ns)
        found.update(arrival_ns)


def groups(found: Bottlenecks, names: list[str]) -> list[str]:
    return [found.group(n) for n in names]


def two_links(n: int) -> tuple[Bottlenecks, dict[str, Queue], list[str], list[str]]:
    found = Bottlenecks()
    first, second = [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)]
    for name in [*first, *second]:
        found.open(name)
    one, other = Queue(n * 0.33e6, 1), Queue(n * 0.33e6, 2)
    return found, {**dict.fromkeys(first, one), **dict.fromkeys(second, other)}, first, second


def test_those_who_share_a_queue_are_joined_and_two_queues_are_kept_apart() -> None:
    found, links, first, second = two_links(8)
    drive(found, links, begin_s=0, seconds=5)
    assert groups(found, [*first, *second]) == [""] * 16, "a few seconds prove nothing"
    drive(found, links, begin_s=5, seconds=20)
    assert len(set(groups(found, first))) == 1
    assert len(set(groups(found, second))) == 1
    assert found.group("a0")
    assert found.group("b0")
    assert found.group("a0") != found.group("b0")


def test_a_session_that_moves_to_another_link_leaves_the_group() -> None:
    found, links, first, _ = two_links(6)
    drive(found, links, begin_s=0, seconds=25)
    assert found.group("a5") == found.group("a0") != ""
    links["a5"] = Queue(0.33e6, 9)
    drive(found, links, begin_s=25, seconds=75)
    assert found.group("a5") == "", "its own queue has nothing to do with theirs"
    assert len(set(groups(found, first[:5]))) == 1
    assert found.group("a0"), "the others stay"


def test_links_without_a_queue_prove_nothing_and_a_joint_unconfirmed_is_dissolved() -> None:
    found, links, first, _ = two_links(4)
    drive(found, links, begin_s=0, seconds=25)
    assert found.group("a0")
    for queue in set(links.values()):
        queue.bps = 1e9
    drive(found, links, begin_s=25, seconds=30)
    assert len(set(groups(found, first))) == 1
    assert found.group("a0"), "that the queue is gone, perhaps thanks to the grants, is no reason to part"
    drive(found, links, begin_s=55, seconds=45)
    assert groups(found, first) == [""] * 4, "a minute without proof is"


def test_thirty_links_of_their_own_are_never_joined() -> None:
    found = Bottlenecks()
    links = {f"s{i}": Queue(0.33e6, 100 + i) for i in range(30)}
    for name in links:
        found.open(name)
    drive(found, links, begin_s=0, seconds=60)
    assert set(groups(found, list(links))) == {""}


def test_a_server_that_is_late_is_no_shared_link() -> None:
    """Every arrival waits for a busy event loop: without the server's own word for it that would look like one queue."""
    verdicts = {}
    for told in (False, True):
        found = Bottlenecks()
        links = {f"s{i}": Queue(1e9, i) for i in range(6)}
        for name in links:
            found.open(name)
        stalls = random.Random(5)
        late = [stalls.choice((0, 0, 20, 60, 120)) * MS for _ in range(1000)]

        def lag(at_ns: int, late: list[int] = late) -> int:
            return late[at_ns // (200 * MS)]

        drive(found, links, begin_s=0, seconds=30, lag=lag, told=told)
        verdicts[told] = {found.group(n) for n in links}
    assert verdicts[False] != {""}, "else this test would prove nothing"
    assert verdicts[True] == {""}


def test_owners_are_never_mixed() -> None:
    found = Bottlenecks()
    queue = Queue(1.98e6, 1)
    for i in range(6):
        found.open(f"s{i}", "red" if i % 2 else "blue")
    drive(found, {f"s{i}": queue for i in range(6)}, begin_s=0, seconds=30)
    red, blue = {found.group(f"s{i}") for i in (1, 3, 5)}, {found.group(f"s{i}") for i in (0, 2, 4)}
    assert len(red) == len(blue) == 1
    assert red.isdisjoint(blue)
    assert "" not in red | blue


operations = st.lists(
    st.tuples(
        st.sampled_from(("open", "close", "add", "add", "add", "spoil", "update")),
        st.integers(0, 9),
        st.integers(-10, 10**9),
        st.integers(-3 * S, 3 * S),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_whatever_it_is_told_groups_are_of_open_sessions_of_one_owner_and_of_two_at_least(
    rows: list[tuple[str, int, int, int]],
) -> None:
    found = Bottlenecks(BottleneckConfig(max_sessions=6, slots=10, min_common=3, joins=1, parts=1, join=0.2, join_changes=-1.0))
    again = Bottlenecks(found.config)
    now = 0
    open_: set[str] = set()
    for what, who, value, step in rows:
        now = max(0, now + step)
        name = f"s{who}"
        for one in (found, again):
            match what:
                case "open":
                    one.open(name, f"owner{who % 2}")
                case "close":
                    one.close(name)
                case "add":
                    one.add(name, value, now)
                case "spoil":
                    one.spoil(now - abs(value), now)
                case _:
                    one.update(now)
        open_ = (open_ | {name}) if what == "open" else open_ - {name} if what == "close" else open_
        names = [f"s{i}" for i in range(10)]
        assert groups(found, names) == groups(again, names), "the same story, the same groups"
        for name_ in names:
            assert not found.group(name_) or name_ in open_
        for group in {found.group(n) for n in names} - {""}:
            members = [n for n in names if found.group(n) == group]
            assert len({int(n[1:]) % 2 for n in members}) == 1
    found.update(now + 2 * S)
    left = [g for g in groups(found, [f"s{i}" for i in range(10)]) if g]
    assert all(left.count(g) >= 2 for g in left)


def test_one_token_cannot_join_another_tokens_group() -> None:
    manager = BandwidthManager()
    manager.open("mine", "yard", owner="red")
    manager.open("theirs", "yard", owner="blue")
    manager.open("forged", "red yard", owner="")
    manager.open("alone", "", owner="red")
    assert len({manager.group(s) for s in ("mine", "theirs", "forged", "alone")}) == 4
    manager.open("also mine", "yard", owner="red")
    assert manager.group("also mine") == manager.group("mine")


def test_a_detected_group_is_granted_its_bottleneck() -> None:
    manager = BandwidthManager()
    queue = Queue(1e6, 3)
    names = [f"s{i}" for i in range(5)]
    for name in names:
        manager.open(name, fps=10, points=[(1000.0, 0.5), (2000.0, 0.6), (4000.0, 0.66)])
    granted: dict[str, int] = {}
    sends = sorted((k * 100 * MS + i * 17 * MS, name) for i, name in enumerate(names) for k in range(300))
    rows = sorted((queue.send(2600, at_ns), at_ns, name) for at_ns, name in sends)
    for arrival_ns, sent_ns, name in rows:
        manager.on_layer(name, 2600, sent_ns, arrival_ns)
        if (grant := manager.grant(name, arrival_ns)) is not None:
            granted[name] = grant.bitrate_bps
    assert len({manager.group(n) for n in names}) == 1
    assert manager.group("s0")
    assert 0.5e6 < sum(granted.values()) < 2.3e6, "the load moves the capacity between 0.7 and 2.5 Mbit/s"
    assert max(granted.values()) < 1.5 * min(granted.values())
