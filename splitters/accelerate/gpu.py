"""A torch function on a GPU in the form measured to be fastest there: as it is, in bfloat16, and either as a CUDA graph.

Nothing is on by hope: a form is taken only where it agrees with the plain one and is faster, timed on the device with its
transfers at the batch sizes that occur. Agreement is judged on random inputs: a form in float32 has to be equal within 1e-4,
one in bfloat16 within 2 % of the outputs' deviation. Host memory is pinned, so copies go beside the work.

Shape legend: arrays are batch first, float32, on the host; N frames are padded to the next size for which a graph exists.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitters.tasks.base import Floats

log = logging.getLogger(__name__)

Form = Callable[[Sequence[Floats]], list[Floats]]

TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2
SIZES = (1, 2, 4, 8, 16)
RUNS = 5


def fastest(module: nn.Module, name: str, shapes: Sequence[Sequence[int]], device: torch.device) -> Form:
    """``module.name`` on its device.

    Args:
        module: in eval mode, on the device.
        name: of the method; one tensor per shape in, a tensor or a tuple of tensors out.
        shapes: of each input, without the batch axis.
        device: of the module.
    """
    function = getattr(module, name)
    forms: dict[str, Form] = {"plain": Staged(function, device)}
    makers: dict[str, Callable[[], Form]] = {"bfloat16": lambda: Staged(in_bfloat16(function, device), device)}
    if device.type == "cuda":
        makers["graph"] = lambda: Graphed(function, shapes, device)
        makers["bfloat16 graph"] = lambda: Graphed(in_bfloat16(function, device), shapes, device)
    for label, make in makers.items():
        try:
            forms[label] = make()
        except Exception as error:  # noqa: BLE001 - whatever cannot be captured, the plain form can
            log.info(
                "%s: no form %r on %s: %s", name, label, device, str(error).splitlines()[0] if str(error) else type(error).__name__
            )
    rng = np.random.default_rng(0)
    examples = [[rng.standard_normal((n, *shape)).astype(np.float32) for shape in shapes] for n in (1, 3, 8)]
    chosen = choose(forms, examples)
    log.info("%s: runs as %r on %s", name, chosen, device)
    return forms[chosen]


def choose(forms: Mapping[str, Form], examples: Sequence[Sequence[Floats]]) -> str:
    """The fastest form that agrees with ``plain`` on every example; best times, taken in turns."""
    wanted = [forms["plain"](example) for example in examples]
    able = ["plain"]
    for label, form in forms.items():
        if label == "plain":
            continue
        tolerance = BF16_TOLERANCE if "bfloat16" in label else TOLERANCE
        try:
            agrees = all(_agree(form(example), want, tolerance) for example, want in zip(examples, wanted, strict=True))
        except Exception as error:  # noqa: BLE001 - as above
            log.info("form %r fails: %s", label, error)
            continue
        if agrees:
            able.append(label)
        else:
            log.info("form %r is another function", label)
    best = {label: [float("inf")] * len(examples) for label in able}
    for _ in range(RUNS):
        for i, example in enumerate(examples):
            for label in able:
                begun = time.perf_counter()
                forms[label](example)
                best[label][i] = min(best[label][i], time.perf_counter() - begun)
    return min(able, key=lambda label: sum(t / p for t, p in zip(best[label], best["plain"], strict=True)))


def _agree(outputs: Sequence[Floats], wanted: Sequence[Floats], tolerance: float) -> bool:
    return len(outputs) == len(wanted) and all(_near(a, b, tolerance) for a, b in zip(outputs, wanted, strict=True))


def _near(output: Floats, wanted: Floats, tolerance: float) -> bool:
    if output.shape != wanted.shape or not np.isfinite(output).all():
        return False
    scale = max(float(wanted.std()), 1e-12) if tolerance == BF16_TOLERANCE else max(1.0, float(np.abs(wanted).max(initial=0.0)))
    return float(np.abs(output - wanted).max(initial=0.0)) <= tolerance * scale


def in_bfloat16(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function under autocast: matrix products in bfloat16, what is delicate in float32."""

    def run(*tensors: Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return function(*tensors)

    return run


class Staged:
    """Copies in, runs, copies out; host buffers are pinned once per shape and used again. For one thread at a time.

    Args:
        function: on device tensors.
        device: where they are.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._pinned: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, arrays: Sequence[Floats]) -> list[Floats]:
        """Outputs on the host."""
        with torch.inference_mode():
            return to_host(self._function(*(self._sent(i, array) for i, array in enumerate(arrays))))

    def _sent(self, index: int, array: Floats) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type != "cuda":
            return host.to(self._device)
        buffer = self._pinned.get((index, *array.shape))
        if buffer is None:
            buffer = self._pinned[(index, *array.shape)] = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
        buffer.copy_(host)  # its last transfer is over: the outputs that followed it were waited for
        return buffer.to(self._device, non_blocking=True)


class Graphed:
    """The function captured as a CUDA graph per batch size of `SIZES`; larger batches go in parts. For one thread at a time.

    Args:
        function: on device tensors.
        shapes: of each input, without the batch axis.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[..., Any], shapes: Sequence[Sequence[int]], device: torch.device) -> None:
        self._hosts: dict[int, list[Tensor]] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs: dict[int, Any] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        for size in reversed(SIZES):  # the largest first: the others find its memory in the pool
            self._hosts[size] = [torch.zeros((size, *shape), pin_memory=True) for shape in shapes]
            inputs = self._inputs[size] = [host.to(device) for host in self._hosts[size]]
            with torch.inference_mode(), torch.cuda.stream(stream):
                for _ in range(3):  # libraries choose their algorithms outside of the capture
                    function(*inputs)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads use the device meanwhile: only this one's calls count as the capture's.
            with torch.inference_mode(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs[size] = function(*inputs)
            self._graphs[size] = graph

    def __call__(self, arrays: Sequence[Floats]) -> list[Floats]:
        """Outputs on the host."""
        count, most = len(arrays[0]), SIZES[-1]
        if count <= most:
            return self._replay(arrays, count)
        parts = [self._replay([a[at : at + most] for a in arrays], min(most, count - at)) for at in range(0, count, most)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _replay(self, arrays: Sequence[Floats], count: int) -> list[Floats]:
        size = padded(count)
        with torch.inference_mode():
            for host, there, array in zip(self._hosts[size], self._inputs[size], arrays, strict=True):
                host[:count].copy_(torch.from_numpy(np.ascontiguousarray(array)))
                there.copy_(host, non_blocking=True)
            self._graphs[size].replay()
            return [output[:count] for output in to_host(self._outputs[size])]


def padded(count: int) -> int:
    """The size a batch is filled up to."""
    return next(size for size in SIZES if size >= count)


def to_host(outputs: Any) -> list[Floats]:
    """Float32 arrays of their own; waits for the device."""
    tensors = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [t.float().cpu().numpy() for t in tensors]
