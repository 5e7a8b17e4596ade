"""An ONNX file made ready to be cut: read, its sizes fixed, its shape arithmetic folded; its numbers are left alone.

Folding is ONNX IR's and onnxscript's own, and only of integers: what depends on sizes alone becomes a constant, so that no
cut has to carry it. Weights and their quantisation stay as the file has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from protos.errors import ConfigError, ModelError, first_line
from splitters.cutting.onnx.runtime import Arrays, Session

log = logging.getLogger(__name__)

BATCH = "batch"  # how an open batch axis is called in the graph
SIZES_PX = (224, 640, 320, 416, 256, 512, 384)  # tried in turn where a file leaves its size open and does not say it
MAX_PIECE_BYTES = (2 << 30) - (1 << 20)  # protobuf's, and a bundle part's
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The input that takes the picture.

    Attributes:
        name: in the user's file.
        dtype: its element type.
        channels_last: whether it is (N, H, W, C) rather than (N, C, H, W).
        channels: 3, or 1 for grey.
        size_px: (height, width).
    """

    name: str
    dtype: ir.DataType
    channels_last: bool
    channels: int
    size_px: tuple[int, int]

    def shape(self, batch: int) -> tuple[int, ...]:
        """The input's own shape."""
        return (batch, *self.size_px, self.channels) if self.channels_last else (batch, self.channels, *self.size_px)

    def of(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the user's file is given for an image (N, 3, h, w) float32, by the arithmetic of the head's own first nodes."""
        array = image
        if self.channels == 1:
            red, green, blue = (array[:, i : i + 1] * np.float32(weight) for i, weight in enumerate(GREY))
            array = red + green + blue
        if self.channels_last:
            array = array.transpose(0, 2, 3, 1)
        kind = self.dtype.numpy()
        if self.dtype.is_integer():
            array = np.rint(array)
        return np.ascontiguousarray(array.astype(kind))


GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, of R, G, B


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxModel:
    """A file ready to be cut.

    Attributes:
        path: the file.
        graph: its graph with fixed sizes, shapes folded.
        reference: the file as it is, in ONNX Runtime without optimisation; with the size asked for where that differs.
        picture: the input that takes the picture.
        constants: further inputs, as what is fed to them.
        outputs: names, in the file's order.
        metadata: what its exporter wrote beside the graph.
        free_batch: whether the file leaves the batch open (not yet proven).
        batch: the file's own batch where it is fixed.
        copies: how many copies of a picture the graph is given: 1, or the file's batch where it runs with no other.
        notes: what was decided about it, for people.
    """

    path: Path
    graph: ir.Model
    reference: Session
    picture: Picture
    constants: Mapping[str, np.ndarray[Any, Any]]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]
    free_batch: bool
    batch: int
    copies: int = 1
    notes: tuple[str, ...] = field(default=())

    @property
    def opset(self) -> int:
        """Of the standard operators."""
        return int(self.graph.graph.opset_imports.get("", self.graph.graph.opset_imports.get("ai.onnx", 1)) or 1)

    def run_reference(self, image: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """The user's own file on one image (1, 3, h, w), every output; a fixed batch is filled with copies, of which one counts."""
        given = np.repeat(self.picture.of(image), self.batch, axis=0)
        outputs = self.reference.run({self.picture.name: given, **self.constants})
        return [a[:1] if self.batch > 1 and a.ndim and a.shape[0] == self.batch else a for a in outputs]


def load_onnx_model(path: Path, *, size_px: tuple[int, int] | None = None) -> OnnxModel:
    """Reads a file and makes it ready.

    Args:
        path: the file; external data lie where it says.
        size_px: (height, width) where the file's own size is not wanted, or it leaves it open.

    Raises:
        ConfigError: no such file, or a size it does not take.
        ModelError: it is no ONNX, ONNX Runtime cannot run it, or it has no input for a picture.
    """
    model = _read(path)
    model.graph.sort()
    metadata = {str(k): str(v) for k, v in model.metadata_props.items()}
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    graph = model.graph
    if not graph.outputs or not graph.inputs:
        raise ModelError(f"{path} has no {'outputs' if graph.inputs else 'inputs'}: there is nothing to cut")
    value, picture, batch = _picture(path, graph.inputs, metadata, size_px)
    free = batch == 0
    own = model.clone()
    sizes = [picture.size_px] if size_px or 0 not in picture.size_px else [(s, s) for s in SIZES_PX]
    failure: Exception | None = None
    for size in sizes:
        candidate = replace(picture, size_px=size)
        constants = _constants(path, graph.inputs, value, candidate)
        try:
            if _takes(graph, candidate, batch):
                reference = Session(path, optimised=False, what=str(path))
            else:
                _fix(own, candidate, constants, batch or 1, free=False)
                reference = Session(to_bytes(own, str(path)), optimised=False, what=str(path))
            zeros = np.zeros(candidate.shape(batch or 1), candidate.dtype.numpy())
            reference.run({candidate.name: zeros, **constants})
        except ModelError as error:
            failure = error
            continue
        notes = (f"the file leaves its input's size open; {size[0]}x{size[1]} is used (--size HxW)",) if len(sizes) > 1 else ()
        break
    else:
        if size_px is not None:
            raise ConfigError(
                f"{path} does not run at {size_px[0]}x{size_px[1]} pixels, so its size is fixed in the file; export it at that "
                f"size, or leave --size out ({first_line(failure)})"
            ) from failure
        raise failure or ModelError(f"{path} cannot be run")
    _fix(model, candidate, constants, 1, free=free)
    copies = 1
    if batch > 1:
        notes = (*notes, f"the file takes {batch} pictures at once; the bundle takes one")
        if not _runs_alone(model, candidate, constants, path):
            copies = batch
            _fix(model, candidate, constants, batch, free=False)
            notes = (
                *notes,
                f"the graph runs only with {batch}, so that each picture is worked on {batch} times: export it with a batch of one",
            )
    outputs = tuple(str(v.name) for v in graph.outputs)
    normalise(model)
    return OnnxModel(
        path=path, graph=model, reference=reference, picture=candidate, constants=constants, outputs=outputs, metadata=metadata,
        free_batch=free, batch=batch or 1, copies=copies, notes=notes,
    )  # fmt: skip


def at_batch_one(model: OnnxModel) -> OnnxModel:
    """The same file with its batch fixed at one."""
    graph = model.graph.clone()
    _fix(graph, model.picture, model.constants, 1, free=False)
    normalise(graph)
    return replace(model, graph=graph, free_batch=False)


def _runs_alone(model: ir.Model, picture: Picture, constants: Arrays, path: Path) -> bool:
    """Whether a file of a fixed batch runs with one picture."""
    try:
        alone = Session(to_bytes(model, str(path)), optimised=False, what=str(path))
        alone.run({picture.name: np.zeros(picture.shape(1), picture.dtype.numpy()), **constants})
    except ModelError:
        return False
    return True


def normalise(model: ir.Model) -> None:
    """Constants as initialisers, shapes inferred, integer arithmetic folded, what nobody reads removed, in topological order."""
    from onnxscript.optimizer import fold_constants

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    steps: tuple[Callable[[], object], ...] = (
        lambda: common.ShapeInferencePass()(model),
        lambda: fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold),
        lambda: common.RemoveUnusedNodesPass()(model),
    )
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001  (they raise many kinds on graphs they do not know, and can be left out)
            log.info("a normalising step was left out: %s", first_line(error))
    common.TopologicalSortPass()(model)


def _may_fold(node: ir.Node) -> bool | None:
    """Integers and tiny floats (factors of a resize) by the pass's own rules; other floats stay as the file computes them."""
    for value in node.outputs:
        if value.dtype is None or value.dtype in _FLOATS:
            size = int(np.prod([d for d in value.shape if isinstance(d, int)])) if value.shape is not None else 1 << 30
            if size > 16:
                return False
    return None


def _read(path: Path) -> ir.Model:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"{path} is no readable ONNX model: {first_line(error)}") from error
    try:
        ir.external_data.load_to_model(model)
    except Exception as error:
        raise ModelError(
            f"the weights of {path} lie in a file of their own that cannot be read: {first_line(error)}; it belongs beside "
            "the model"
        ) from error
    if not model.graph.num_nodes():
        raise ModelError(f"{path} holds no operators: it is no ONNX model, or an empty one")
    return model


def to_bytes(model: ir.Model, what: str) -> bytes:
    """The model as one file.

    Raises:
        ModelError: it has more than 2 GB, which neither protobuf nor a bundle's part takes.
    """
    try:
        data: bytes = ir.to_proto(model).SerializeToString()
    except Exception as error:
        raise ModelError(f"{what} is too large for one ONNX file (2 GB): {first_line(error)}") from error
    if len(data) > MAX_PIECE_BYTES:
        raise ModelError(f"{what} is too large for one ONNX file (2 GB)")
    return data


def _takes(graph: ir.Graph, picture: Picture, batch: int) -> bool:
    """Whether the file as it is takes a picture of that size."""
    value = next(v for v in graph.inputs if v.name == picture.name)
    sides = list(value.shape or ())
    return all(not isinstance(d, int) or d <= 0 or d == want for d, want in zip(sides, picture.shape(batch or 1), strict=True))


def _picture(
    path: Path, inputs: Sequence[ir.Value], metadata: Mapping[str, str], size_px: tuple[int, int] | None
) -> tuple[ir.Value, Picture, int]:
    """The one input of rank 4 with 1 or 3 channels, and the batch (0: open)."""
    found: list[tuple[ir.Value, list[int], bool]] = []
    for value in inputs:
        if value.shape is None or len(value.shape) != 4 or value.dtype is None:
            continue
        sides = [d if isinstance(d, int) and d > 0 else 0 for d in value.shape]
        if sides[1] in (1, 3):
            found.append((value, sides, False))
        elif sides[3] in (1, 3):
            found.append((value, sides, True))
        elif sides[1] == 0:
            found.append((value, [sides[0], 3, *sides[2:]], False))
    if len(found) != 1:
        shapes = ", ".join(f"{v.name} {list(map(_dim, v.shape)) if v.shape is not None else '(no shape)'}" for v in inputs)
        raise ModelError(
            f"{path}: one input must take a picture, (N, 3, H, W) or (N, H, W, 3); "
            f"{len(found) or 'none'} of its inputs {'do' if len(found) > 1 else 'does'}: {shapes}"
        )
    value, sides, last = found[0]
    own = (sides[1], sides[2]) if last else (sides[2], sides[3])
    stated = _stated_size(metadata)
    size = size_px or (own if 0 not in own else stated or (own[0] or own[1], own[1] or own[0]))
    dtype = value.dtype
    if dtype is None or (dtype not in _FLOATS - {ir.DataType.BFLOAT16} and not dtype.is_integer()):
        raise ModelError(f"{path}: its picture input {value.name!r} is of type {dtype}, which no picture can be given as")
    picture = Picture(name=str(value.name), dtype=dtype, channels_last=last, channels=sides[3] if last else sides[1], size_px=size)
    return value, picture, sides[0]


def _dim(dim: Any) -> Any:
    return dim if isinstance(dim, int) else str(dim)


def _stated_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
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


def _constants(path: Path, inputs: Sequence[ir.Value], picture: ir.Value, spec: Picture) -> Arrays:
    found: Arrays = {}
    for value in inputs:
        if value is picture:
            continue
        name = str(value.name)
        how = _KNOWN.get(name)
        if how is None or value.dtype is None or value.shape is None:
            others = ", ".join(str(v.name) for v in inputs if v is not picture)
            raise ModelError(
                f"{path} has inputs beside the picture ({others}), and nothing says what to feed {name!r}; "
                "export it with the picture alone"
            )
        kind = value.dtype.numpy()
        if how != "ones":
            found[name] = np.asarray([spec.size_px if how == "height_width" else spec.size_px[::-1]], kind)
            continue
        sides = list(value.shape)
        shape = [d if isinstance(d, int) else (1 if i == 0 else spec.size_px[i - 1]) for i, d in enumerate(sides)]
        found[name] = np.ones(shape, kind)
    return found


def _fix(model: ir.Model, picture: Picture, constants: Mapping[str, Any], batch: int, *, free: bool) -> bool:
    """Gives every input its fixed shape (a free batch stays open); says whether that changed anything."""
    changed = False
    wanted = {picture.name: picture.shape(batch), **{name: array.shape for name, array in constants.items()}}
    for value in model.graph.inputs:
        shape: list[Any] = list(wanted[str(value.name)])
        if free:
            shape[0] = BATCH
        if value.shape is None or [_dim(d) for d in value.shape] != shape:
            value.shape = ir.Shape(shape)
            changed = True
    if changed:  # what was inferred for other sizes is not believed
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for output in node.outputs:
                output.shape = None
    return changed
