"""torch to ONNX, the one way this project does it: batch-dynamic, float32, checked against torch by the caller's tests."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protos.errors import ModelError
from splitters.bundle import BundleWriter

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
    _export(
        module, pair, path, input_names=list(inputs), output_names=list(outputs), dynamic_shapes=tuple({0: batch} for _ in pair)
    )


def write_server(
    writer: BundleWriter, tail: nn.Module, latent: Tensor, whole: nn.Module, image: Tensor, *, outputs: Sequence[str]
) -> dict[str, str]:
    """Adds the server's part: the tail, and the whole model for offloaded pictures.

    Args:
        writer: of the bundle.
        tail: in eval mode, on the CPU; takes one latent.
        latent: one of its inputs, with a batch axis.
        whole: in eval mode, on the CPU; takes one image.
        image: one of its inputs, with a batch axis.
        outputs: names of the outputs of both.

    Returns:
        The manifest's ``tail``.

    Raises:
        ModelError: the exporter cannot express one of them.
    """
    paths = {"path": "server/tail.onnx", "whole": "server/whole.onnx"}
    export_onnx(tail, [latent], writer.file(paths["path"], "server"), inputs=["latent_0"], outputs=outputs)
    export_onnx(whole, [image], writer.file(paths["whole"], "server"), inputs=["image"], outputs=outputs)
    return {"kind": "onnx", **paths}


def export_as_given(module: nn.Module, example: Any, path: Path) -> dict[str, NDArray[Any]]:
    """Writes ``module`` with the very inputs of its example: their types, their sizes, their number.

    Args:
        module: in eval mode, on the CPU.
        example: a tensor, a tuple or list of them, or a dict of keyword arguments.
        path: the file to write.

    Returns:
        The example by the names of the file's inputs.

    Raises:
        ModelError: the example is none of that, or the exporter cannot express the module.
    """
    keywords = dict(example) if isinstance(example, Mapping) else {}
    positional = () if keywords else tuple(example) if isinstance(example, tuple | list) else (example,)
    if not all(isinstance(x, Tensor) for x in (*positional, *keywords.values())):
        raise ModelError(f"the example of {type(module).__name__} must be a tensor, a tuple of tensors, or a dict of them by name")
    named = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = list(keywords) or [named[i] if i < len(named) else f"input_{i}" for i in range(len(positional))]
    _export(module, positional, path, kwargs=keywords or None, input_names=names)
    return {n: x.detach().numpy() for n, x in zip(names, (*positional, *keywords.values()), strict=True)}


def _export(module: nn.Module, given: tuple[Tensor, ...], path: Path, **settings: Any) -> None:
    """Runs the exporter quietly.

    Raises:
        ModelError: it cannot express the module.
    """
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, given, dynamo=True, opset_version=OPSET, optimize=True, verbose=False, **settings)
    except Exception as error:  # the exporter raises many kinds; all mean the same to the caller
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    if program is None:
        raise ModelError(f"{type(module).__name__} cannot be exported to ONNX: the exporter returned nothing")
    program.save(str(path), external_data=False)
