"""A replica's load gives way to frames; the frames' own thread does not give way."""

import asyncio
import os
import sys
import time

import psutil
import pytest

from edge_server.backends.embedded import EmbeddedBackend
from edge_server.config import BatchConfig, TailConfig
from splitters.bundle import Bundle


def niceness(of: int = 0) -> int:
    return os.getpriority(os.PRIO_PROCESS, of)


@pytest.mark.parametrize(("threads", "more"), [(1, 4), (2, 0)])  # a second thread would keep it for the frames to come
async def test_a_load_gives_way_and_the_tail_does_not(threads: int, more: int) -> None:
    backend = EmbeddedBackend(BatchConfig(), TailConfig(threads=threads), time.monotonic_ns, loading_niceness=4)
    try:
        before = niceness()
        assert backend._loader.submit(niceness).result() == before + more
        assert backend._thread.native_id is not None
        assert niceness(backend._thread.native_id) == before
        assert niceness() == before
    finally:
        await backend.close()


async def test_the_servers_own_loads_do_not_give_way() -> None:
    backend = EmbeddedBackend(BatchConfig(), TailConfig(threads=1), time.monotonic_ns)
    try:
        assert backend._loader.submit(niceness).result() == niceness()
    finally:
        await backend.close()


async def test_a_tail_pinned_to_one_core_starts_no_threads_for_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # else its setting counts
    backend = EmbeddedBackend(BatchConfig(), TailConfig(cpus=(min(os.sched_getaffinity(0)),)), time.monotonic_ns)
    try:
        await asyncio.get_running_loop().run_in_executor(backend._loader, int)
        before = psutil.Process().num_threads()
        await backend.load(bundle)
        assert psutil.Process().num_threads() == before
    finally:
        await backend.close()
