"""The client's bundles on disk: ``cache_dir()/bundles/<hash>``, parts that are still arriving in ``.partial-<hash>``.

The hash comes from a server, and so does everything in the directories. A server can therefore neither name a place outside,
nor fill the disk: bundles and partial ones together are bounded, and the ones unused for longest go first. A bundle in use is
locked (its directory, shared), by every client of this device; a locked one stays.
``servers.json`` remembers which bundle each server last gave for each model, so that a device starts although no server answers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from protos.errors import BundleError, ProtocolError, StorageError
from protos.messages import bundle_hash
from protos.schema import read_json
from splitters.bundle import Bundle, cache_dir, open_bundle
from splitters.bundle.manifest import MANIFEST

log = logging.getLogger(__name__)

MAX_BYTES = 2 << 30
MAX_ENTRIES = 16
_SPARE_BYTES = 32 << 20  # of the disk, for others
_HELD = 2  # the bundle in use, and the one that frames in flight may still belong to
_SERVERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    path: Path
    used_ns: int
    n_bytes: int


class BundleStore:
    """Bundles on this device's disk.

    Args:
        root: the cache; None: ``cache_dir()``.
        max_bytes: of all bundles and partial ones.
        max_entries: how many of them.
    """

    def __init__(self, root: Path | None = None, *, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> None:
        self.root = root or cache_dir()
        self._bundles = self.root / "bundles"
        self._memory = self.root / "servers.json"
        self._max_bytes, self._max_entries = max_bytes, max_entries
        self._held: dict[str, int] = {}  # locks of the bundles opened last, newest last
        self._receiving: dict[Path, int] = {}

    def path(self, sha256: str) -> Path:
        """Where the bundle of that hash lies, if it does.

        Raises:
            ProtocolError: it is no hash, and could name any place of the disk.
        """
        return self._bundles / bundle_hash(sha256)

    def open(self, sha256: str) -> Bundle | None:
        """The bundle, verified; None where it is absent. One that was altered is removed, with a warning."""
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
        self._hold(sha256, _lock(path, fcntl.LOCK_SH))
        with suppress(OSError):
            os.utime(path)
        return bundle

    def close(self) -> None:
        """Lets go of the bundles in use."""
        for lock in (*self._held.values(), *self._receiving.values()):
            os.close(lock)
        self._held.clear()
        self._receiving.clear()

    def _hold(self, sha256: str, lock: int | None) -> None:
        if lock is None:
            return
        if (before := self._held.pop(sha256, None)) is not None:
            os.close(before)
        self._held[sha256] = lock
        while len(self._held) > _HELD:
            os.close(self._held.pop(next(iter(self._held))))

    # ------------------------------------------------------------------ which server gave what

    def remembered(self, server: str, model: str) -> str | None:
        """Hash of the bundle this server last gave for this model name ("": its default).

        A server that has moved to another address is a server of which nothing is known; the bundle that any server gave last
        for that name then lets the device start.
        """
        memory = self._read_memory()
        known = memory.get(f"{server} {model}")
        if known is None:
            known = next((v for k, v in reversed(memory.items()) if k.partition(" ")[2] == model), None)
        return known

    def remember(self, server: str, model: str, sha256: str) -> None:
        """Keeps it for the next start; a full disk is no reason to stop."""
        memory = self._read_memory()
        memory.pop(f"{server} {model}", None)
        kept = dict([*memory.items(), (f"{server} {model}", bundle_hash(sha256))][-_SERVERS:])
        temporary = self._memory.with_name(f".servers.{os.getpid()}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._memory)
        except OSError as error:
            log.warning("cannot remember the bundle in %s: %s", self._memory, error.strerror)

    def _read_memory(self) -> dict[str, str]:
        try:
            data = read_json(self._memory.read_bytes(), dict[str, str], what=str(self._memory))
            return {key: bundle_hash(value) for key, value in data.items()}
        except (OSError, BundleError, ProtocolError):
            return {}

    # ------------------------------------------------------------------ a bundle that arrives

    @contextmanager
    def partial(self, sha256: str) -> Iterator[Path]:
        """A directory to receive into; of its own where another client of this device receives the same bundle."""
        shared = self.path(sha256).with_name(f".partial-{sha256}")
        self._bundles.mkdir(parents=True, exist_ok=True)
        shared.mkdir(exist_ok=True)
        directory, lock = shared, _lock(shared, fcntl.LOCK_EX)
        if lock is None:
            directory = shared.with_name(f"{shared.name}-{os.getpid()}")
            directory.mkdir(exist_ok=True)
            lock = _lock(directory, fcntl.LOCK_EX)
        if lock is not None:
            self._receiving[directory] = lock
        try:
            yield directory
        finally:
            if directory != shared:
                shutil.rmtree(directory, ignore_errors=True)
            with suppress(OSError):  # nothing arrived
                directory.rmdir()
            if (lock := self._receiving.pop(directory, None)) is not None:
                os.close(lock)

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
        if self.open(sha256) is None:
            directory.rename(target)
            if (lock := self._receiving.pop(directory, None)) is not None:
                os.close(lock)
        else:
            shutil.rmtree(directory, ignore_errors=True)
        bundle = self.open(sha256)
        if bundle is None:
            raise BundleError(f"bundle {sha256[:12]} cannot be kept in {self._bundles}")
        return bundle

    def make_room(self, n_bytes: int, *, beside: Path) -> None:
        """Removes bundles until one of ``n_bytes`` fits, those unused for longest first; never one in use.

        Args:
            n_bytes: still to come.
            beside: the directory it comes into.

        Raises:
            StorageError: what is left is in use, and there is no room beside it.
        """
        for old in self._bundles.glob(".lock-*"):  # of an earlier release
            old.unlink(missing_ok=True)
        entries = sorted((e for e in map(_entry, self._bundles.iterdir()) if e.path != beside), key=lambda e: e.used_ns)
        free_bytes = shutil.disk_usage(self._bundles).free - _SPARE_BYTES
        total, count = sum(e.n_bytes for e in entries), len(entries)
        for entry in entries:
            if total + n_bytes <= self._max_bytes and count < self._max_entries and n_bytes <= free_bytes:
                return
            if _removed(entry.path):
                log.info("removed %s from the cache: it was unused for longest", entry.path.name)
                total, count, free_bytes = total - entry.n_bytes, count - 1, free_bytes + entry.n_bytes
        if total + n_bytes > self._max_bytes or count >= self._max_entries:
            raise StorageError(f"the cache {self._bundles} is full of bundles in use", retryable=False)


def _lock(directory: Path, how: int) -> int | None:
    """A lock on the directory itself; None where another holds it, or the directory was replaced meanwhile."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), directory.stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _removed(path: Path) -> bool:
    lock = _lock(path, fcntl.LOCK_EX)
    if lock is None:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return not path.exists()


def _entry(path: Path) -> _Entry:
    n_bytes = 0
    for directory, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):
                n_bytes += (Path(directory) / name).stat().st_size
    try:
        used_ns = path.stat().st_mtime_ns
    except OSError:
        used_ns = 0
    return _Entry(path=path, used_ns=used_ns, n_bytes=n_bytes)
