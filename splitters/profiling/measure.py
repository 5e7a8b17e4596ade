"""The measurements behind :func:`splitters.profile`: sizes, work and parameters, from one run of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from protos.errors import CutError
from splitters.cutting.checks import OnStep, inference, one_thread, silent
from splitters.cutting.graph.partition import Cut
from splitters.cutting.graph.split import Cutter
from splitters.cutting.graph.trace import rebatch
from splitters.profiling.table import CutCost, Profile, mark_good
from splitters.profiling.times import cut_times

ZSTD_LEVEL = 3
_MIN_VALUES = 16


class _Counter(fx.Interpreter):
    """Runs the graph once and keeps, node by node, the work done and the tensors asked for."""

    def __init__(self, module: fx.GraphModule, keep: set[fx.Node]) -> None:
        super().__init__(module)
        self._keep = keep
        self._flops = FlopCounterMode(display=False)
        self.macs: dict[fx.Node, int] = {}
        self.kept: dict[fx.Node, Tensor] = {}

    def count(self, inputs: Sequence[Tensor]) -> None:
        with self._flops:
            self.run(*inputs, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        before = self._flops.get_total_flops()
        value = super().run_node(n)
        self.macs[n] = (self._flops.get_total_flops() - before) // 2
        if n in self._keep:
            self.kept[n] = value
        return value


def zstd_8bit_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor (1, C, H, W) or (1, L, C) with 8 bits a value and fixed scales, zstandard-compressed.

    A scale a channel, or one for all where a channel has so few values that its scale would be the message.
    """
    values = tensor.detach().float()
    flat = values[0].T if values.ndim == 3 else values.reshape(values.shape[1] if values.ndim > 1 else 1, -1)
    if flat.shape[1] < _MIN_VALUES:
        flat = flat.reshape(1, -1)
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    symbols = ((flat - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(symbols.contiguous().numpy().tobytes()))


def profile(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    name: str = "",
    picture_bytes: int | None = None,
    budget_s: float = 30.0,
    on_step: OnStep = silent,
) -> Profile:
    """Measures every candidate cut of ``model`` on this machine, one thread.

    Args:
        model: any module that :func:`splitters.split` can cut, or an exported program.
        example_inputs: a real, preprocessed image, or a tuple of tensors; only the first of the batch is used.
        name: how the table calls the model.
        picture_bytes: what sending the picture would cost; by default the input's own bytes, 8 bits, compressed.
        budget_s: time for the latency measurements; rows that do not fit are interpolated and say so.
        on_step: told how many of how many cuts are timed, and what is done next.

    Raises:
        CutError: the model cannot be traced or has no cut.
    """
    on_step(0, 1, "tracing the model")
    return _measure(Cutter(model, example_inputs), name or type(model).__name__, picture_bytes, budget_s, on_step)


def _counted(cutter: Cutter, cuts: Sequence[Cut]) -> tuple[_Counter, Sequence[Tensor], int]:
    """One run of the graph on its example, what it was given, and the batch."""
    batch = 1 if cutter.trace.dynamic_batch else cutter.trace.batches[0]
    inputs = rebatch(cutter.example, batch)
    with one_thread(), inference(cutter.model):
        counter = _Counter(cutter.trace.module, {n for c in cuts for n in c.crossing})
        counter.count(inputs)
    return counter, inputs, batch


def fewest_bytes(cutter: Cutter, share: float = 0.35) -> tuple[str, float]:
    """The cut that sends the fewest compressed bytes with at most that share of the work on the device, and its share.

    Where no cut has so little work, the one with the least.

    Raises:
        CutError: the model has no cut.
    """
    cuts = cutter.candidates()
    if not cuts:
        raise CutError("the model has no place where only whole, batch-first tensors cross")
    counter, _, _ = _counted(cutter, cuts)
    heads = np.cumsum([counter.macs.get(n, 0) for n in cutter.trace.order])
    total = max(1, int(heads[-1]))
    sent = {n: zstd_8bit_bytes(t[:1]) for n, t in counter.kept.items()}
    rows = [(sum(sent[n] for n in c.crossing), int(heads[c.position - 1]) / total, c) for c in cuts if c.crossing]
    least = min(work for _, work, _ in rows)
    _, work, best = min((r for r in rows if r[1] <= max(share, least)), key=lambda r: (r[0], r[1], r[2].position))
    return best.name, work


def _measure(cutter: Cutter, name: str, picture_bytes: int | None, budget_s: float, on_step: OnStep) -> Profile:
    cuts = cutter.candidates()
    on_step(0, len(cuts), f"measuring what crosses at {len(cuts)} places")
    if not cuts:
        raise CutError(f"{name} has no place where only whole, batch-first tensors cross")
    notes = list(cutter.trace.notes)
    counter, inputs, batch = _counted(cutter, cuts)
    params = _parameters(cutter.trace.module, cutter.trace.order)
    total_macs = sum(counter.macs.values())
    sent = {n: (t.numel() * t.element_size(), t.numel(), zstd_8bit_bytes(t[:1])) for n, t in counter.kept.items()}
    rows = []
    heads = np.cumsum([counter.macs.get(n, 0) for n in cutter.trace.order])
    if picture_bytes is None:
        picture_bytes = sum(zstd_8bit_bytes(x[:1]) for x in inputs)
    work = [int(heads[c.position - 1]) for c in cuts]
    good = mark_good([c.name for c in cuts], work, [sum(sent[n][2] for n in c.crossing) for c in cuts], picture_bytes)
    first = [c for c, is_good in zip(cuts, good, strict=True) if is_good]
    times, whole = cut_times(cutter, cuts, inputs, first=first, budget_s=budget_s, notes=notes, on_step=on_step)
    for cut, macs, is_good in zip(cuts, work, good, strict=True):
        timing = times[cut.position]
        before, after = params(cut.position)
        rows.append(
            CutCost(
                name=cut.name,
                shapes=tuple(tuple(counter.kept[n].shape[1:]) for n in cut.crossing),
                float_bytes=sum(sent[n][0] for n in cut.crossing) // batch,
                int8_bytes=sum(sent[n][1] for n in cut.crossing) // batch,
                zstd_bytes=sum(sent[n][2] for n in cut.crossing),
                head_macs=macs,
                tail_macs=total_macs - macs,
                head_params=before,
                tail_params=after,
                good=is_good,
                **timing,
            )
        )
    if not all(r.timed for r in rows):
        notes.append(
            f"times marked ~ are interpolated between measured cuts ({sum(r.timed for r in rows)} of {len(rows)} measured)"
        )
    return Profile(
        model=name, rows=tuple(rows), input_bytes=sum(x[:1].numel() for x in inputs), picture_bytes=picture_bytes,
        total_macs=total_macs, local_ms=whole[0], local_torch_ms=whole[1], notes=tuple(notes),
    )  # fmt: skip


def _parameters(module: fx.GraphModule, order: Sequence[fx.Node]) -> Callable[[int], tuple[int, int]]:
    """A function from a position to the number of weights that head and tail need."""
    place = {n: i for i, n in enumerate(order)}
    uses: list[tuple[int, int, int]] = []  # elements, first and last reader
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            readers = [place[u] for u in node.users if u in place]
            if isinstance(value, Tensor) and readers:
                uses.append((value.numel(), min(readers), max(readers)))
        elif node.op == "call_module":
            elements = sum(p.numel() for p in module.get_submodule(str(node.target)).parameters())
            uses.append((elements, place[node], place[node]))

    def count(position: int) -> tuple[int, int]:
        return sum(n for n, first, _ in uses if first < position), sum(n for n, _, last in uses if last >= position)

    return count
