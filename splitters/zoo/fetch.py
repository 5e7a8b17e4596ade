"""Brings published weights to this machine: from a file, a folder, a mirror or their own address; resumed, verified.

Whatever the other side sends is bounded by the size that the table states, and nothing is kept under the file's name before
its sha256 was seen to be right. A download that stops goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from protos.errors import BundleError, ConfigError, StorageError, UnreachableError
from splitters.bundle import cache_dir, sha256_file
from splitters.bundle.draft import alone
from splitters.zoo.published import Published

log = logging.getLogger(__name__)

MIRROR_VARIABLE, WEIGHTS_VARIABLE = "HEADTAIL_MIRROR", "HEADTAIL_WEIGHTS"
STALL_S = 30.0  # without a byte
MIN_BYTES_PER_S = 1024  # averaged over the whole download: a trickle ends as well
_CHUNK = 1 << 16
_PARTIAL = 206

Progress = Callable[[int, int], None]


def fetch(
    wanted: Published, *, weights: Path | None = None, mirror: str = "", progress: Progress | None = None, keep: bool = False
) -> Path:
    """Returns the path of the verified file; downloaded unless it is here already.

    Args:
        wanted: which one.
        weights: the file itself, or a folder that holds it; empty: ``$HEADTAIL_WEIGHTS``.
        mirror: address under which ``repository/commit/path`` lies; empty: ``$HEADTAIL_MIRROR``, else the publisher's own.
        progress: told (bytes here, bytes in all).
        keep: copy a file that was given to where later calls look, for a machine without a network.

    Raises:
        BundleError: what was given or sent is another file.
        UnreachableError: no answer, or the download stopped.
        StorageError: it cannot be kept here.
        ConfigError: the mirror is no address.
    """
    given = weights or (Path(os.environ[WEIGHTS_VARIABLE]) if os.environ.get(WEIGHTS_VARIABLE) else None)
    found = _given(wanted, given, named=weights is not None) if given is not None else None
    if found is not None and not keep:
        return found
    target = cache_dir() / "weights" / f"{wanted.sha256}{Path(wanted.path).suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target.with_suffix(".lock")):
            if target.is_file() and sha256_file(target) == wanted.sha256:
                return target
            if found is not None:
                partial = target.with_suffix(".partial")
                shutil.copyfile(found, partial)
                partial.replace(target)
            else:
                _download(wanted, _address(wanted, mirror or os.environ.get(MIRROR_VARIABLE, "")), target, progress)
    except OSError as error:
        raise StorageError(f"{wanted.name} cannot be kept at {target.parent}: {error.strerror or error}") from error
    return target


def _given(wanted: Published, place: Path, *, named: bool) -> Path | None:
    """The file among those given, by content; None: a folder that does not hold it."""
    if place.is_file():
        if sha256_file(place) == wanted.sha256:
            return place
        if named:
            raise BundleError(f"{place} is not {wanted.name}: its sha256 must be {wanted.sha256} ({wanted.address})")
        return None
    if not place.is_dir():
        raise ConfigError(f"{place} is no file and no folder; give the weights of {wanted.name}, or leave it out to fetch them")
    same_size = (f for f in sorted(place.iterdir()) if f.is_file() and f.stat().st_size == wanted.bytes)
    found = next((f for f in same_size if sha256_file(f) == wanted.sha256), None)
    if found is None and named:
        raise BundleError(f"{place} holds no file with sha256 {wanted.sha256} ({wanted.name}, {wanted.bytes} bytes)")
    return found


def _address(wanted: Published, mirror: str) -> str:
    if not mirror:
        return wanted.address
    if not mirror.startswith(("https://", "http://")):
        raise ConfigError(f"the mirror must begin with https:// or http://, got {mirror!r}")
    return f"{mirror.rstrip('/')}/{wanted.place}"


def _download(wanted: Published, address: str, target: Path, progress: Progress | None) -> None:
    partial = target.with_suffix(".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    if have > wanted.bytes:
        partial.unlink()
        have = 0
    if shutil.disk_usage(target.parent).free < wanted.bytes - have:
        raise StorageError(f"{wanted.name} needs {wanted.bytes - have} more bytes at {target.parent}, and there is no room")
    if have < wanted.bytes:
        log.info("fetching %s (%d bytes, %s) from %s", wanted.name, wanted.bytes, wanted.licence, address)
        with _open(address, have) as answer:
            resumed = answer.status == _PARTIAL
            with partial.open("ab" if resumed else "wb") as file:
                _copy(wanted, answer, file, have if resumed else 0, progress)
    if (seen := sha256_file(partial)) != wanted.sha256:
        partial.unlink()
        raise BundleError(
            f"what {address} sent is not {wanted.name}: sha256 {seen}, expected {wanted.sha256}; nothing was kept. "
            "Try another --mirror, or give the file with --weights"
        )
    partial.replace(target)


def _open(address: str, have: int) -> HTTPResponse:
    request = urllib.request.Request(address, headers={"User-Agent": "headtail"} | ({"Range": f"bytes={have}-"} if have else {}))  # noqa: S310
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=STALL_S)  # noqa: S310 - only http(s), see `_address`
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return _open(address, 0)
        raise UnreachableError(
            f"{address} answered {error.code} {error.reason}; try another --mirror, or --weights FILE"
        ) from error
    except (OSError, HTTPException) as error:
        raise UnreachableError(f"{address} cannot be reached: {_reason(error)}; give a --mirror, or --weights FILE") from error
    return answer


def _copy(wanted: Published, answer: HTTPResponse, file: IO[bytes], have: int, progress: Progress | None) -> None:
    started_s, first = time.monotonic(), have
    while have < wanted.bytes:
        try:
            chunk = answer.read1(min(_CHUNK, wanted.bytes - have))
        except (OSError, HTTPException) as error:
            raise UnreachableError(
                f"the download of {wanted.name} stopped at {have} of {wanted.bytes} bytes: {_reason(error)}"
            ) from error
        if not chunk:
            raise UnreachableError(
                f"the download of {wanted.name} ended at {have} of {wanted.bytes} bytes; the same command goes on from there"
            )
        file.write(chunk)
        have += len(chunk)
        if progress is not None:
            progress(have, wanted.bytes)
        if have - first < MIN_BYTES_PER_S * (time.monotonic() - started_s - STALL_S):
            raise UnreachableError(
                f"the download of {wanted.name} trickles: {have} of {wanted.bytes} bytes; try again, or another --mirror"
            )


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason) or type(error).__name__
