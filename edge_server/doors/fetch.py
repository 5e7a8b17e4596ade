"""Hands the device part of a bundle to a client, in small pieces and from where it left off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from edge_server.config import Limits
from edge_server.models import Model
from protos.errors import LimitError, ProtocolError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import CHUNK_BYTES

_MAX_OFFSETS = 4096


class FetchSlots:
    """How many downloads go on at once: a share for each client, so that a few who do not read cannot keep all others out.

    Args:
        limits: how many, and how fast those must read for whom others wait.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all = asyncio.Semaphore(limits.max_fetches)
        self._own: dict[str, tuple[asyncio.Semaphore, set[object]]] = {}
        self._waiting = 0  # with a share of their own to use

    @asynccontextmanager
    async def hold(self, client: str) -> AsyncIterator[None]:
        """Waits for a slot, first one of the client's share, then one of all.

        Args:
            client: a token's name, or a host where there are no tokens.
        """
        me = object()
        share, calls = self._own.setdefault(client, (asyncio.Semaphore(self._limits.max_fetches_per_client), set()))
        calls.add(me)
        try:
            async with share:
                self._waiting += 1
                try:
                    await self._all.acquire()
                finally:
                    self._waiting -= 1
                try:
                    yield
                finally:
                    self._all.release()
        finally:
            calls.discard(me)
            if not calls:
                self._own.pop(client, None)

    def check(self, sent_bytes: int, elapsed_s: float) -> None:
        """A slot is kept while nobody else needs it, or by whoever reads fast enough.

        Args:
            sent_bytes: of this download so far.
            elapsed_s: since it had its slot.

        Raises:
            LimitError: too slow while others wait; the client goes on later from where it is.
        """
        paid_s = self._limits.write_s + sent_bytes / self._limits.min_fetch_bytes_per_s
        if self._waiting and elapsed_s > paid_s:
            raise LimitError(
                f"others wait, and {sent_bytes} bytes in {elapsed_s:.0f} s is too slow; fetch the rest later", retryable=True
            )


def chunks(model: Model, wanted_sha256: str, have: Sequence[pb.PartOffset]) -> Iterator[pb.BundleChunk]:
    """The manifest, then what the client lacks of every device file.

    Args:
        model: as it is held in memory; a change on disk does not reach a fetch under way.
        wanted_sha256: the bundle the client asks for; empty: whatever is held.
        have: prefixes the client holds already.

    Raises:
        VersionMismatchError: another bundle is held.
        ProtocolError: an offset lies outside its file, or the file is not of the device part.
    """
    if wanted_sha256 and wanted_sha256 != model.sha256:
        raise VersionMismatchError(
            f"bundle {wanted_sha256[:12]} of {model.name!r} is not held here; the server's is {model.sha256[:12]}"
        )
    offsets = _offsets(model, have)
    yield pb.BundleChunk(manifest_json=model.manifest_json)
    for path, data in model.device_files.items():
        for offset in range(offsets.get(path, 0), len(data), CHUNK_BYTES):
            yield pb.BundleChunk(part=pb.PartChunk(path=path, offset=offset, data=data[offset : offset + CHUNK_BYTES]))


def _offsets(model: Model, have: Sequence[pb.PartOffset]) -> dict[str, int]:
    if len(have) > _MAX_OFFSETS:
        raise ProtocolError(f"{len(have)} part offsets are more than a bundle has files")
    offsets = {}
    for entry in have:
        data = model.device_files.get(entry.path)
        if data is None:
            raise ProtocolError(f"the device part of {model.name!r} has no file {entry.path[:200]!r}")
        if entry.offset > len(data):
            raise ProtocolError(f"{entry.path!r} has {len(data)} bytes; offset {entry.offset} lies beyond its end")
        offsets[entry.path] = entry.offset
    return offsets
