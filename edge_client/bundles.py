"""The client's bundles: fetched once, verified, kept by hash under ``cache_dir()/bundles``; a second start fetches nothing.

Parts arrive into ``.partial-<hash>`` and are resumed from where they stopped. ``servers.json`` remembers which bundle
each server last gave for each model, so that a device starts although no server answers.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_client.rpc import Endpoint, open_channel, stub, translated
from protos.errors import BundleError, ProtocolError, StorageError, UnknownModelError, UnreachableError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import CHUNK_BYTES, PROTOCOL_VERSION, bundle_hash
from splitters.bundle import MANIFEST, Bundle, cache_dir, open_bundle, verify_part
from splitters.bundle.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest

log = logging.getLogger(__name__)

MAX_DEVICE_BYTES = 1 << 30
Pace = Callable[[], Awaitable[None]]


class BundleStore:
    """Bundles on this device's disk."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir()
        self._bundles = self.root / "bundles"
        self._memory = self.root / "servers.json"

    def path(self, sha256: str) -> Path:
        """Where the bundle of that hash lies, if it does.

        Raises:
            ProtocolError: it is no hash, and could name any place of the disk.
        """
        return self._bundles / bundle_hash(sha256)

    def open(self, sha256: str) -> Bundle | None:
        """The bundle, verified; None where it is absent. One that was altered is moved away, with a warning."""
        path = self.path(sha256)
        if not path.is_dir():
            return None
        try:
            bundle = open_bundle(path, side="device")
            if bundle.sha256 != sha256:
                raise BundleError(f"{path / MANIFEST} was altered")
        except BundleError as error:
            log.warning("the cached bundle is unusable and will be fetched again: %s", error.message)
            shutil.rmtree(path, ignore_errors=True)
            return None
        return bundle

    def remembered(self, server: str, model: str) -> str | None:
        """Hash of the bundle this server last gave for this model name ("": its default)."""
        value = self._read_memory().get(f"{server} {model}")
        try:
            return bundle_hash(value) if isinstance(value, str) else None
        except ProtocolError:
            return None

    def remember(self, server: str, model: str, sha256: str) -> None:
        """Keeps it for the next start; a full disk is no reason to stop."""
        memory = self._read_memory() | {f"{server} {model}": sha256}
        temporary = self._memory.with_name(f".servers.{os.getpid()}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(memory, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._memory)
        except OSError as error:
            log.warning("cannot remember the bundle in %s: %s", self._memory, error.strerror)

    def _read_memory(self) -> dict[str, Any]:
        try:
            data = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    @contextmanager
    def partial(self, sha256: str) -> Iterator[Path]:
        """A directory to receive into; of its own where another client of this device receives the same bundle."""
        shared = self.path(sha256).with_name(f".partial-{sha256}")
        self._bundles.mkdir(parents=True, exist_ok=True)
        with (self._bundles / f".lock-{sha256}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory = shared
            except BlockingIOError:
                directory = shared.with_name(f"{shared.name}-{os.getpid()}")
            directory.mkdir(exist_ok=True)
            yield directory
            if directory != shared:
                shutil.rmtree(directory, ignore_errors=True)

    def adopt(self, directory: Path, sha256: str) -> Bundle:
        """Moves a complete directory into place.

        Raises:
            BundleError: it is not the bundle of that hash; the directory is removed.
        """
        target = self.path(sha256)
        try:
            if open_bundle(directory, side="device").sha256 != sha256:
                raise BundleError(f"what the server sent is not the bundle {sha256[:12]} that was asked for")
        except BundleError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        if target.is_dir():
            shutil.rmtree(directory, ignore_errors=True)
        else:
            directory.rename(target)
        return open_bundle(target, side="device")


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
    if cached := store.open(sha256):
        return cached
    try:
        with store.partial(sha256) as directory:
            await _receive(endpoint, directory, model, sha256, pace, idle_timeout_s)
            bundle = store.adopt(directory, sha256)
    except OSError as error:
        # Not again in half a second: what is here is kept, and a later start goes on from it.
        raise StorageError(
            f"cannot store the bundle under {store.root}: {error.strerror}; HEADTAIL_CACHE names another place", retryable=False
        ) from error
    log.info("fetched bundle %s (%s)", bundle.manifest.name, sha256[:12])
    return bundle


async def _receive(endpoint: Endpoint, directory: Path, model: str, sha256: str, pace: Pace | None, idle_timeout_s: float) -> None:
    held = _offsets(directory)
    have = [pb.PartOffset(path=p, offset=n) for p, n in held.items()]
    request = pb.FetchBundleRequest(model=model, bundle_sha256=sha256, have=have)
    with translated(endpoint):
        async with open_channel(endpoint) as channel:
            call = stub(channel).FetchBundle(request, metadata=endpoint.metadata)
            receiver = _Receiver(directory, sha256, held)
            try:
                while True:
                    async with asyncio.timeout(idle_timeout_s):
                        chunk = await call.read()
                    if not isinstance(chunk, pb.BundleChunk):
                        break
                    receiver.take(chunk)
                    if pace is not None:
                        await pace()
            except TimeoutError:
                raise BundleError(f"the server at {endpoint.address} stopped sending the bundle; it is resumed next time") from None
    receiver.finish()


def _offsets(directory: Path) -> dict[str, int]:
    """What an earlier attempt left, by the manifest it left; no manifest: begin anew."""
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
    """Writes chunks where they belong and nowhere else."""

    def __init__(self, directory: Path, sha256: str, held: dict[str, int]) -> None:
        self._dir = directory
        self._sha256 = sha256
        self._held = dict(held)
        self._manifest: Manifest | None = None

    def take(self, chunk: pb.BundleChunk) -> None:
        """Stores one chunk.

        Raises:
            ProtocolError: out of order, or not of this bundle.
            BundleError: larger than the manifest says.
        """
        which = chunk.WhichOneof("content")
        if self._manifest is None:
            if which != "manifest_json":
                raise ProtocolError("a bundle must begin with its manifest")
            if len(chunk.manifest_json) > MAX_MANIFEST_BYTES or hashlib.sha256(chunk.manifest_json).hexdigest() != self._sha256:
                raise BundleError(f"the manifest that arrived is not that of bundle {self._sha256[:12]}")
            self._manifest = parse_manifest(chunk.manifest_json)
            if sum(p.bytes for p in self._manifest.device_parts()) > MAX_DEVICE_BYTES:
                raise BundleError(f"the bundle's device part is larger than {MAX_DEVICE_BYTES} bytes")
            (self._dir / MANIFEST).write_bytes(chunk.manifest_json)
            return
        if which != "part":
            raise ProtocolError("a bundle has one manifest")
        part = self._manifest.part(chunk.part.path)
        have = self._held.get(part.path, 0)
        if part.side != "device" or chunk.part.offset != have or len(chunk.part.data) > CHUNK_BYTES:
            raise ProtocolError(f"part {part.path!r} arrives out of order or is not for the device")
        if have + len(chunk.part.data) > part.bytes:
            raise BundleError(f"part {part.path!r} is longer than the manifest says")
        file = self._dir / part.path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab" if have else "wb") as out:
            out.write(chunk.part.data)
        self._held[part.path] = have + len(chunk.part.data)

    def finish(self) -> None:
        """Verifies every part; a bad one is removed, so that the next attempt fetches it whole.

        Raises:
            BundleError: a part is short or altered.
        """
        if self._manifest is None:
            raise ProtocolError("the server sent no manifest")
        for part in self._manifest.device_parts():
            if part.bytes == 0 and not (self._dir / part.path).exists():
                (self._dir / part.path).parent.mkdir(parents=True, exist_ok=True)
                (self._dir / part.path).touch()
            try:
                verify_part(self._dir, part)
            except BundleError:
                file = self._dir / part.path
                if file.is_file() and file.stat().st_size >= part.bytes:
                    file.unlink()
                raise
