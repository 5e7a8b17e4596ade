"""Downloads: a share of the slots for each client, and no place for whoever dawdles while others wait."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from edge_server.config import Limits
from edge_server.doors.fetch import FetchSlots
from protos.errors import LimitError


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def held(slots: FetchSlots, client: str, log: list[str], stay: asyncio.Event) -> None:
    async with slots.hold(client):
        log.append(client)
        await stay.wait()


async def test_one_client_cannot_hold_all_slots() -> None:
    slots, log, stay = FetchSlots(Limits(max_fetches=4, max_fetches_per_client=3)), list[str](), asyncio.Event()
    tasks = [asyncio.create_task(held(slots, "a", log, stay)) for _ in range(10)]
    await turns()
    assert log == ["a"] * 3
    tasks += [asyncio.create_task(held(slots, name, log, stay)) for name in "bc"]
    await turns()
    assert log == ["a"] * 3 + ["b"]  # the fourth slot; c waits for one of all
    stay.set()
    await asyncio.gather(*tasks)
    assert sorted(log) == ["a"] * 10 + ["b", "c"]
    assert slots._own == {}


async def test_who_gives_up_waiting_takes_nothing_along() -> None:
    slots, log, stay = FetchSlots(Limits(max_fetches=2, max_fetches_per_client=1)), list[str](), asyncio.Event()
    tasks = [asyncio.create_task(held(slots, name, log, stay)) for name in "aabc"]
    await turns()
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks[1:], return_exceptions=True)
    stay.set()
    await tasks[0]
    async with asyncio.timeout(1), AsyncExitStack() as stack:
        for name in "bc":
            await stack.enter_async_context(slots.hold(name))
    slots.check(0, 1e6)  # nobody waits
    assert slots._own == {}


async def test_a_slow_download_gives_way_only_when_others_wait() -> None:
    slots, log, stay = FetchSlots(Limits(max_fetches=1, write_s=30.0, min_fetch_bytes_per_s=8192)), list[str](), asyncio.Event()
    async with slots.hold("slow"):
        slots.check(0, 1000.0)
        waiting = asyncio.create_task(held(slots, "other", log, stay))
        await turns()
        slots.check(0, 29.0)
        slots.check(81_920, 39.0)
        with pytest.raises(LimitError, match="others wait") as caught:
            slots.check(81_920, 41.0)
        assert caught.value.retryable
    stay.set()
    await waiting
