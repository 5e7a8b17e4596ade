"""What an ONNX file's inputs take: a picture, the picture before it, a clip, or arrays that somebody gives as they are.

Which, their shapes say where they can; else the person who cuts does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from protos.errors import ConfigError, ModelError
from splitters.cutting.onnx.runtime import Arrays

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}
IMAGE, PREVIOUS = "image", "previous"  # what a head's inputs are called; others keep the file's name
Role = Literal["picture", "previous", "clip", "raw"]
ROLES: tuple[Role, ...] = ("picture", "previous", "clip", "raw")
Feed = Mapping[str, np.ndarray[Any, Any]]
"""What a head is given: ``image`` (1, 3, h, w), or (1, T, 3, h, w) of a clip; ``previous``; others as the file takes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The input that takes the picture, or a clip of pictures.

    Attributes:
        name: in the user's file; empty: the model takes none.
        dtype: its element type.
        channels_last: whether it is (N, H, W, C) rather than (N, C, H, W).
        channels: 3, or 1 for grey.
        size_px: (height, width).
        frames: of a clip; 0: one picture.
        axes: of a clip, how (N, T, 3, h, w) is turned into the file's own order.
    """

    name: str
    dtype: ir.DataType
    channels_last: bool
    channels: int
    size_px: tuple[int, int]
    frames: int = 0
    axes: tuple[int, ...] = ()

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Of what the device gives, without the batch axis."""
        return (self.frames, 3, *self.size_px) if self.frames else (3, *self.size_px)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The input's own shape."""
        if self.frames:
            ordered = (batch, *self.head_shape)
            return tuple(ordered[axis] for axis in self.axes)
        return (batch, *self.size_px, self.channels) if self.channels_last else (batch, self.channels, *self.size_px)

    def of(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the user's file is given for an image (N, 3, h, w) float32, by the arithmetic of the head's own first nodes."""
        array = image
        if self.frames:
            array = array.transpose(self.axes)
        elif self.channels == 1:
            red, green, blue = (array[:, i : i + 1] * np.float32(weight) for i, weight in enumerate(GREY))
            array = red + green + blue
        if self.channels_last and not self.frames:
            array = array.transpose(0, 2, 3, 1)
        kind = self.dtype.numpy()
        if self.dtype.is_integer():
            array = np.rint(array)
        return np.ascontiguousarray(array.astype(kind))


GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, of R, G, B
NO_PICTURE = Picture(name="", dtype=ir.DataType.FLOAT, channels_last=False, channels=3, size_px=(8, 8))


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """An input beside the picture.

    Attributes:
        name: in the user's file.
        dtype: its element type.
        shape: of it, the batch axis of one included.
        picture: where it takes the previous picture, how.
        sample: a value to prove and to calibrate with, where none else is given.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    picture: Picture | None
    sample: np.ndarray[Any, Any] = field(repr=False, compare=False)

    @property
    def head_name(self) -> str:
        """Of the head's input."""
        return self.name if self.picture is None else PREVIOUS


def given_arrays(picture: Picture, beside: Sequence[Beside], constants: Feed, feed: Feed, copies: int) -> Arrays:
    """A file's own inputs for what a head is given, the picture so many times."""
    arrays = dict(constants)
    if picture.name:
        arrays[picture.name] = np.repeat(picture.of(feed[IMAGE]), copies, axis=0)
    for each in beside:
        arrays[each.name] = np.repeat(each.picture.of(feed[PREVIOUS]), copies, axis=0) if each.picture else feed[each.name]
    return arrays


def find_picture(
    path: object, inputs: Sequence[ir.Value], stated: tuple[int, int] | None, size_px: tuple[int, int] | None,
    roles: Mapping[str, Role],
) -> tuple[Picture, int]:  # fmt: skip
    """The input that takes the picture or the clip, and the batch (0: open).

    Raises:
        ConfigError: a role is given to an input that the file does not have, or that its shape does not allow.
        ModelError: several could take it.
    """
    names = {str(v.name) for v in inputs}
    if unknown := sorted(set(roles) - names):
        raise ConfigError(f"{path} has no input {unknown[0]!r}; it has {', '.join(sorted(names))}")
    found = [
        (value, layout) for value in inputs
        if roles.get(str(value.name), "picture") in ("picture", "clip") and (layout := _layout(value)) is not None
    ]  # fmt: skip
    asked = [f for f in found if str(f[0].name) in roles]
    fit = {str(v.name): "clip" if layout[2] else "picture" for v, layout in asked}
    if wrong := [n for n, role in roles.items() if role in ("picture", "clip") and fit.get(n) != role]:
        raise ConfigError(f"the shape of {wrong[0]!r} takes no {roles[wrong[0]]}: {_shapes(inputs)}")
    chosen = asked or found
    if len(chosen) == 2 and not asked and chosen[0][1] == chosen[1][1]:
        chosen = chosen[1:]  # of two alike the first takes the picture before
    if not chosen:
        return NO_PICTURE, 1
    if len(chosen) > 1:
        raise ModelError(
            f"{path}: one input must take the picture, {len(chosen)} may: {_shapes(inputs)}; say which with --input NAME=picture"
        )
    value, (sides, channels_last, axes) = chosen[0]
    ordered = [sides[axes.index(i)] for i in range(len(axes))] if axes else sides
    own = (ordered[-2], ordered[-1]) if axes else ((sides[1], sides[2]) if channels_last else (sides[2], sides[3]))
    size = size_px or (own if 0 not in own else stated or (own[0] or own[1], own[1] or own[0]))
    dtype = value.dtype
    if dtype is None or (dtype not in FLOATS - {ir.DataType.BFLOAT16} and not dtype.is_integer()):
        raise ModelError(f"{path}: its picture input {value.name!r} is of type {dtype}, which no picture can be given as")
    frames = (ordered[1] or FRAMES) if axes else 0
    channels = 3 if axes else sides[3] if channels_last else sides[1]
    picture = Picture(
        name=str(value.name), dtype=dtype, channels_last=channels_last, channels=channels, size_px=size, frames=frames, axes=axes
    )
    return picture, sides[0]


_Layout = tuple[list[int], bool, tuple[int, ...]]
FRAMES = 8  # of a clip whose length the file leaves open
# Where the channels of a clip lie, and how (N, T, 3, h, w) becomes that.
_CLIPS = {1: (0, 2, 1, 3, 4), 2: (0, 1, 2, 3, 4), 4: (0, 1, 3, 4, 2)}


def _layout(value: ir.Value) -> _Layout | None:
    """Sides (0: open), whether channels are last, and a clip's axes; None: the shape takes no picture."""
    if value.shape is None or value.dtype is None:
        return None
    sides = [d if isinstance(d, int) and d > 0 else 0 for d in value.shape]
    if len(sides) == 5:
        place = next((i for i in _CLIPS if sides[i] == 3), None)
        return None if place is None else (sides, place == 4, _CLIPS[place])
    if len(sides) != 4:
        return None
    if sides[1] in (1, 3):
        return sides, False, ()
    if sides[3] in (1, 3):
        return sides, True, ()
    return ([sides[0], 3, *sides[2:]], False, ()) if sides[1] == 0 else None


def _shapes(inputs: Sequence[ir.Value]) -> str:
    def dim(side: object) -> object:
        return side if isinstance(side, int) else str(side)

    return ", ".join(f"{v.name} {[dim(d) for d in v.shape] if v.shape is not None else '(no shape)'}" for v in inputs)


def stated_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """What Ultralytics writes: ``imgsz`` as ``[640, 640]``."""
    text = metadata.get("imgsz", "").strip("[]() ")
    numbers = [int(t) for t in text.replace(",", " ").split() if t.isdecimal()]
    if not numbers or not all(8 <= n <= 8192 for n in numbers):
        return None
    return (numbers[0], numbers[-1])


Known = Literal["ones", "height_width", "width_height"]
# Inputs beside the picture whose value follows from the picture's size.
_KNOWN: Mapping[str, Known] = {
    "pixel_mask": "ones", "orig_target_sizes": "width_height", "orig_size": "height_width", "im_shape": "height_width",
    "image_shape": "height_width", "scale_factor": "ones", "target_sizes": "height_width",
}  # fmt: skip


def find_beside(
    path: object, inputs: Sequence[ir.Value], picture: Picture, roles: Mapping[str, Role], example: Feed
) -> tuple[Arrays, tuple[Beside, ...], tuple[str, ...]]:
    """Inputs beside the picture: constants that follow from its size, and those given frame by frame; what was decided.

    Raises:
        ModelError: the file leaves a shape open that nothing tells.
        ConfigError: a role does not fit, or an example's shape.
    """
    constants: Arrays = {}
    beside: list[Beside] = []
    notes = []
    for value in inputs:
        name = str(value.name)
        if name == picture.name:
            continue
        role = roles.get(name)
        layout = _layout(value)
        alike = layout is not None and not layout[2] and not picture.frames and bool(picture.name)
        if role is None and name in _KNOWN and picture.name and value.dtype is not None and value.shape is not None:
            constants[name] = _known(value, _KNOWN[name], picture)
        elif role == "previous" or (role is None and alike and name not in example):
            if not alike or layout is None or value.dtype is None or any(b.picture for b in beside):
                raise ConfigError(f"{name!r} of {path} cannot take the previous picture beside {picture.name!r}: {_shapes(inputs)}")
            channels = layout[0][3] if layout[1] else layout[0][1]
            before = Picture(name=name, dtype=value.dtype, channels_last=layout[1], channels=channels, size_px=picture.size_px)
            zeros = np.zeros((1, *before.head_shape), np.float32)
            beside.append(Beside(name=name, dtype=value.dtype, shape=before.shape(1), picture=before, sample=zeros))
            notes.append(f"{name} takes the picture before {picture.name}'s (--input {name}=raw where it does not)")
        else:
            beside.append(_raw(path, value, example.get(name)))
            if name not in example:
                notes.append(f"{name} is given as it is, and nothing tells of what kind: noise proves the cut (--example FILE.npz)")
    return constants, tuple(beside), tuple(notes)


def _raw(path: object, value: ir.Value, example: np.ndarray[Any, Any] | None) -> Beside:
    name = str(value.name)
    if value.dtype is None or value.shape is None or value.dtype.name not in _RAW:
        raise ModelError(f"{path}: nothing can be given to its input {name!r} of type {value.dtype}")
    kind = value.dtype.numpy()
    sides = [d if isinstance(d, int) and d > 0 else 0 for d in value.shape]
    if example is not None:
        given = np.ascontiguousarray(example, kind)
        if given.ndim == len(sides) - 1:
            given = given[None]
        if given.ndim != len(sides) or any(s and s != g for s, g in zip(sides, given.shape, strict=True)):
            raise ConfigError(f"--example gives {name!r} as {example.shape}, {path} takes {_shapes([value])}")
        return Beside(name=name, dtype=value.dtype, shape=given.shape, picture=None, sample=given)
    shape = tuple(s or (1 if i == 0 else 0) for i, s in enumerate(sides))
    if 0 in shape:
        raise ModelError(
            f"{path} leaves the shape of its input {_shapes([value])} open: give --example FILE.npz with one value of it"
        )
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape) if value.dtype in FLOATS else np.ones(shape)
    return Beside(name=name, dtype=value.dtype, shape=shape, picture=None, sample=np.ascontiguousarray(noise.astype(kind)))


_RAW = ("FLOAT", "FLOAT16", "DOUBLE", "UINT8", "INT8", "INT16", "INT32", "INT64", "BOOL")


def _known(value: ir.Value, how: Known, picture: Picture) -> np.ndarray[Any, Any]:
    kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    if how != "ones":
        return np.asarray([picture.size_px if how == "height_width" else picture.size_px[::-1]], kind)
    sides = list(value.shape or ())
    return np.ones([d if isinstance(d, int) else (1 if i == 0 else picture.size_px[i - 1]) for i, d in enumerate(sides)], kind)
