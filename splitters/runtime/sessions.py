"""The one place that opens ONNX Runtime: device, server, training and evaluation run graphs under the same settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ModelError

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger(__name__)

BOUNDED_BYTES = 1 << 30
"""What the graphs of a device may hold in tensors, all together."""

Floats = NDArray[np.float32]
Graph = Callable[[Sequence[Floats]], list[Floats]]

# Weights may be said to lie in another file, by a path; ONNX Runtime's own checks of that path came release by release.
_WEIGHTS_ELSEWHERE = re.compile(rb"\x0a(\x08|\x88\x80*\x00)location\x12")


def open_session(
    model: Path | bytes,
    *,
    threads: int = 1,
    spinning: bool = False,
    optimised: bool = True,
    of_user: bool = False,
    cuda: bool = False,
    bounded: bool = False,
) -> ort.InferenceSession:
    """Opens a model on the processor.

    Args:
        model: a file, which must carry its own weights, or a model in memory.
        threads: of ONNX Runtime; 0: as many as there are cores.
        spinning: whether threads without work keep their core. That is quicker on a server; on a small device it would take
            the core from the capture thread.
        optimised: whether operators are joined; without, two graphs of the same operators agree to the last bit.
        cuda: whether the graph runs on a GPU, where ONNX Runtime is built for one; see `has_cuda`.
        of_user: a file of the person at this machine, whose weights may lie in another one.
        bounded: whether all bounded sessions of this process together have at most `BOUNDED_BYTES` for their tensors: a run that
            wants more fails. A graph from a server may be modest on every picture but one.

    Raises:
        BundleError: it is no model that ONNX Runtime can run.
    """
    import onnxruntime as ort

    if isinstance(model, Path) and not of_user:
        try:
            elsewhere = _WEIGHTS_ELSEWHERE.search(model.read_bytes())
        except OSError as error:
            raise BundleError(f"cannot read {model}: {error.strerror}") from error
        if elsewhere:
            raise BundleError(f"{model} keeps its weights in another file; the graphs of a bundle carry their own")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file is called
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if bounded and _has_bounded_memory():
        options.add_session_config_entry("session.use_env_allocators", "1")
    providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=providers)
    except Exception as error:
        name = str(model) if isinstance(model, Path) else "the model in memory"
        raise BundleError(f"{name} is no ONNX model that can be run: {error}") from error


@cache
def _has_bounded_memory() -> bool:
    """Makes the memory that bounded sessions share, once in a process; False where somebody else has made a shared one."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    memory = binding.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, binding.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"max_mem": BOUNDED_BYTES}))
    except Exception:  # noqa: BLE001 - ONNX Runtime's own are of many kinds
        log.warning("another part of this process has set up ONNX Runtime's shared memory: that of a model's graphs is not bounded")
        return False
    return True


def has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed runs graphs on a GPU (the package onnxruntime-gpu)."""
    import onnxruntime as ort

    return "CUDAExecutionProvider" in ort.get_available_providers()


def open_graph(
    path: Path,
    *,
    threads: int = 1,
    spinning: bool = False,
    cuda: bool = False,
    bounded: bool = False,
    options: ort.RunOptions | None = None,
) -> Graph:
    """Opens an ONNX file as a function from its inputs, in order, to its outputs.

    Args:
        path: the file.
        threads: of ONNX Runtime.
        spinning: see `open_session`.
        cuda: see `open_session`.
        bounded: see `open_session`.
        options: of every run; its ``terminate`` ends one that is under way.

    Raises:
        BundleError: the file is no model that ONNX Runtime can run.
        ModelError: (the function) a run failed.
    """
    session = open_session(path, threads=threads, spinning=spinning, cuda=cuda, bounded=bounded)
    names = [i.name for i in session.get_inputs()]

    def run(arrays: Sequence[Floats]) -> list[Floats]:
        try:
            outputs: list[Floats] = session.run(None, dict(zip(names, arrays, strict=True)), options)
        except Exception as error:
            raise ModelError(f"{path.name} failed on its input: {error}") from error
        return outputs

    return run
