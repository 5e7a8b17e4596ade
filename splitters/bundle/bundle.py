"""The bundle: the directory a model is shipped as. Write, read, verify; nothing in it is ever unpickled.

``manifest.json`` names every other file with its sha256; the bundle's hash is the sha256 of ``manifest.json``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from protos.errors import BundleError, ConfigError
from protos.schema import read_json
from splitters.bundle.draft import Draft
from splitters.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    Part,
    Side,
    check_part_path,
    parse_manifest,
)
from splitters.bundle.offload import OffloadOption, dump_offloads, load_offloads
from splitters.bundle.operating_point import OperatingPoint, dump_points, load_points

POINTS = "operating_points.json"
OFFLOADS = "offloads.json"


def cache_dir() -> Path:
    """``$HEADTAIL_CACHE``, or ``~/.cache/headtail``: fetched and exported bundles, device timings.

    Raises:
        ConfigError: neither is known.
    """
    if configured := os.environ.get("HEADTAIL_CACHE"):
        return Path(configured)
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if not home.is_absolute() or os.environ.get("HOME") == "":  # which Python takes for the root directory
        raise ConfigError("this user has no home directory; HEADTAIL_CACHE names a place for bundles")
    return home / ".cache" / "headtail"


def exported_path(name: str) -> Path:
    """Where ``splitters export NAME`` writes by default and ``--model NAME`` looks."""
    return cache_dir() / "exported" / name


def sha256_hex(data: bytes) -> str:
    """Lower-case hex sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle: its directory, manifest, hash, operating points, and what was measured of offloading (nothing, mostly)."""

    path: Path
    manifest: Manifest
    sha256: str
    points: tuple[OperatingPoint, ...]
    offloads: tuple[OffloadOption, ...] = ()

    def part_path(self, path: str) -> Path:
        """The file of a listed part."""
        return self.path / self.manifest.part(path).path

    def read_part(self, path: str) -> bytes:
        """A listed part's bytes, checked against the manifest.

        Raises:
            BundleError: not listed, absent, or altered.
        """
        part = self.manifest.part(path)
        data = _read(self.path / part.path)
        if len(data) != part.bytes or sha256_hex(data) != part.sha256:
            raise BundleError(
                f"{self.path / part.path} was altered: its sha256 is not the manifest's; fetch or export the bundle again"
            )
        return data

    def point(self, point_id: int) -> OperatingPoint:
        """The operating point with that id.

        Raises:
            BundleError: there is none.
        """
        for point in self.points:
            if point.id == point_id:
                return point
        raise BundleError(f"bundle {self.manifest.name!r} has no operating point {point_id}")


def open_bundle(path: Path, *, side: Side = "server") -> Bundle:
    """Opens a bundle and verifies every part that ``side`` needs (a server needs all).

    Raises:
        BundleError: absent, truncated, altered, or of another format.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}")
    if (path / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path / MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    text = _read(path / MANIFEST)
    manifest = parse_manifest(text)
    for part in manifest.parts if side == "server" else manifest.device_parts():
        verify_part(path, part)
    offloads = load_offloads(_read(path / OFFLOADS)) if any(p.path == OFFLOADS for p in manifest.device_parts()) else ()
    points = load_points(_read(path / POINTS))
    return Bundle(path=path, manifest=manifest, sha256=sha256_hex(text), points=points, offloads=offloads)


def verify_part(root: Path, part: Part) -> None:
    """Checks one file against the manifest.

    Raises:
        BundleError: absent, of another size, or altered.
    """
    file = root / part.path
    if not file.is_file():
        raise BundleError(f"bundle part {file} is absent")
    if file.stat().st_size != part.bytes:
        raise BundleError(
            f"bundle part {file} has {file.stat().st_size} bytes, the manifest says {part.bytes}: truncated or altered"
        )
    if sha256_file(file) != part.sha256:
        raise BundleError(f"bundle part {file} was altered: its sha256 is not the manifest's")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured of a bundle.

    Attributes:
        points: its operating points.
        local: accuracy and metric of its local model; None where it has none.
    """

    points: tuple[OperatingPoint, ...]
    local: tuple[float, str] | None = None


Measure = Callable[[Bundle], Measured]
"""Measures a bundle that is written but not yet in its place."""


def _may_be_replaced(out: Path) -> bool:
    """Whether nothing is lost with ``out``: it is absent, empty, or holds a bundle and nothing else.

    Other things have a ``manifest.json``, too: browser extensions, web applications.
    """
    if not out.exists() and not out.is_symlink():
        return True
    if out.is_symlink() or not out.is_dir():
        return False
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    if not files:
        return True
    try:
        data = read_json(_read(out / MANIFEST), dict[str, Any], what=MANIFEST, limit=MAX_MANIFEST_BYTES)
        listed = {part["path"] for part in data["parts"]}
    except (BundleError, LookupError, TypeError):
        return False
    return "format_version" in data and files <= listed | {MANIFEST}


class BundleWriter:
    """Collects parts in a temporary directory beside ``out``; ``finish`` makes the bundle appear all at once.

    Used as a context manager: leaving without ``finish`` removes what was written.
    """

    def __init__(self, out: Path) -> None:
        if not _may_be_replaced(out):
            raise ConfigError(f"{out} exists and is no bundle, or holds other files than a bundle's; choose another --out")
        self._out = out
        self._draft = Draft(out)
        self._dir = self._draft.path
        self._sides: dict[str, Side] = {}

    def file(self, path: str, side: Side) -> Path:
        """Declares a part and returns where to write it before ``finish``."""
        target = self._dir / check_part_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._sides[path] = side
        return target

    def add(self, path: str, data: bytes, side: Side) -> None:
        """Adds a part."""
        self.file(path, side).write_bytes(data)

    def finish(
        self,
        *,
        points: Iterable[OperatingPoint],
        offloads: Sequence[OffloadOption] = (),
        measure: Measure | None = None,
        **fields: Any,
    ) -> Bundle:
        """Writes ``operating_points.json`` and the manifest and moves the bundle into place.

        Args:
            points: the operating points.
            offloads: measured offload options, if any.
            measure: measures the points, where they are not measured yet.
            **fields: the manifest's fields, without ``parts`` and ``format_version``.

        Raises:
            BundleError: the operating points are not measured.
        """
        self.add(POINTS, dump_points(points).encode(), "device")
        if offloads:
            self.add(OFFLOADS, dump_offloads(offloads).encode(), "device")
        parts = tuple(_describe(self._dir, path, side) for path, side in sorted(self._sides.items()))
        manifest = Manifest(parts=parts, format_version=FORMAT_VERSION, **fields)
        (self._dir / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        bundle = open_bundle(self._dir)
        if measure is not None:
            found = measure(bundle)
            bundle = rewrite_points(bundle, found.points, local=found.local)
        if any(not p.measured for p in bundle.points):
            raise BundleError(f"{self._out} is not written: its operating points were not measured, and a client chooses by them")
        self._draft.publish()
        return open_bundle(self._out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._draft.__exit__(kind, error, trace)


def _describe(root: Path, path: str, side: Side) -> Part:
    file = root / path
    return Part(path=path, sha256=sha256_file(file), bytes=file.stat().st_size, side=side)


def replace_parts(bundle: Bundle, parts: Mapping[str, bytes]) -> Bundle:
    """Writes other bytes in the place of some of a bundle's parts; its hash changes with them.

    Args:
        bundle: as it is.
        parts: path → content, of parts that the bundle has.

    Raises:
        BundleError: it has no such part.
    """
    fresh = {path: replace(bundle.manifest.part(path), sha256=sha256_hex(data), bytes=len(data)) for path, data in parts.items()}
    manifest = replace(bundle.manifest, parts=tuple(fresh.get(p.path, p) for p in bundle.manifest.parts))
    for name, data in (*parts.items(), (MANIFEST, manifest.to_json().encode())):
        temporary = bundle.path / f"{name}.new"
        temporary.write_bytes(data)
        temporary.replace(bundle.path / name)
    return open_bundle(bundle.path)


def rewrite_points(
    bundle: Bundle,
    points: Iterable[OperatingPoint],
    *,
    offloads: Sequence[OffloadOption] | None = None,
    local: tuple[float, str] | None = None,
    score_min: float | None = None,
) -> Bundle:
    """Replaces what was measured of a bundle; its hash changes with it.

    Args:
        bundle: as it is.
        points: its operating points.
        offloads: its offload options; None leaves them as they are.
        local: accuracy and metric of its local model; None leaves them.
        score_min: of a detector, the score from which on boxes are shown; None leaves it.
    """
    texts = {POINTS: dump_points(points).encode()}
    if offloads is not None:
        texts[OFFLOADS] = dump_offloads(offloads).encode()
    fresh = {name: Part(path=name, sha256=sha256_hex(text), bytes=len(text), side="device") for name, text in texts.items()}
    parts = {p.path: p for p in bundle.manifest.parts} | fresh
    manifest = replace(bundle.manifest, parts=tuple(part for _, part in sorted(parts.items())))
    if local is not None and manifest.local is not None:
        manifest = replace(manifest, local=replace(manifest.local, accuracy=local[0], accuracy_metric=local[1]))
    if score_min is not None:
        manifest = replace(manifest, score_min=round(score_min, 4))
    for name, data in (*texts.items(), (MANIFEST, manifest.to_json().encode())):
        temporary = bundle.path / f".{name}.new"
        temporary.write_bytes(data)
        temporary.replace(bundle.path / name)
    return open_bundle(bundle.path)
