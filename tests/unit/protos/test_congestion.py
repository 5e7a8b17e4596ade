"""The datagrams' window: it yields to delay and not to packets that vanish, and paces what leaves. In virtual time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

pytest.importorskip("aioquic")

from aioquic.quic.packet_builder import QuicPacketType, QuicSentPacket
from aioquic.tls import Epoch

from deploy.testbed.link.model import Link, LinkConfig, LossModel
from deploy.testbed.link.trace import Trace, constant
from edge_client.transport.base import SessionEvents
from edge_client.transport.lane import Lane
from protos.datagrams.channel import Channel, Item
from protos.datagrams.congestion import DelayControl
from protos.datagrams.loss import Losses
from protos.messages import FrameLayer
from tests.fakes.client_loop import VirtualLoop, run_virtual
from tests.fakes.lanes import Pair, answered, joined

PACKET_BYTES = 1200


class Sender:
    """A window by itself that is always full; each packet is answered after a round trip of the test's choice, or lost."""

    def __init__(self) -> None:
        self.control = DelayControl(max_datagram_size=PACKET_BYTES)
        self.now_s, self.next_s, self.number = 100.0, 0.0, 0
        self.on_way: deque[tuple[float, float, QuicSentPacket, bool]] = (
            deque()
        )  # when it is answered, after how long, what, whether lost

    def round_trip(self, rtt_s: float, lost: Callable[[int], bool] = lambda _: False) -> None:
        """Time passes, and whatever has room leaves."""
        end_s = self.now_s + rtt_s
        while self.now_s < end_s:
            while self.on_way and self.on_way[0][0] <= self.now_s:
                self.settle(*self.on_way.popleft())
            self.next_s = max(self.next_s, self.now_s - 0.002)
            while self.control.room_bytes(self.now_s) >= PACKET_BYTES and self.next_s <= self.now_s:
                self.next_s += PACKET_BYTES / (1.1 * self.control.pace_bytes_per_s)
                packet = QuicSentPacket(
                    epoch=Epoch.ONE_RTT, in_flight=True, is_ack_eliciting=True, is_crypto_packet=False, packet_number=self.number,
                    packet_type=QuicPacketType.ONE_RTT, sent_time=self.now_s, sent_bytes=PACKET_BYTES,
                )  # fmt: skip
                self.control.on_packet_sent(packet=packet)
                self.on_way.append((self.now_s + rtt_s, rtt_s, packet, lost(self.number)))
                self.number += 1
            self.now_s += 0.0005

    def settle(self, at_s: float, rtt_s: float, packet: QuicSentPacket, lost: bool) -> None:
        """What became of a packet is told."""
        if lost:
            self.control.on_packets_lost(now=at_s, packets=[packet])
        else:
            self.control.on_packet_acked(now=at_s, packet=packet)
            self.control.on_rtt_measurement(now=at_s, rtt=rtt_s)


def test_the_window_grows_while_delay_does_not() -> None:
    sender = Sender()
    before = sender.control.window_bytes
    for _ in range(10):
        sender.round_trip(0.05)
    assert sender.control.window_bytes > 4 * before


def test_a_queue_that_stands_narrows_the_window_and_one_that_is_gone_lets_it_grow() -> None:
    sender = Sender()
    for _ in range(8):
        sender.round_trip(0.05)
    before = sender.control.window_bytes
    for _ in range(16):
        sender.round_trip(0.15)
    narrowed = sender.control.window_bytes
    assert narrowed < before / 3
    for _ in range(8):
        sender.round_trip(0.05)
    assert sender.control.window_bytes > narrowed


@pytest.mark.parametrize("every", [10, 3, 2])
def test_packets_that_vanish_do_not_narrow_the_window(every: int) -> None:
    sender = Sender()
    for _ in range(3):
        sender.round_trip(0.05)
    before = sender.control.window_bytes
    for _ in range(10):
        sender.round_trip(0.05, lambda number: number % every == 0)
    assert sender.control.window_bytes >= before
    assert sender.control.losses.seen > 0.7 / every


def test_a_path_on_which_almost_nothing_arrives_is_sent_the_least() -> None:
    sender = Sender()
    for _ in range(3):
        sender.round_trip(0.05)
    wide = sender.control.window_bytes
    for _ in range(20):
        sender.round_trip(0.05, lambda number: number % 20 != 0)
    assert sender.control.window_bytes > wide / 2  # a second: it may be an outage that ends
    for _ in range(80):
        sender.round_trip(0.05, lambda number: number % 20 != 0)
    assert sender.control.window_bytes <= 6 * PACKET_BYTES


def test_nothing_is_in_flight_beyond_what_left_and_was_not_settled() -> None:
    sender = Sender()
    for index in range(12):
        sender.round_trip(0.05, lambda number: number % 4 == 0)
        assert sender.control.bytes_in_flight == PACKET_BYTES * len(sender.on_way), index


def test_packets_whose_acknowledgements_are_lost_do_not_fill_the_window_for_ever() -> None:
    sender = Sender()
    for _ in range(6):
        sender.round_trip(0.05, lambda number: number % 2 == 0)
    control = sender.control
    sender.round_trip(0.04)
    in_flight = control.bytes_in_flight
    assert control.room_bytes(sender.now_s) == control.window_bytes - in_flight
    assert control.room_bytes(sender.now_s + 1) == control.window_bytes
    while sender.on_way:  # what is heard of them after all is counted once
        sender.settle(*sender.on_way.popleft())
    assert control.bytes_in_flight == 0
    assert control.room_bytes(sender.now_s + 1) == control.window_bytes


# ---------------------------------------------------------------- over a link


def link(mbps: float = 10.0, *, loss: float = 0.0, trace: Trace | None = None) -> LinkConfig:
    return LinkConfig(trace=trace or constant(mbps * 1e6), delay_ns=20_000_000, loss=LossModel(loss=loss))


async def pour(pair: Pair, seconds: float) -> None:
    """A source that always has more to say."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds
    while loop.time() < end_s:
        if pair.client.waiting < 16:
            pair.client.offer([Item(bytes(1100), end_s)] * (16 - pair.client.waiting))
        await asyncio.sleep(0.005)
    pair.client.clear()


def over(up: LinkConfig, seconds: float) -> tuple[Pair, float]:
    """A flow with the link to itself: its ends, and the share of 10 Mbit/s that arrived."""

    async def main(loop: VirtualLoop) -> tuple[Pair, float]:
        pair = await joined(loop, Link(up, "up"), Link(link(), "down"))
        begun_s, before = loop.time(), pair.up.arrived_bytes
        await pour(pair, seconds)
        share = (pair.up.arrived_bytes - before) * 8 / (loop.time() - begun_s) / 10e6
        pair.close()
        return pair, share

    return run_virtual(main, step_s=1e-6)


def queues_ms(pair: Pair, from_s: float) -> list[float]:
    return [1e3 * took - 20 for at, took in pair.up.delays_s if at >= from_s]


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3])
def test_a_flow_fills_a_link_that_loses_packets_without_a_long_queue(loss: float) -> None:
    pair, share = over(link(loss=loss), 8.0)
    assert share > 0.75 * (1 - loss)
    assert np.quantile(queues_ms(pair, 2.0), 0.95) < 50


def test_a_tenth_of_the_capacity_is_known_within_two_seconds() -> None:
    pair, _ = over(link(trace=Trace([(0, 10e6), (4 * 10**9, 1e6)], 10**12)), 9.0)
    assert np.quantile(queues_ms(pair, 6.5), 0.9) < 120
    assert pair.up.link.dropped < 400


def test_a_short_queue_is_not_overrun() -> None:
    """25 ms of queue never show more delay than the target: what says that it is full are losses."""
    config = LinkConfig(trace=constant(10e6), delay_ns=20_000_000, queue_bytes=25_000)
    pair, share = over(config, 8.0)
    assert share > 0.75
    assert pair.up.link.dropped < 0.05 * len(pair.up.delays_s)


def test_losses_beside_a_short_queue_leave_the_initial_window() -> None:
    sender = Sender()
    for _ in range(10):
        sender.round_trip(0.05)
    wide = sender.control.window_bytes
    for _ in range(60):
        sender.round_trip(0.065, lambda number: number % 4 == 0)
    assert 10 * PACKET_BYTES <= sender.control.window_bytes < wide / 2


def test_a_message_leaves_evenly_and_not_at_once() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        pair = await joined(loop, Link(link(100.0), "up"), Link(link(100.0), "down"))
        await asyncio.sleep(0.5)
        begun = len(pair.up.delays_s)
        pair.client.offer([Item(bytes(1100), loop.time() + 1)] * 8)
        await asyncio.sleep(0.3)
        pair.close()
        return [at for at, _ in pair.up.delays_s[begun:]]

    left = run_virtual(main, step_s=1e-6)
    assert len(left) >= 8
    assert left[7] - left[0] > 0.01
    assert np.max(np.diff(left[:8])) < 0.02


def test_copies_of_a_small_piece_do_not_share_a_packet() -> None:
    async def main(loop: VirtualLoop) -> int:
        pair = await joined(loop, Link(link(), "up"), Link(link(), "down"))
        await asyncio.sleep(0.5)
        begun = len(pair.down.delays_s)
        pair.server.offer([Item(bytes(60), loop.time() + 1)] * 9)
        await asyncio.sleep(0.015)  # before anything of it is acknowledged
        pair.close()
        return len(pair.down.delays_s) - begun

    assert run_virtual(main, step_s=1e-6) >= 9


@pytest.mark.parametrize(
    ("loss", "burst", "n_bytes", "share"), [(0.2, 3.0, 2300, 0.96), (0.2, 3.0, 200, 0.95), (0.6, 1.0, 2300, 0.9)]
)
def test_frames_are_answered_where_packets_are_lost_both_ways(loss: float, burst: float, n_bytes: int, share: float) -> None:
    model = LossModel(loss=loss, burst_packets=burst)
    config = LinkConfig(trace=constant(10e6), delay_ns=40_000_000, loss=model, loss_from_ns=4 * 10**9)
    found = [in_time for seed in range(2) for in_time in answered(config, n_bytes, seed=seed, seconds=10)]
    assert np.mean(found) >= share


def test_the_parity_of_a_frame_keeps_to_what_the_policy_grants() -> None:
    events = _Events()
    lane = Lane(("server", 1), cast("SessionEvents", events), lambda _: None, clock=lambda: 0)
    losses = Losses()
    for number in range(200):
        losses.add(number, lost=number % 4 == 0)
    channel = cast("Channel", SimpleNamespace(control=SimpleNamespace(losses=losses, pace_bytes_per_s=1e9)))
    layer = FrameLayer(frame_id=1, source_width_px=4, source_height_px=4, payload=bytes([1]) * 3000)
    sent = []
    for events.most_bytes in (inf, 7 * 1120, 100):
        sent.append(len(lane._cuts(channel, [layer], 10**8)[0].bodies))
    assert sent[0] > sent[1] == 7 >= sent[2] > 3


class _Events:
    most_bytes = inf

    def frame_bytes(self) -> float:
        return self.most_bytes
