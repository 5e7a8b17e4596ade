"""Times measured on a busy machine are the device's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.bundles.loader import ModelLoader
from edge_client.bundles.store import BundleStore
from edge_client.device.choices import DeviceTimes, known_times, undisturbed
from edge_client.device.engine import Engine
from edge_client.device.timings import DevicePace
from edge_client.transport.rpc import Endpoint
from splitters.bundle import Bundle
from splitters.bundle.operating_point import Quantiles

MS = 1_000_000


def test_turns_that_other_work_disturbed_do_not_count() -> None:
    quiet = undisturbed([10.0, 10.2, 10.1, 10.3, 10.1, 10.2, 10.4])
    busy = undisturbed([30.0, 10.2, 28.0, 10.3, 31.0, 10.2, 33.0])
    assert busy.p50 == pytest.approx(quiet.p50, rel=0.05)
    assert busy.p95 <= 2 * busy.p50


def test_what_varies_by_itself_has_a_spread() -> None:
    assert undisturbed([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]).p95 == pytest.approx(16.0)


def test_one_turn_is_enough() -> None:
    only = undisturbed([7.0])
    assert (only.p50, only.p95) == (7.0, 7.0)


def test_a_pace_lasts_when_most_blocks_of_frames_show_it() -> None:
    pace = DevicePace({"local": 100.0 * MS})
    for block in range(12):
        assert (pace.lasting is None) == (block < 4)
        for _ in range(16):
            pace.add("local", (40 if block % 4 else 900) * MS)
    assert pace.lasting == pytest.approx(0.4)


async def test_what_is_kept_of_a_device_follows_its_lasting_pace(tmp_path: Path, bundle: Bundle) -> None:
    """Measured while the machine was busy, kept for good: so it was. The next start begins with what frames took."""
    measured = DeviceTimes(head_ms={0: Quantiles(p50=10, p95=12)}, local_ms=Quantiles(p50=40, p95=50))
    engine = Engine(bundle, clock=lambda: 0)
    store = BundleStore(tmp_path)

    async def load(_: Bundle) -> tuple[Engine, DeviceTimes]:
        return engine, measured

    def known() -> DeviceTimes | None:
        return known_times(bundle, threads=1, cache=store.root / "times")

    loader = ModelLoader(Endpoint(address="127.0.0.1:1"), "", store=store, load=load)
    loader.paced(engine, 0.5)  # of a bundle it did not load nothing is known
    await loader._opened(bundle)
    loader.paced(engine, 1.2)
    assert known() is None  # as good as what was measured
    loader.paced(engine, 0.5)
    assert known() == measured.scaled(0.5)
    loader.paced(engine, 0.45)
    assert known() == measured.scaled(0.5)
    loader.paced(engine, 1.0)
    assert known() == measured


def test_of_two_measurements_the_shorter_time_is_the_devices() -> None:
    quiet = DeviceTimes(head_ms={0: Quantiles(p50=10, p95=12), 1: Quantiles(p50=31, p95=60)}, local_ms=Quantiles(p50=40, p95=50))
    busy = DeviceTimes(head_ms={0: Quantiles(p50=15, p95=30), 1: Quantiles(p50=30, p95=33)})
    both = DeviceTimes(head_ms={0: Quantiles(p50=10, p95=12), 1: Quantiles(p50=30, p95=33)}, local_ms=Quantiles(p50=40, p95=50))
    assert quiet.least(busy) == both
    assert busy.least(quiet) == both
