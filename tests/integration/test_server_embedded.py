"""The embedded backend's start."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from edge_server.backends import embedded
from edge_server.config import BatchConfig, TailConfig
from splitters.bundle import Bundle
from splitters.runtime.tail import Tail, load_tail
from tests.fakes.bundles import write_tiny_bundle


async def test_every_tail_can_answer_before_any_is_made_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loaded machine making the fast form takes long; a server of several models must not stay shut for that."""
    names = ["a", "b", "c"]
    bundles = [write_tiny_bundle(tmp_path / name, name=name, seed=i) for i, name in enumerate(names)]
    seen: list[tuple[str, str]] = []
    prepare = Tail.prepare

    def loaded(bundle: Bundle, **options: Any) -> Tail:
        seen.append(("load", bundle.manifest.name))
        return load_tail(bundle, **options)

    def prepared(tail: Tail) -> None:
        seen.append(("prepare", tail.bundle.manifest.name))
        prepare(tail)

    monkeypatch.setattr(embedded, "load_tail", loaded)
    monkeypatch.setattr(Tail, "prepare", prepared)
    backend = embedded.EmbeddedBackend(BatchConfig(), TailConfig(), time.monotonic_ns)
    try:
        for bundle in bundles:
            await backend.load(bundle)
        async with asyncio.timeout(20):
            while len(seen) < 6:
                await asyncio.sleep(0.01)
    finally:
        await backend.close()
    assert seen == [("load", name) for name in names] + [("prepare", name) for name in names]
