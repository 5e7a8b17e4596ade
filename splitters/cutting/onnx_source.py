"""An ONNX file as a torch module, through onnx2torch, with shapes made constants and the batch axis freed.

onnx2torch hands shapes, sizes and slices to its modules as tensors, which no graph tracer can follow. Where they are
constants of the file, as they nearly always are, the modules are replaced by ones that hold plain numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from protos.errors import ConfigError, MissingDependencyError, ModelError, first_line
from splitters.cutting.onnx_check import check_conversion, probes

log = logging.getLogger(__name__)

PLAIN = "; a plain quantised cut needs no conversion: splitters cut onnx:FILE"
OPSET = 16  # the newest of which onnx2torch knows most operators; later files are converted down


class Reshape(nn.Module):
    """Reshape to constant numbers; 0 keeps the input's own side."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(…) → ``shape``."""
        return x.reshape([x.shape[i] if side == 0 else side for i, side in enumerate(self.shape)])


class Resize(nn.Module):
    """Interpolation to a constant size, or by constant factors."""

    def __init__(self, mode: str, align_corners: bool | None, size: Sequence[int] | None, scales: Sequence[float] | None) -> None:
        super().__init__()
        self.mode, self.align_corners = mode, align_corners
        self.size, self.scales = list(size) if size else None, list(scales) if scales else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, h, w)."""
        return nn.functional.interpolate(
            x, size=self.size, scale_factor=self.scales, mode=self.mode, align_corners=self.align_corners
        )


class Slice(nn.Module):
    """Constant slices; steps are positive."""

    def __init__(self, slices: Sequence[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.slices = tuple(slices)

    def forward(self, x: Tensor) -> Tensor:
        """Takes ``start:end:step`` of each axis named."""
        for axis, start, end, step in self.slices:
            index: list[Any] = [slice(None)] * x.ndim
            index[axis] = slice(start, end, step)
            x = x[tuple(index)]
        return x


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """An ONNX file in torch's form.

    Attributes:
        module: what the file was converted to, compared with it on made-up inputs.
        example: an input (zeros; unknown sides are 224).
        said: the converter's warnings.
    """

    module: nn.Module
    example: Tensor
    said: tuple[str, ...]


def load_onnx(path: Path) -> Converted:
    """The model of an ONNX file.

    Raises:
        ConfigError: no such file, or several inputs.
        MissingDependencyError: onnx2torch is not installed.
        ModelError: no readable ONNX, an operator onnx2torch does not know, an input that is no float32 picture, or the
            conversion computes something else than ONNX Runtime does.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        from splitters.cutting import torchvision_compat

        torchvision_compat.activate()  # onnx2torch imports torchvision
        import onnx
        import onnx2torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error.name} is not installed; install the extra: pip install 'headtail[server]'") from error
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:
        raise ModelError(f"{path} is no readable ONNX model: {first_line(error)}") from error
    weights = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    if len(inputs) != 1:
        raise ConfigError(
            f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); only models of one image are cut"
        )
    sides = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    shape = [1, *(side or (3 if axis == 1 else 224) for axis, side in enumerate(sides) if axis > 0)]
    kind = inputs[0].type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        raise ModelError(
            f"{path} takes {onnx.TensorProto.DataType.Name(kind).lower()} as {inputs[0].name!r}; only float32 pictures "
            "(N, 3, height, width) are served: export the model without its conversion from other types"
        )
    module, example = _converted(path, model), torch.zeros(shape)
    check_conversion(path, module[0], probes(example), said=module[1])
    return Converted(module=module[0], example=example, said=module[1])


def _converted(path: Path, model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The torch form, and the converter's warnings, which are logged too: they are the user's to see."""
    import onnx.version_converter
    import onnx2torch

    try:
        if max(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}) > OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
        free_batch(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = onnx2torch.convert(model).eval()
            make_constant(module)
    except NotImplementedError as error:
        raise ModelError(f"{path} uses an operator that onnx2torch does not know: {first_line(error)}{PLAIN}") from error
    except Exception as error:
        raise ModelError(f"onnx2torch cannot convert {path}: {type(error).__name__}: {first_line(error)}{PLAIN}") from error
    told = (w for w in caught if not issubclass(w.category, DeprecationWarning | FutureWarning))
    said = tuple(dict.fromkeys(" ".join(str(w.message).split()) for w in told))
    for text in said:
        log.warning("%s: the converter warns: %s", path, text)
    return module, said


def free_batch(model: Any) -> None:
    """Frees a batch axis that was exported as 1: inputs, outputs, and reshapes to a constant shape that begins with 1.

    In a Reshape a 0 means "as the input", which is the batch where the first axis was the batch all along. Where it was
    not, the batch stays fixed, since the graph then fails at another batch size.
    """
    from onnx import numpy_helper

    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    known = {i.name: i for i in graph.initializer}
    known |= {n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in known:
            continue
        shape = numpy_helper.to_array(known[node.input[1]]).copy()
        literal = [a for a in node.attribute if a.name == "allowzero"]
        if 0 not in shape:
            for attribute in literal:
                node.attribute.remove(attribute)
        if shape.ndim == 1 and len(shape) > 1 and shape[0] == 1 and not (literal and 0 in shape):
            shape[0] = 0
            node.input[1] = f"{node.output[0]}_free_shape"
            graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
    del graph.value_info[:]


def make_constant(module: fx.GraphModule) -> None:
    """Replaces onnx2torch's Reshape, Resize and Slice by modules of plain numbers where their settings are constants."""
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        own = module.get_submodule(str(node.target))
        build = {"OnnxReshape": _reshape, "OnnxResize": _resize, "OnnxSlice": _slice}.get(type(own).__name__)
        if build is None:
            continue
        settings = [_constant(module, a) for a in node.args[1:]] + [_constant(module, v) for v in node.kwargs.values()]
        names = [*_ARGUMENTS[type(own).__name__][: len(node.args) - 1], *node.kwargs]
        if any(s is _UNKNOWN for s in settings):
            continue
        new = build(own, {n: s for n, s in zip(names, settings, strict=True) if s})
        if new is not None:
            module.set_submodule(str(node.target), new)
            node.args, node.kwargs = node.args[:1], {}
    module.graph.eliminate_dead_code()
    module.recompile()


_UNKNOWN = object()
_ARGUMENTS = {
    "OnnxReshape": ("shape",),
    "OnnxResize": ("roi", "scales", "sizes"),
    "OnnxSlice": ("starts", "ends", "axes", "steps"),
}


def _constant(module: fx.GraphModule, argument: Any) -> Any:
    """The numbers of a constant argument, None where there is none, ``_UNKNOWN`` where it is computed."""
    if argument is None:
        return None
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return _UNKNOWN
    value: Any = module
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value.flatten().tolist()


def _reshape(own: nn.Module, settings: dict[str, list[Any]]) -> nn.Module | None:
    del own
    return Reshape([int(s) for s in settings["shape"]])


def _resize(own: Any, settings: dict[str, list[Any]]) -> nn.Module | None:
    size, scales = settings.get("sizes"), settings.get("scales")
    if size is None and (scales is None or scales[:2] != [1, 1]):
        return None
    dimensions = len(size or scales or []) - 2
    mode = (
        own.onnx_mode
        if own.onnx_mode == "nearest"
        else {("linear", 1): "linear", ("linear", 2): "bilinear", ("cubic", 2): "bicubic"}.get((own.onnx_mode, dimensions))
    )
    if mode is None:
        return None
    return Resize(
        mode, own.align_corners, [int(s) for s in size[2:]] if size else None, scales[2:] if scales and not size else None
    )


def _slice(own: nn.Module, settings: dict[str, list[Any]]) -> nn.Module | None:
    del own
    starts, ends = settings["starts"], settings["ends"]
    axes, steps = settings.get("axes", list(range(len(starts)))), settings.get("steps", [1] * len(starts))
    if any(step <= 0 for step in steps):
        return None
    return Slice([(int(a), int(s), int(e), int(t)) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)])
