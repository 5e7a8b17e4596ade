"""New bundles of a server: fetched in the background, and the later the more of them there were."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from edge_client.bundles.update import BundleUpdate
from protos.errors import BundleError, HeadtailError, ProtocolError, StorageError
from tests.fakes.client_loop import VirtualLoop


class Fetches:
    """Notes when what was fetched, and what it came to."""

    def __init__(self, loop: VirtualLoop, outcome: Callable[[str], object]) -> None:
        self.loop, self.outcome = loop, outcome
        self.asked: list[tuple[float, str]] = []

    async def __call__(self, sha256: str) -> Any:
        self.asked.append((self.loop.time(), sha256))
        await asyncio.sleep(0.1)
        outcome = self.outcome(sha256)
        if isinstance(outcome, HeadtailError):
            raise outcome
        return outcome


@pytest.mark.parametrize("error", [BundleError("bad"), ProtocolError("bad")])
def test_a_bundle_that_was_refused_is_not_fetched_again_for_long_but_another_is(error: HeadtailError) -> None:
    loop = VirtualLoop()
    fetches = Fetches(loop, lambda sha256: error if sha256 == "bad" else "engine")
    update = BundleUpdate(fetches, lambda: True, lambda: None)

    async def story() -> None:
        for _ in range(550):  # a welcome every second
            update.want("bad")
            await asyncio.sleep(1)
        assert len(fetches.asked) == 1
        update.want("good")
        await asyncio.sleep(1)
        assert update.take() == "engine"
        update.want("bad")
        await asyncio.sleep(100)
        assert [sha256 for _, sha256 in fetches.asked] == ["bad", "good", "bad"]
        update.cancel()
        await asyncio.sleep(0)

    loop.run_until_complete(story())
    loop.close()


@pytest.mark.parametrize("outcome", ["engine", StorageError("full"), BundleError("bad")])
def test_a_server_that_announces_bundle_after_bundle_costs_few_downloads(outcome: object) -> None:
    loop = VirtualLoop()
    fetches = Fetches(loop, lambda _: outcome)
    update = BundleUpdate(fetches, lambda: True, lambda: None)
    names = (f"bundle {n}" for n in itertools.count())

    async def story() -> None:
        while loop.time() < 600:
            update.want(next(names))
            update.take()
            await asyncio.sleep(0.05)
        update.cancel()
        await asyncio.sleep(0)

    loop.run_until_complete(story())
    loop.close()
    times = [at for at, _ in fetches.asked]
    assert times[0] == pytest.approx(0)
    assert 10 < len(times) < 26
    assert min(b - a for a, b in itertools.pairwise(times[6:])) > 30


def test_one_update_after_a_quiet_time_is_fetched_at_once() -> None:
    loop = VirtualLoop()
    fetches = Fetches(loop, lambda _: "engine")
    update = BundleUpdate(fetches, lambda: True, lambda: None)

    async def story() -> None:
        for name in "abc":
            update.want(name)
            await asyncio.sleep(0.2)
            assert update.take() == "engine"
            await asyncio.sleep(100)

    loop.run_until_complete(story())
    loop.close()
    assert [round(at) for at, _ in fetches.asked] == [0, 100, 200]
