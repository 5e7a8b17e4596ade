"""An ONNX file as a torch module, through onnx2torch, with its batch axis freed where that is possible."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import ConfigError, MissingDependencyError, ModelError
from splitters.cutting.checks import first_line

log = logging.getLogger(__name__)


def load_onnx(path: Path) -> tuple[nn.Module, Tensor]:
    """The model of an ONNX file, and an example input (zeros; unknown sides are 224).

    Raises:
        ConfigError: no such file, or several inputs.
        MissingDependencyError: onnx2torch is not installed.
        ModelError: no readable ONNX, or an operator onnx2torch does not know.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        from splitters.models import torchvision_compat

        torchvision_compat.activate()  # onnx2torch imports torchvision
        import onnx
        import onnx2torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error.name} is not installed; install the extra: pip install 'headtail[zoo]'") from error
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
    free_batch(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return onnx2torch.convert(model).eval(), torch.zeros(shape)
    except NotImplementedError as error:
        raise ModelError(f"{path} uses an operator that onnx2torch does not know: {first_line(error)}") from error
    except Exception as error:
        raise ModelError(f"onnx2torch cannot convert {path}: {type(error).__name__}: {first_line(error)}") from error


def free_batch(model: Any) -> None:
    """Frees a batch axis that was exported as 1: inputs, outputs, and reshapes to a constant shape that begins with 1.

    In a Reshape a 0 means "as the input", which is the batch where the first axis was the batch all along. Where it was
    not, the cut does not verify at another batch size and the batch stays fixed.
    """
    import onnx
    from onnx import numpy_helper

    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    constants = {i.name: i for i in graph.initializer}
    nodes = {n.output[0]: n for n in graph.node if n.op_type == "Constant" and n.output}
    changed = 0
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        name = node.input[1]
        tensor = (
            constants.get(name) or next((a.t for a in nodes[name].attribute if a.name == "value"), None)
            if (name in constants or name in nodes)
            else None
        )
        if tensor is None:
            continue
        shape = numpy_helper.to_array(tensor).copy()
        if shape.ndim == 1 and len(shape) > 1 and shape[0] == 1:
            shape[0] = 0
            own = f"{node.name or node.output[0]}_shape_free"
            graph.initializer.append(numpy_helper.from_array(shape, own))
            node.input[1] = own
            changed += 1
    del model.graph.value_info[:]
    log.info("freed the batch axis of %d reshapes", changed)
    del onnx
