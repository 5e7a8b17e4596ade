"""torch to ONNX, the one way this project does it: batch-dynamic, float32, checked against torch by the caller's tests."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from protos.errors import ModelError

OPSET = 20


def export_onnx(
    module: nn.Module, examples: Sequence[Tensor], path: Path, *, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Writes ``module`` as one self-contained ONNX file whose batch axis (the first of every input) is dynamic.

    Args:
        module: in eval mode, on the CPU.
        examples: one tensor per input; their batch size is immaterial.
        path: the file to write.
        inputs: names of the inputs.
        outputs: names of the outputs.

    Raises:
        ModelError: the exporter cannot express the module.
    """
    batch = torch.export.Dim("batch")
    # A batch of two: the exporter would take a batch of one for a constant.
    pair = tuple(torch.cat([x[:1], x[:1]]).contiguous() for x in examples)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, pair, dynamo=True, opset_version=OPSET, input_names=list(inputs), output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in pair), optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds; all mean the same to the caller
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    if program is None:
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX: the exporter returned nothing")
    program.save(str(path), external_data=False)
