"""What a bundle's ``manifest.json`` says, as frozen dataclasses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, cast

from protos.errors import BundleError

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 8 << 20
MAX_PART_BYTES = 2 << 30
MAX_PARTS = 1024
MAX_PATH_CHARS = 200
MAX_PATH_DEPTH = 4
MANIFEST = "manifest.json"
_PATH = re.compile(r"[A-Za-z0-9._+=/-]+")

Task = Literal["classification", "detection"]
Side = Literal["device", "server"]


def check_part_path(path: str) -> str:
    """Returns ``path`` when it is a safe relative one.

    Raises:
        BundleError: absolute, empty, with ``..`` or unusual characters, too deep or too long: it could leave the bundle
            or not be stored; or it is the manifest's own name.
    """
    pure = PurePosixPath(path)
    unsafe = not _PATH.fullmatch(path) or pure.is_absolute() or any(p.strip(".") == "" for p in pure.parts)
    if unsafe or str(pure) != path or len(path) > MAX_PATH_CHARS or len(pure.parts) > MAX_PATH_DEPTH:
        raise BundleError(
            f"part path {path[:MAX_PATH_CHARS]!r} is not a plain relative path: letters, digits and ._+=- only, "
            f"at most {MAX_PATH_DEPTH} levels and {MAX_PATH_CHARS} characters"
        )
    if path.lower() == MANIFEST:
        raise BundleError(f"a part may not be called {path}: that is the manifest's own name")
    return path


def check_parts(parts: Sequence[Part]) -> None:
    """Parts together fit on a disk, and none is in the way of another, also where a disk knows no capital letters.

    Raises:
        BundleError: too many, one path twice, or one that is a directory of another.
    """
    if len(parts) > MAX_PARTS:
        raise BundleError(f"the manifest lists {len(parts)} parts; at most {MAX_PARTS} are allowed")
    files = {p.path.lower() for p in parts}
    if len(files) != len(parts):
        raise BundleError("manifest.json lists the same part twice")
    for part in parts:
        for directory in PurePosixPath(part.path.lower()).parents:
            if str(directory) in files:
                raise BundleError(f"part {part.path!r} lies in a directory that is a part itself")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of a bundle.

    Attributes:
        path: relative, '/' separated.
        sha256: lower-case hex of the file's bytes.
        bytes: its size.
        side: ``device`` parts are fetched by clients (servers hold them too); ``server`` parts never leave the server.
    """

    path: str
    sha256: str
    bytes: int
    side: Side

    def __post_init__(self) -> None:
        check_part_path(self.path)
        if self.side not in ("device", "server") or not 0 <= self.bytes <= MAX_PART_BYTES:
            raise BundleError(f"part {self.path!r}: side must be device or server and bytes 0..{MAX_PART_BYTES}")
        if len(self.sha256) != 64 or any(c not in "0123456789abcdef" for c in self.sha256):
            raise BundleError(f"part {self.path!r}: sha256 is not 64 lower-case hex digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How a captured frame becomes the model's input.

    Attributes:
        resize: ``shortest`` (short side to ``resize_px``, then centre crop), ``letterbox`` (fit inside, pad) or
            ``stretch``.
        size_px: (height, width) of the model's input.
        resize_px: short side before the crop; only for ``shortest``.
        interpolation: ``auto`` (area when shrinking, cubic when enlarging), ``area``, ``bilinear`` or ``bicubic``.
        anchor: where a letterboxed picture sits, ``top_left`` or ``centre``.
        pad: value 0..255 of the letterbox border.
        mean, std: per channel, in units of 0..1 pixel values: ``(pixel / 255 - mean) / std``.
        channel_order: ``rgb`` or ``bgr``.
    """

    resize: Literal["shortest", "letterbox", "stretch"]
    size_px: tuple[int, int]
    resize_px: int = 0
    interpolation: Literal["auto", "area", "bilinear", "bicubic"] = "auto"
    anchor: Literal["top_left", "centre"] = "top_left"
    pad: int = 114
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        choices = {
            "resize": ("shortest", "letterbox", "stretch"), "interpolation": ("auto", "area", "bilinear", "bicubic"),
            "anchor": ("top_left", "centre"), "channel_order": ("rgb", "bgr"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BundleError(f"preprocess.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if len(self.size_px) != 2 or not all(8 <= s <= 8192 for s in self.size_px):
            raise BundleError(f"preprocess.size_px must be (height, width), 8..8192 each, got {self.size_px}")
        if self.resize == "shortest" and self.resize_px < max(self.size_px):
            raise BundleError("preprocess.resize_px must be at least the larger side of size_px for resize=shortest")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise BundleError("preprocess.mean and .std need three numbers each, std positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The device's graphs: the stem always runs; an operating point's ``graphs`` are run on its output and summed."""

    stem: str
    graphs: Mapping[str, str] = field(default_factory=dict)
    prefilter: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A whole model for the device, for when no server answers.

    ONNX; input ``image``; output ``logits`` (N, classes), or ``boxes`` (N, K, 4) xyxy in input pixels and ``scores``
    (N, K, classes) before non-maximum suppression. ``accuracy`` is 0..1 in ``accuracy_metric``, 0 where not measured.
    """

    path: str
    preprocess: Preprocess
    accuracy: float = 0.0
    accuracy_metric: str = "unmeasured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole manifest. ``tail``, ``postprocess`` and ``provenance`` are read by those who use them.

    Attributes:
        labels: class id to name; COCO category ids for COCO detectors.
        latent_shape: of each latent tensor, without the batch axis.
        tail: ``{"kind": "onnx", "path"}`` or ``{"kind": "torch", "factory", "weights", ...}``.
    """

    name: str
    task: Task
    preprocess: Preprocess
    parts: tuple[Part, ...]
    labels: Mapping[int, str]
    latent_shape: tuple[tuple[int, ...], ...]
    head: Head
    codec: str
    tail: Mapping[str, Any]
    local: LocalModel | None = None
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    licence: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def part(self, path: str) -> Part:
        """The part at ``path``.

        Raises:
            BundleError: the manifest lists no such part.
        """
        for part in self.parts:
            if part.path == path:
                return part
        raise BundleError(f"bundle {self.name!r} lists no part {path!r}")

    def device_parts(self) -> tuple[Part, ...]:
        """What a client needs."""
        return tuple(p for p in self.parts if p.side == "device")

    def to_json(self) -> str:
        """Canonical text: the same manifest always gives the same bytes, hence the same hash."""
        data = asdict(self)
        data["labels"] = {str(k): v for k, v in sorted(self.labels.items())}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads and checks ``manifest.json``.

    Raises:
        BundleError: too large, not JSON, of another format version, or a field missing, unknown or out of range.
    """
    if len(text) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest.json has {len(text)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BundleError(f"manifest.json is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BundleError("manifest.json must be an object")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(f"the bundle has format version {version!r}, this headtail reads {FORMAT_VERSION}; export it again")
    try:
        return _build(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BundleError(f"manifest.json cannot be read: {type(error).__name__}: {error}") from error


def parse_preprocess(data: Mapping[str, Any]) -> Preprocess:
    """What ``dataclasses.asdict`` made of a ``Preprocess``, or JSON of that."""
    sequences = {k: tuple(data[k]) for k in ("size_px", "mean", "std") if k in data}
    return Preprocess(**{**data, **sequences})


def _build(data: dict[str, Any]) -> Manifest:
    local = data.get("local")
    data = {
        **data,
        "preprocess": parse_preprocess(data["preprocess"]),
        "parts": tuple(Part(**p) for p in data["parts"]),
        "labels": {int(k): str(v) for k, v in data["labels"].items()},
        "latent_shape": tuple(tuple(int(d) for d in shape) for shape in data["latent_shape"]),
        "head": Head(**data["head"]),
        "local": LocalModel(**{**local, "preprocess": parse_preprocess(local["preprocess"])}) if local else None,
    }
    if data["task"] not in ("classification", "detection"):
        raise BundleError(f"task must be classification or detection, got {data['task']!r}")
    manifest = Manifest(**cast("Any", data))
    check_parts(manifest.parts)
    named = [manifest.head.stem, *manifest.head.graphs.values(), manifest.codec, "operating_points.json"]
    named += [p for p in (manifest.head.prefilter, manifest.local.path if manifest.local else None) if p]
    for path in named:
        if manifest.part(path).side != "device":
            raise BundleError(f"part {path!r} is needed on the device but is not marked side=device")
    return manifest
