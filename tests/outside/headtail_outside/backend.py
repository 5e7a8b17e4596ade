"""A backend: tails run on the event loop itself, frame by frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_server.backends import Load, TailAnswer, TailWork
from protos.errors import UnknownModelError
from splitters.bundle import Bundle
from splitters.runtime.tail import Tail, load_tail

TAIL_NS = 7_654_321


class InlineBackend:
    def __init__(self) -> None:
        self._tails: dict[str, Tail] = {}

    async def load(self, bundle: Bundle) -> None:
        self._tails[bundle.sha256] = load_tail(bundle, threads=1)

    async def unload(self, bundle_sha256: str) -> None:
        self._tails.pop(bundle_sha256, None)

    async def run(self, work: TailWork) -> TailAnswer:
        if work.bundle_sha256 not in self._tails:
            raise UnknownModelError("no such tail")
        (answer,) = self._tails[work.bundle_sha256].run([np.asarray(a)[None] for a in work.arrays], [work.size_px])
        return TailAnswer(answer=answer, queue_ns=0, tail_ns=TAIL_NS, batch_size=1)

    def load_now(self) -> Load:
        return Load(waiting=0, queue_ns=0, tail_ns=TAIL_NS)

    async def close(self) -> None:
        self._tails.clear()


async def open_backend(config: Any, **options: Any) -> InlineBackend:
    return InlineBackend()
