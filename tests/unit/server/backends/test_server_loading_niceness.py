"""A replica's load gives way to frames, and it is done when the fast form is there; the frames' own thread does not give way."""

import os
import time

import pytest

from edge_server.backends.embedded import EmbeddedBackend
from edge_server.config import BatchConfig, TailConfig
from splitters.bundle import Bundle
from splitters.runtime.tail import Tail


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


async def test_a_tail_is_prepared_when_its_backend_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    prepare = Tail.prepare

    def slowly(tail: Tail) -> None:
        time.sleep(0.2)
        prepare(tail)
        done.append(tail.bundle.sha256)

    monkeypatch.setattr(Tail, "prepare", slowly)
    backend = EmbeddedBackend(BatchConfig(), TailConfig(threads=1), time.monotonic_ns)
    try:
        await backend.load(bundle)
        assert done == []
        await backend.prepared()
        assert done == [bundle.sha256]
    finally:
        await backend.close()
