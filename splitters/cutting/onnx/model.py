"""An ONNX file made ready to be cut: read, its sizes fixed, its shape arithmetic folded; its numbers are left alone.

Folding is ONNX IR's and onnxscript's own, and only of integers: what depends on sizes alone becomes a constant, so that no
cut has to carry it. Weights and their quantisation stay as the file has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from protos.errors import ConfigError, ModelError, first_line
from splitters.bundle.manifest import Input
from splitters.cutting.onnx.inputs import (
    FLOATS,
    IMAGE,
    Beside,
    Feed,
    Picture,
    Role,
    find_beside,
    find_picture,
    given_arrays,
    stated_size,
)
from splitters.cutting.onnx.runtime import Arrays, Session

log = logging.getLogger(__name__)

BATCH = "batch"  # how an open batch axis is called in the graph
SIZES_PX = (224, 640, 320, 416, 256, 512, 384)  # tried in turn where a file leaves its size open and does not say it
MAX_PIECE_BYTES = (2 << 30) - (1 << 20)  # protobuf's, and a bundle part's


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
        beside: inputs beside the picture that are given frame by frame.
        copies: how many copies of a picture the graph is given: 1, or the file's batch where it runs with no other.
        seen: the outputs' shapes of one run.
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
    beside: tuple[Beside, ...] = ()
    copies: int = 1
    seen: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the head's inputs are called."""
        return (*((IMAGE,) if self.picture.name else ()), *(b.head_name for b in self.beside))

    def manifest_inputs(self) -> tuple[Input, ...]:
        """The head's inputs as the manifest lists them; empty: one picture."""
        if self.picture.name and not self.picture.frames and not self.beside:
            return ()
        found: list[Input] = []
        if self.picture.name:
            source: Role = "clip" if self.picture.frames else "picture"
            found.append(Input(name=IMAGE, dtype="float32", shape=(1, *self.picture.head_shape), source=source))
        for each in self.beside:
            if each.picture is not None:
                found.append(Input(name=each.head_name, dtype="float32", shape=(1, *each.picture.head_shape), source="previous"))
            else:
                found.append(Input(name=each.name, dtype=each.sample.dtype.name, shape=each.shape, source="raw"))
        return tuple(found)

    @property
    def opset(self) -> int:
        """Of the standard operators."""
        return int(self.graph.graph.opset_imports.get("", self.graph.graph.opset_imports.get("ai.onnx", 1)) or 1)

    def given(self, feed: Feed, copies: int) -> Arrays:
        """The file's own inputs for what a head is given, the picture so many times."""
        return given_arrays(self.picture, self.beside, self.constants, feed, copies)

    def run_reference(self, feed: Feed) -> list[np.ndarray[Any, Any]]:
        """The user's own file on one frame, every output; a fixed batch is filled with copies, of which one counts."""
        outputs = self.reference.run(self.given(feed, self.batch))
        return [a[:1] if self.batch > 1 and a.ndim and a.shape[0] == self.batch else a for a in outputs]

    def samples(self) -> dict[str, np.ndarray[Any, Any]]:
        """A value for each input that takes no picture."""
        return {b.name: b.sample for b in self.beside if b.picture is None}


def load_onnx_model(
    path: Path, *, size_px: tuple[int, int] | None = None, roles: Mapping[str, Role] | None = None, example: Feed | None = None
) -> OnnxModel:
    """Reads a file and makes it ready.

    Args:
        path: the file; external data lie where it says.
        size_px: (height, width) where the file's own size is not wanted, or it leaves it open.
        roles: what inputs take, by their names, where their shapes do not say it.
        example: values of inputs that take no picture; they tell shapes that the file leaves open.

    Raises:
        ConfigError: no such file, or a size it does not take.
        ModelError: it is no ONNX, ONNX Runtime cannot run it, or nothing says what an input takes.
    """
    model = _read(path)
    model.graph.sort()
    metadata = {str(k): str(v) for k, v in model.metadata_props.items()}
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    graph = model.graph
    if not graph.outputs or not graph.inputs:
        raise ModelError(f"{path} has no {'outputs' if graph.inputs else 'inputs'}: there is nothing to cut")
    picture, batch = find_picture(path, graph.inputs, stated_size(metadata), size_px, roles or {})
    own = model.clone()
    sizes = [picture.size_px] if size_px or 0 not in picture.size_px else [(s, s) for s in SIZES_PX]
    failure: Exception | None = None
    for size in sizes:
        candidate = replace(picture, size_px=size)
        constants, beside, told = find_beside(path, graph.inputs, candidate, roles or {}, example or {})
        free = batch == 0 and bool(candidate.name) and not beside and not candidate.frames
        shapes = {b.name: b.shape for b in beside}
        zeros: Arrays = {b.head_name: b.sample for b in beside} | {IMAGE: np.zeros((1, *candidate.head_shape), np.float32)}
        try:
            if _takes(graph, candidate, batch, shapes):
                reference = Session(path, optimised=False, what=str(path))
            else:
                _fix(own, candidate, constants, shapes, batch or 1, free=False)
                reference = Session(to_bytes(own, str(path)), optimised=False, what=str(path))
            seen = tuple(a.shape for a in reference.run(given_arrays(candidate, beside, constants, zeros, batch or 1)))
        except ModelError as error:
            failure = error
            continue
        notes = (f"the file leaves its input's size open; {size[0]}x{size[1]} is used (--size HxW)",) if len(sizes) > 1 else ()
        notes = (*notes, *told)
        break
    else:
        if size_px is not None:
            raise ConfigError(
                f"{path} does not run at {size_px[0]}x{size_px[1]} pixels, so its size is fixed in the file; export it at that "
                f"size, or leave --size out ({first_line(failure)})"
            ) from failure
        raise failure or ModelError(f"{path} cannot be run")
    _fix(model, candidate, constants, shapes, 1, free=free)
    copies = 1
    if batch > 1:
        notes = (*notes, f"the file takes {batch} pictures at once; the bundle takes one")
        if not _runs(model, given_arrays(candidate, beside, constants, zeros, 1), path):
            copies = batch
            _fix(model, candidate, constants, shapes, batch, free=False)
            notes = (
                *notes,
                f"the graph runs only with {batch}, so that each picture is worked on {batch} times: export it with a batch of one",
            )
    outputs = tuple(str(v.name) for v in graph.outputs)
    normalise(model)
    return OnnxModel(
        path=path, graph=model, reference=reference, picture=candidate, constants=constants, outputs=outputs, metadata=metadata,
        free_batch=free, batch=batch or 1, beside=beside, copies=copies, seen=seen, notes=notes,
    )  # fmt: skip


def at_batch_one(model: OnnxModel) -> OnnxModel:
    """The same file with its batch fixed at one."""
    graph = model.graph.clone()
    _fix(graph, model.picture, model.constants, {b.name: b.shape for b in model.beside}, 1, free=False)
    normalise(graph)
    return replace(model, graph=graph, free_batch=False)


def _runs(model: ir.Model, arrays: Arrays, path: Path) -> bool:
    """Whether a file of a fixed batch runs with one picture."""
    try:
        Session(to_bytes(model, str(path)), optimised=False, what=str(path)).run(arrays)
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
        if value.dtype is None or value.dtype in FLOATS:
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


def _takes(graph: ir.Graph, picture: Picture, batch: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the file as it is takes inputs of these sizes."""
    wanted = {**shapes, picture.name: picture.shape(batch or 1)}
    for value in graph.inputs:
        want = wanted.get(str(value.name))
        sides = list(value.shape or ())
        if want is not None and (
            len(sides) != len(want) or any(isinstance(d, int) and 0 < d != w for d, w in zip(sides, want, strict=True))
        ):
            return False
    return True


def _fix(
    model: ir.Model,
    picture: Picture,
    constants: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    batch: int,
    *,
    free: bool,
) -> bool:
    """Gives every input its fixed shape (a free batch stays open); says whether that changed anything."""
    changed = False
    wanted = {picture.name: picture.shape(batch), **{name: array.shape for name, array in constants.items()}, **shapes}
    for value in model.graph.inputs:
        shape: list[Any] = list(wanted[str(value.name)])
        if free:
            shape[0] = BATCH
        if value.shape is None or [d if isinstance(d, int) else str(d) for d in value.shape] != shape:
            value.shape = ir.Shape(shape)
            changed = True
    if changed:  # what was inferred for other sizes is not believed
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for output in node.outputs:
                output.shape = None
    return changed
