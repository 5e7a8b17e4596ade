"""Milliseconds on each side of every cut, in ONNX Runtime and in torch, one thread.

For ONNX Runtime the whole graph is exported once with every crossing tensor as an output; each head and tail is then
cut out of that one file by name, which takes milliseconds where an export takes seconds.
"""

from __future__ import annotations

import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from protos.errors import ModelError, first_line
from splitters.cutting.checks import OnStep, inference, one_thread, silent
from splitters.cutting.graph.partition import Cut
from splitters.cutting.graph.split import Cutter
from splitters.runtime.sessions import open_session

log = logging.getLogger(__name__)

_RUNS = (3, 15)  # of each timing: at least, at most
_RUN_BUDGET_S = 0.1

Floats = NDArray[np.float32]
T = TypeVar("T")


def clock_ms(run: Callable[[], Any], clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """Milliseconds of the fastest of a few runs, after one to warm up: what else the machine does only ever adds."""
    run()
    spent: list[float] = []
    while len(spent) < _RUNS[0] or (len(spent) < _RUNS[1] and sum(spent) < _RUN_BUDGET_S):
        start = clock()
        run()
        spent.append((clock() - start) / 1e9)
    return min(spent) * 1e3


def cut_times(
    cutter: Cutter,
    cuts: Sequence[Cut],
    inputs: Sequence[Tensor],
    *,
    first: Sequence[Cut],
    budget_s: float,
    notes: list[str],
    on_step: OnStep = silent,
) -> tuple[Mapping[int, Mapping[str, Any]], tuple[float, float]]:
    """Times by position, and those of the whole model (ONNX Runtime, torch); cuts in ``first`` are measured first."""
    measured: dict[int, tuple[float, ...]] = {}
    failed: list[str] = []
    start = time.monotonic()
    with one_thread(), inference(cutter.model):
        on_step(0, len(cuts), "exporting the whole model")
        timer = _Timer(cutter, cuts, inputs, notes)
        whole = timer.whole()
        start, export_s = time.monotonic(), time.monotonic() - start
        log.info("exported and timed the whole model in %.1f s", export_s)
        for cut in dict.fromkeys((*first, *coarse_to_fine(cuts)), None):
            if time.monotonic() - start > budget_s and len(measured) + len(failed) >= 2:
                break
            on_step(len(measured), len(cuts), f"timing {cut.name} (for {budget_s:g} s at most)")
            try:
                measured[cut.position] = timer.halves(cut)
            except Exception as error:  # noqa: BLE001  (torch and ONNX Runtime raise many kinds; the rest is worth having)
                failed.append(f"{cut.name}: {first_line(error)}")
        on_step(len(cuts), len(cuts), f"{len(measured)} cuts timed, the others interpolated")
    if failed:
        notes.append(f"{len(failed)} cuts could not be timed, the first {failed[0]}")
    at = sorted(measured)
    names = ("head_ms", "tail_ms", "head_torch_ms", "tail_torch_ms")
    # Before the first and after the last measured cut, the line runs to the whole model's times.
    ends = ((0.0, whole[0], 0.0, whole[1]), (whole[0], 0.0, whole[1], 0.0))
    knots = [0, *at, len(cutter.trace.order)]
    values = np.asarray([ends[0], *(measured[p] for p in at), ends[1]])
    table = {
        c.position: {n: float(np.interp(c.position, knots, values[:, i])) for i, n in enumerate(names)}
        | {"timed": c.position in measured}
        for c in cuts
    }
    return table, whole


def coarse_to_fine(cuts: Sequence[T]) -> list[T]:
    """Ends first, then halves, quarters…: whenever time runs out, what is measured is spread evenly."""
    order: list[T] = []
    seen: set[int] = set()
    step = len(cuts)
    while step >= 1 and len(order) < len(cuts):
        for i in range(0, len(cuts), step):
            if i not in seen:
                seen.add(i)
                order.append(cuts[i])
        step = max(1, step // 2) if step > 1 else 0
    return order


class _Timer:
    """Times halves in ONNX Runtime, where the graph can be exported, and in torch."""

    def __init__(self, cutter: Cutter, cuts: Sequence[Cut], inputs: Sequence[Tensor], notes: list[str]) -> None:
        self._cutter, self._inputs = cutter, list(inputs)
        self._names = {n: f"at_{n.name}" for c in cuts for n in c.crossing if n.op != "placeholder"}
        self._folder = tempfile.TemporaryDirectory(prefix="headtail-profile-")
        self._extractor: Any = None
        try:
            self._prepare()
        except ModelError as error:
            notes.append(f"ONNX Runtime times are torch's: {error.message}")

    def _prepare(self) -> None:
        import onnx
        import onnx.utils

        trace = self._cutter.trace
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(trace.module.graph, env)
        final = [n for n in next(n for n in trace.module.graph.nodes if n.op == "output").args[0] if isinstance(n, fx.Node)]
        graph.output((*(env[n] for n in final), *(env[n] for n in self._names)))
        module = fx.GraphModule(trace.module, graph)
        self._in = [f"in_{i}" for i in range(len(self._inputs))]
        self._out = [f"out_{i}" for i in range(len(final))]
        self._names |= dict(zip((n for n in trace.module.graph.nodes if n.op == "placeholder"), self._in, strict=True))
        path = Path(self._folder.name) / "whole.onnx"
        crossing = [n for n in self._names.values() if n not in self._in]
        _export(module, self._inputs, path, names=(self._in, [*self._out, *crossing]))
        model = onnx.load(path)
        self._extractor = onnx.utils.Extractor(model)
        outputs = [*self._out, *crossing]
        self._arrays: dict[str, Floats] = dict(zip(self._in, (x.numpy() for x in self._inputs), strict=True))
        session = open_session(path)
        self._arrays |= dict(zip(outputs, session.run(outputs, {n: self._arrays[n] for n in self._in}), strict=True))

    def _ort_ms(self, inputs: Sequence[str], outputs: Sequence[str]) -> float:
        part = self._extractor.extract_model(list(inputs), list(outputs))
        session = open_session(part.SerializeToString())
        feeds = {i.name: self._arrays[i.name] for i in session.get_inputs()}
        return clock_ms(lambda: session.run(None, feeds))

    def whole(self) -> tuple[float, float]:
        torch_ms = clock_ms(lambda: self._cutter.model(*self._inputs))
        return (self._ort_ms(self._in, self._out) if self._extractor else torch_ms), torch_ms

    def halves(self, cut: Cut) -> tuple[float, float, float, float]:
        """Milliseconds: head and tail in ONNX Runtime, head and tail in torch."""
        split = self._cutter.split(cut)
        latents = split.head(*self._inputs)
        head, tail = clock_ms(lambda: split.head(*self._inputs)), clock_ms(lambda: split.tail(*latents))
        if self._extractor is None:
            return head, tail, head, tail
        crossing = [self._names[n] for n in cut.crossing]
        made = [n for n in crossing if n not in self._in]
        return self._ort_ms(self._in, made), self._ort_ms(crossing, self._out), head, tail


def _export(module: nn.Module, inputs: Sequence[Tensor], path: Path, *, names: tuple[Sequence[str], Sequence[str]]) -> None:
    """Writes the graph at the batch size of ``inputs``: only timed, never shipped.

    Raises:
        ModelError: the exporter cannot express it.
    """
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, tuple(inputs), dynamo=True, input_names=list(names[0]), output_names=list(names[1]), verbose=False
            )
    except Exception as error:
        raise ModelError(f"the model cannot be exported to ONNX: {first_line(error)}") from error
    if program is None:
        raise ModelError("the model cannot be exported to ONNX: the exporter returned nothing")
    program.save(str(path), external_data=False)
