"""What a bundle's ``manifest.json`` says, as frozen dataclasses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from protos.errors import BundleError
from protos.schema import checked, read_json
from protos.text import printable

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 8 << 20
MAX_PART_BYTES = 2 << 30
MAX_PARTS = 1024
MAX_PATH_CHARS = 200
MAX_PATH_DEPTH = 4
MAX_NAME_CHARS = 100
MAX_LABEL_CHARS = 200
MAX_LABELS = 100_000
MAX_LATENTS = 64
MAX_ELEMENTS = 1 << 26
MANIFEST = "manifest.json"
_MAX_MEAN = 1e4
_PATH = re.compile(r"[A-Za-z0-9._+=/-]+")

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
        resize: how a picture is scaled: ``shortest`` (its short side to ``resize_px``), ``letterbox`` (to fit inside a box),
            ``cover`` (to fill the box) or ``stretch`` (onto the box). What then lies outside ``size_px`` is cut off evenly on
            both sides, what is missing is padded.
        size_px: (height, width) of the model's input.
        resize_px: short side before the crop; only for ``shortest``.
        box_px: (height, width) of the box; ``size_px`` where it is None.
        interpolation: ``auto`` (area when shrinking, cubic when enlarging), ``area``, ``bilinear`` or ``bicubic``.
        resampler: whose filters. ``opencv`` is fast, and of several source pixels sees the nearest alone (but for area);
            ``pillow`` weighs all of them, as torchvision and timm do when they evaluate.
        anchor: where a letterboxed picture sits, ``top_left`` or ``centre``.
        pad: of the border, 0..255: one value, or red, green and blue.
        mean, std: per channel, in units of 0..1 pixel values: ``(pixel / 255 - mean) / std``.
        channel_order: ``rgb`` or ``bgr``.
    """

    resize: Literal["shortest", "letterbox", "cover", "stretch"]
    size_px: tuple[int, int]
    resize_px: Annotated[int, msgspec.Meta(ge=0, le=16_384)] = 0
    box_px: tuple[int, int] | None = None
    interpolation: Literal["auto", "area", "bilinear", "bicubic"] = "auto"
    resampler: Literal["opencv", "pillow"] = "opencv"
    anchor: Literal["top_left", "centre"] = "top_left"
    # Bounds are checked below: msgspec 0.22 crashes on a bounded number in a union with a fixed tuple.
    pad: int | tuple[int, int, int] = 114
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        choices = {
            "resize": ("shortest", "letterbox", "cover", "stretch"), "interpolation": ("auto", "area", "bilinear", "bicubic"),
            "anchor": ("top_left", "centre"), "channel_order": ("rgb", "bgr"), "resampler": ("opencv", "pillow"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BundleError(f"preprocess.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, size in (("size_px", self.size_px), ("box_px", self.box_px or self.size_px)):
            if not all(8 <= s <= 8192 for s in size):
                raise BundleError(f"preprocess.{name} must be (height, width), 8..8192 each, got {size}")
        if not all(0 <= v <= 255 for v in (self.pad if isinstance(self.pad, tuple) else (self.pad,))):
            raise BundleError(f"preprocess.pad must be 0..255, got {self.pad}")
        if self.resize == "shortest" and not 8 <= self.resize_px <= 8192:
            raise BundleError(f"preprocess.resize_px must be 8..8192 for resize=shortest, got {self.resize_px}")
        if not all(abs(m) <= _MAX_MEAN for m in self.mean) or not all(1 / _MAX_MEAN <= s <= _MAX_MEAN for s in self.std):
            raise BundleError(f"preprocess.mean and .std need three numbers each, at most {_MAX_MEAN:g}, std positive")


DTYPES = ("float32", "float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
MAX_INPUTS = 16
MAX_CLIP = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One input of the head, where it takes other things than one picture.

    Attributes:
        name: of the stem's input.
        dtype: NumPy's name of its element type.
        shape: with a batch axis of one; (1, 3, h, w) of a picture, (1, T, 3, h, w) of a clip.
        source: ``picture``: the frame; ``previous``: the frame before it (the first frame has itself); ``clip``: the last T frames,
            the newest last (before there are as many, the first again); ``raw``: an array that comes with the frame.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    dtype: Literal["float32", "float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"]
    shape: tuple[Annotated[int, msgspec.Meta(ge=1)], ...]
    source: Literal["picture", "previous", "clip", "raw"]

    def __post_init__(self) -> None:
        if len(self.shape) > 8 or math.prod(self.shape) > MAX_ELEMENTS:
            raise BundleError(f"input {self.name!r} has at most 8 axes and {MAX_ELEMENTS} elements")
        if self.source != "raw" and (
            len(self.shape) != (5 if self.source == "clip" else 4) or self.shape[-3] != 3 or self.dtype != "float32"
        ):
            raise BundleError(
                f"input {self.name!r} takes a {self.source}: it is float32 (1, 3, h, w), or (1, T, 3, h, w) of a clip"
            )
        if self.source == "clip" and self.shape[1] > MAX_CLIP:
            raise BundleError(f"input {self.name!r}: a clip has at most {MAX_CLIP} frames")


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
    accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    accuracy_metric: str = "unmeasured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole manifest. ``tail``, ``postprocess`` and ``provenance`` are read by those who use them.

    Attributes:
        task: what the outputs mean; see ``splitters.tasks``.
        labels: class id to name; COCO category ids for COCO detectors.
        latent_shape: of each latent tensor, without the batch axis.
        inputs: the stem's, in order; empty: one picture, made as ``preprocess`` says.
        score_min: of a detector, the score from which on boxes are shown and counted: that of the best F1, where it was measured.
            The server reports weaker ones too, from the postprocess's own ``score_min`` on.
        tail: ``{"kind": "onnx", "path"}`` or ``{"kind": "torch", "factory", "weights", ...}``.
    """

    name: str
    task: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    preprocess: Preprocess
    parts: tuple[Part, ...]
    labels: Mapping[int, str]
    latent_shape: tuple[tuple[int, ...], ...]
    head: Head
    codec: str
    tail: Mapping[str, Any]
    local: LocalModel | None = None
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    score_min: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    licence: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_CHARS:
            raise BundleError(f"a bundle's name has 1..{MAX_NAME_CHARS} characters")
        if len(self.labels) > MAX_LABELS:
            raise BundleError(f"a bundle has at most {MAX_LABELS} labels, this one {len(self.labels)}")
        if len(self.inputs) > MAX_INPUTS or len({i.name for i in self.inputs}) < len(self.inputs):
            raise BundleError(f"a bundle has at most {MAX_INPUTS} inputs, each of a name of its own")
        for each in self.inputs:
            if each.source != "raw" and tuple(each.shape[-2:]) != tuple(self.preprocess.size_px):
                raise BundleError(
                    f"input {each.name!r} has pictures of {each.shape[-2:]}, preprocess makes {self.preprocess.size_px}"
                )
        sizes = [math.prod(shape) for shape in self.latent_shape]
        if len(sizes) > MAX_LATENTS or any(n < 1 for shape in self.latent_shape for n in shape) or sum(sizes) > MAX_ELEMENTS:
            raise BundleError(f"a bundle has at most {MAX_LATENTS} latents of together at most {MAX_ELEMENTS} elements")

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
        if not self.inputs:
            del data["inputs"]
        data["labels"] = {str(k): v for k, v in sorted(self.labels.items())}
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads and checks ``manifest.json``.

    Raises:
        BundleError: too large, not JSON, of another format version, or a field missing, unknown or out of range.
    """
    raw = read_json(text, dict[str, Any], what=MANIFEST, limit=MAX_MANIFEST_BYTES)
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(f"the bundle has format version {version!r}, this headtail reads {FORMAT_VERSION}; export it again")
    manifest = checked(raw, Manifest, what=MANIFEST)
    check_parts(manifest.parts)
    named = [manifest.head.stem, *manifest.head.graphs.values(), manifest.codec, "operating_points.json"]
    named += [p for p in (manifest.head.prefilter, manifest.local.path if manifest.local else None) if p]
    for path in named:
        if manifest.part(path).side != "device":
            raise BundleError(f"part {path!r} is needed on the device but is not marked side=device")
    labels = {key: printable(label, max_chars=MAX_LABEL_CHARS) for key, label in manifest.labels.items()}
    return replace(manifest, name=printable(manifest.name), labels=labels)


def parse_preprocess(data: Mapping[str, Any]) -> Preprocess:
    """What ``dataclasses.asdict`` made of a ``Preprocess``, or JSON of that.

    Raises:
        BundleError: a field is missing, unknown or out of range.
    """
    return checked(dict(data), Preprocess, what="preprocess")
