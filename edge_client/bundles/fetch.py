"""A server's bundles: what it has, and fetching the device part, resumed where it stopped and verified.

A server may be hostile. It is given up on when it is silent, when it sends less than a few kilobytes a second, and when it
sends what does not belong to the bundle that was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from weakref import WeakValueDictionary

import grpc.aio

from edge_client.bundles.store import BundleStore
from edge_client.transport.rpc import Endpoint, open_channel, stub, translated
from protos.errors import BundleError, ProtocolError, StorageError, UnknownModelError, UnreachableError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import CHUNK_BYTES, PROTOCOL_VERSION, bundle_hash
from splitters.bundle import Bundle, verify_part
from splitters.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest

log = logging.getLogger(__name__)

MAX_DEVICE_BYTES = 1 << 30
MIN_BYTES_PER_S = 8 << 10
Pace = Callable[[], Awaitable[None]]

_ARRIVING: WeakValueDictionary[tuple[int, Path], asyncio.Lock] = WeakValueDictionary()


async def list_models(endpoint: Endpoint, *, timeout_s: float = 5.0) -> list[pb.ModelInfo]:
    """The server's models, its default first.

    Raises:
        VersionMismatchError: the server speaks another protocol version.
        HeadtailError: it cannot be reached.
    """
    with translated(endpoint):
        async with open_channel(endpoint) as channel:
            # Not gRPC's own timeout: that one is counted on the wall clock, which a device sets when it finds a time server.
            try:
                async with asyncio.timeout(timeout_s):
                    response = await stub(channel).ListModels(pb.ListModelsRequest(), metadata=endpoint.metadata)
            except TimeoutError:
                raise UnreachableError(f"what listens at {endpoint.address} did not answer as a headtail server in time") from None
    if not isinstance(response, pb.ListModelsResponse):  # gRPC gives None where bytes are no message
        raise ProtocolError(f"the server at {endpoint.address} answered with bytes that are no list of models")
    if response.protocol_version != PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"the server at {endpoint.address} speaks protocol version {response.protocol_version}, this client {PROTOCOL_VERSION}"
        )
    for info in response.models:
        bundle_hash(info.bundle_sha256)
    return list(response.models)


def choose_model(models: list[pb.ModelInfo], name: str, address: str) -> pb.ModelInfo:
    """The model called ``name``, or the server's default where ``name`` is empty.

    Raises:
        UnknownModelError: there is none; the message lists what there is.
    """
    for model in models:
        if name in ("", model.name):
            return model
    raise UnknownModelError(f"the server at {address} has no model {name!r}; it has {', '.join(m.name for m in models) or 'none'}")


async def fetch_bundle(
    endpoint: Endpoint, store: BundleStore, *, model: str, sha256: str, pace: Pace | None = None, idle_timeout_s: float = 20.0
) -> Bundle:
    """Fetches the device part of a bundle, resuming what is there, and verifies it.

    Args:
        endpoint: the server.
        store: where it is kept.
        model: its name at the server; empty: the default.
        sha256: the hash wanted; empty: whatever the server holds.
        pace: awaited after every chunk, so that frames go first.
        idle_timeout_s: longest silence of the server.

    Raises:
        ProtocolError: the hash is none.
        BundleError: what arrived is not what the manifest says.
        StorageError: it cannot be stored.
        HeadtailError: the server cannot be reached or refuses.
    """
    if not sha256:
        sha256 = choose_model(await list_models(endpoint), model, endpoint.address).bundle_sha256
    # Cameras of one process share the folder that it arrives in: one fetches, the others find it there.
    async with _under_way(store.path(sha256)):
        return store.open(sha256) or await _fetch(endpoint, store, model, sha256, pace, idle_timeout_s)


def _under_way(path: Path) -> asyncio.Lock:
    """The lock of a bundle that may be arriving in this event loop."""
    return _ARRIVING.setdefault((id(asyncio.get_running_loop()), path), asyncio.Lock())


async def _fetch(
    endpoint: Endpoint, store: BundleStore, model: str, sha256: str, pace: Pace | None, idle_timeout_s: float
) -> Bundle:  # fmt: skip
    try:
        with store.partial(sha256) as directory:
            receiver = await _receive(endpoint, _Receiver(directory, sha256, store), model, pace, idle_timeout_s)
            # Hashing a gigabyte takes seconds: not on the loop that serves the camera.
            bundle = await asyncio.to_thread(receiver.finish)
    except OSError as error:
        # Not again in half a second: what is here is kept, and a later start goes on from it.
        raise StorageError(
            f"cannot store the bundle under {store.root}: {error.strerror}; HEADTAIL_CACHE names another place", retryable=False
        ) from error
    log.info("fetched bundle %s (%s)", bundle.manifest.name, sha256[:12])
    return bundle


async def _receive(endpoint: Endpoint, receiver: _Receiver, model: str, pace: Pace | None, idle_timeout_s: float) -> _Receiver:
    have = [pb.PartOffset(path=p, offset=n) for p, n in receiver.held.items()]
    request = pb.FetchBundleRequest(model=model, bundle_sha256=receiver.sha256, have=have)
    begun_s = asyncio.get_running_loop().time()
    with translated(endpoint):
        async with open_channel(endpoint) as channel:
            call = stub(channel).FetchBundle(request, metadata=endpoint.metadata)
            try:
                while True:
                    now_s = asyncio.get_running_loop().time()
                    due_s = begun_s + idle_timeout_s + receiver.received_bytes / MIN_BYTES_PER_S
                    async with asyncio.timeout(min(idle_timeout_s, due_s - now_s)):
                        chunk = await call.read()
                    if chunk is grpc.aio.EOF:  # type: ignore[attr-defined]
                        break
                    if not isinstance(chunk, pb.BundleChunk):
                        raise ProtocolError(f"the server at {endpoint.address} sent bytes that are no piece of a bundle")
                    if chunk.WhichOneof("content") == "manifest_json":  # of megabytes, perhaps
                        await asyncio.to_thread(receiver.take, chunk)
                    else:
                        receiver.take(chunk)
                    if pace is not None:
                        await pace()
            except TimeoutError:
                raise UnreachableError(
                    f"the server at {endpoint.address} stopped sending the bundle, or sends less than {MIN_BYTES_PER_S} bytes/s; "
                    "it is resumed next time"
                ) from None
    return receiver


def _offsets(directory: Path) -> dict[str, int]:
    """What an earlier attempt left, by the manifest it left; no manifest: nothing is held."""
    try:
        manifest = parse_manifest((directory / MANIFEST).read_bytes())
    except (OSError, BundleError):
        return {}
    held = {}
    for part in manifest.device_parts():
        file = directory / part.path
        if file.is_file() and 0 < file.stat().st_size <= part.bytes:
            held[part.path] = file.stat().st_size
    return held


class _Receiver:
    """Writes chunks where they belong and nowhere else.

    Args:
        directory: to write into; what an earlier attempt left there is kept.
        sha256: of the bundle asked for.
        store: where room is made, and where the bundle ends up.
    """

    def __init__(self, directory: Path, sha256: str, store: BundleStore) -> None:
        self.sha256 = sha256
        self.held = _offsets(directory)
        self.received_bytes = 0
        self._dir = directory
        self._store = store
        self._manifest: Manifest | None = None

    def take(self, chunk: pb.BundleChunk) -> None:
        """Stores one chunk.

        Raises:
            ProtocolError: out of order, empty, or not of this bundle.
            BundleError: larger than the manifest says, or a manifest that cannot be.
        """
        which = chunk.WhichOneof("content")
        if self._manifest is None:
            if which != "manifest_json":
                raise ProtocolError("a bundle must begin with its manifest")
            self._manifest = self._begin(chunk.manifest_json)
        elif which != "part":
            raise ProtocolError("a bundle has one manifest")
        else:
            self._write(self._manifest, chunk.part)

    def _begin(self, text: bytes) -> Manifest:
        if len(text) > MAX_MANIFEST_BYTES or hashlib.sha256(text).hexdigest() != self.sha256:
            raise BundleError(f"the manifest that arrived is not that of bundle {self.sha256[:12]}")
        manifest = parse_manifest(text)
        total = sum(p.bytes for p in manifest.device_parts())
        if total > MAX_DEVICE_BYTES:
            raise BundleError(f"the bundle's device part has {total} bytes; at most {MAX_DEVICE_BYTES} are allowed")
        self._store.make_room(total + len(text), beside=self._dir)
        (self._dir / MANIFEST).write_bytes(text)
        return manifest

    def _write(self, manifest: Manifest, piece: pb.PartChunk) -> None:
        part = manifest.part(piece.path)
        have, size = self.held.get(part.path, 0), len(piece.data)
        if part.side != "device" or piece.offset != have or not 0 < size <= CHUNK_BYTES:
            raise ProtocolError(f"part {part.path!r} arrives empty or out of order, or is not for the device")
        if have + size > part.bytes:
            raise BundleError(f"part {part.path!r} is longer than the manifest says")
        file = self._dir / part.path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab" if have else "wb") as out:
            out.write(piece.data)
        self.held[part.path] = have + size
        self.received_bytes += size

    def finish(self) -> Bundle:
        """Verifies every part and keeps the bundle; a bad part is removed, so that the next attempt fetches it whole.

        Raises:
            BundleError: a part is short or altered.
        """
        if self._manifest is None:
            raise ProtocolError("the server sent no manifest")
        for part in self._manifest.device_parts():
            file = self._dir / part.path
            if part.bytes == 0 and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            try:
                verify_part(self._dir, part)
            except BundleError:
                if file.is_file() and file.stat().st_size >= part.bytes:
                    file.unlink()
                raise
        return self._store.adopt(self._dir, self.sha256)
