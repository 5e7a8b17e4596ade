"""Bundles on nodes that nobody has copied them to: fetched by hash from the cluster's register, verified, kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from edge_server.backends.ray.register import Files
from protos.errors import BundleError, StorageError, UnknownModelError
from splitters.bundle import POINTS, Bundle, cache_dir, open_bundle
from splitters.bundle.manifest import MANIFEST, check_part_path

_KEPT = 16  # of the bundles that a node fetched, those used last


def files_of(bundle: Bundle) -> Files:
    """Everything a bundle consists of, as it lies in its directory now.

    Raises:
        BundleError: it was altered since it was opened.
    """
    names = {MANIFEST, POINTS, *(part.path for part in bundle.manifest.parts)}
    opened = open_bundle(bundle.path)
    if opened.sha256 != bundle.sha256:
        raise BundleError(f"{bundle.path} was replaced while it was read; try again")
    return {name: (bundle.path / name).read_bytes() for name in sorted(names)}


async def obtained(path: str, sha256: str, fetch: Callable[[str], Awaitable[Files | None]]) -> Bundle:
    """A bundle on this node: from its directory where that holds it, from the cache, or fetched.

    Args:
        path: its directory on the door's machine.
        sha256: which bundle it must be.
        fetch: gives its files; None: nobody has them.

    Raises:
        UnknownModelError: it cannot be had.
        BundleError: what was fetched is not that bundle.
        StorageError: this node cannot keep it.
    """
    if (found := _held(Path(path), sha256)) is not None:
        return found
    kept = cache_dir() / "tails" / sha256
    if (found := _held(kept, sha256)) is not None:
        os.utime(kept)
        return found
    files = await fetch(sha256)
    if files is None:
        raise UnknownModelError(f"bundle {sha256[:12]} is neither at {path} on this node nor with the cluster's register")
    try:
        _write(kept, files, sha256)
    except OSError as error:
        raise StorageError(f"cannot keep bundle {sha256[:12]} at {kept}: {error.strerror}; HEADTAIL_CACHE names a place") from error
    _forget_old(kept.parent)
    return open_bundle(kept)


def _held(path: Path, sha256: str) -> Bundle | None:
    try:
        bundle = open_bundle(path)
    except (BundleError, OSError):
        return None
    return bundle if bundle.sha256 == sha256 else None


def _write(place: Path, files: Files, sha256: str) -> None:
    """All of it or nothing, also where another replica of this node does the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        for name, data in files.items():
            if name != MANIFEST:
                check_part_path(name)
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
        if open_bundle(new).sha256 != sha256:
            raise BundleError(f"what was fetched is not bundle {sha256[:12]}")
        if _held(place, sha256) is None:
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _forget_old(folder: Path) -> None:
    kept = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    for old in kept[_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
