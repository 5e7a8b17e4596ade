"""A short fuzz of the UDP door and of what comes through it; ``tests.bench.fuzz`` has the long one."""

from __future__ import annotations

import pytest

pytest.importorskip("aioquic")

from tests.fakes.datagram_fuzz import attack


async def test_hostile_datagrams_are_nobodys_frames_and_nobodys_connections() -> None:
    found = await attack(6000, seed=3)
    assert found["wrong_frames"] == 0
    assert found["frame"] > 50  # true ones came through all the same
    assert found["connections"] == 0  # no address was validated
    assert found["amplification"] < 1
    assert found["frames_held"] <= 5
