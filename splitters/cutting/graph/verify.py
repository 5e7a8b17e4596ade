"""Proof of a cut: head then tail give what the model gives, for different pictures, alone and in one batch.

A server batches the frames of strangers, so a picture must get the same answer whichever pictures are beside it and whatever came
before it: the model runs on A, B and A again, and every row of a batch of different pictures is compared with its
picture alone. A model that mixes the pictures of a batch, or remembers the last one, is refused.

A cut that drops a tensor can still be right to six digits if the tensor hardly matters. So each tensor that crosses is
in turn replaced, by zeros, by another picture's and by its own values in another order, and the output must move by more
than ten times the tolerance to which equality was shown. Where it does not, and head and tail were not exactly equal to
the model, nothing is proved; where they were exactly equal, that is a warning.

Models may change their inputs in place, so each run gets its own copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from protos.errors import CutError
from splitters.cutting.checks import inference
from splitters.cutting.graph.trace import flat_inputs

MARGIN = 10.0
PICTURES = 3  # different ones in a batch
APART = 10.0  # a picture alone and in a batch goes through other kernels: rounding may differ by this multiple of the tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was measured.

    Attributes:
        max_difference: largest absolute difference to the uncut model's output.
        relative_difference: the same over the standard deviation of that output tensor, the worst of all.
        output_std: standard deviation of the output, the smallest of all output tensors.
        sensitivity: of each latent, how far replacing it moves the output, over the standard deviation.
        batches: the batch sizes compared.
        warnings: what could not be shown, a sentence each; empty when all is well.
    """

    max_difference: float
    relative_difference: float
    output_std: float
    sensitivity: tuple[float, ...]
    batches: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def verify(
    model: nn.Module,
    head: nn.Module,
    tail: nn.Module,
    inputs: Any,
    *,
    names: Sequence[str],
    at: str,
    dynamic_batch: bool,
    tolerance: float,
) -> Verification:
    """Compares and replaces; see the module's text.

    Raises:
        CutError: the halves are another function, the model mixes pictures or remembers them, or nothing is proved of a
            latent.
    """
    given = flat_inputs(inputs)
    pictures = _pictures(given) if dynamic_batch else [tuple(given), _other(given, 1)]
    size = pictures[0][0].shape[0]
    batches = (size, PICTURES) if dynamic_batch else (size,)
    with inference(model):
        alone = [_run(model, p) for p in pictures]
        _check_memory(alone[0], _run(model, pictures[0]), APART * tolerance)
        worst, relative, spread = 0.0, 0.0, float("inf")
        wanted = list(alone)
        fed = list(pictures)
        if dynamic_batch:
            fed.append(tuple(_together(parts) for parts in zip(*pictures, strict=True)))
            wanted.append(_run(model, fed[-1]))
            _check_rows(wanted[-1], alone, APART * tolerance)
        for batch, expected in zip(fed, wanted, strict=True):
            got = _tensors(tail(*head(*_clones(batch))))
            absolute, scaled, std = _difference(expected, got, at)
            worst, relative, spread = max(worst, absolute), max(relative, scaled), min(spread, std)
            if not scaled <= tolerance:
                raise CutError(
                    f"the cut at {at!r} is wrong: with a batch of {batch[0].shape[0]} head and tail differ from the model by "
                    f"{absolute:.3g}, {scaled:.3g} of the output's standard deviation (allowed: {tolerance:.3g}); do not use it"
                )
        latents, others = (tuple(head(*_clones(p))) for p in pictures[:2])
        sensitivity = tuple(_sensitivity(tail, latents, others, i, MARGIN * tolerance) for i in range(len(latents)))
    warnings = []
    for name, moved in zip(names, sensitivity, strict=True):
        if moved > MARGIN * tolerance:
            continue
        told = (
            f"replacing the tensor {name!r} moves the output by only {moved:.3g} of its standard deviation "
            f"(needed: {MARGIN * tolerance:.3g}), so equality proves nothing about it"
        )
        if worst > 0.0:
            raise CutError(f"the cut at {at!r} does not verify: {told}; verify with an input, or weights, for which it matters")
        warnings.append(f"at {at!r} {told}; head and tail are exactly equal to the model")
    return Verification(
        max_difference=worst, relative_difference=relative, output_std=spread, sensitivity=sensitivity, batches=batches,
        warnings=tuple(warnings),
    )  # fmt: skip


def _clones(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in inputs)


def _run(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in _tensors(model(*_clones(inputs)))]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _pictures(given: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Different inputs with a batch of one: the rows given, then others made of the first."""
    size = given[0].shape[0]
    rows = [tuple(x[i : i + 1] if x.ndim and x.shape[0] == size else x for x in given) for i in range(min(size, PICTURES))]
    found = rows[:1]
    for row in rows[1:]:
        if not any(_same(row, f) for f in found):
            found.append(row)
    while len(found) < PICTURES:
        found.append(_other(rows[0], len(found)))
    return found


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _other(inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
    """Another picture made of one: shifted, and darker, so that its statistics differ too."""
    batch = inputs[0].shape[0]

    def changed(x: Tensor) -> Tensor:
        if not (x.ndim > 1 and x.shape[0] == batch):
            return x
        moved = x.roll([number * side // 3 for side in x.shape[2:]], tuple(range(2, x.ndim))) if x.ndim > 2 else x.roll(number, 1)
        if not x.is_floating_point():
            return moved
        pattern = torch.linspace(0.2, 0.9, x[:1].numel(), dtype=torch.float64).roll(number).reshape(x[:1].shape).to(x)
        return moved * (0.7 / number) + (pattern * number / 4 if not bool(x.any()) or _flat(x) else 0)

    return tuple(changed(x) for x in inputs)


def _flat(x: Tensor) -> bool:
    return bool((x == x.flatten()[0]).all())


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Inputs with a batch axis of one as one batch; others are alike for all."""
    return torch.cat(list(parts)) if parts[0].ndim and parts[0].shape[0] == 1 else parts[0]


def _check_memory(first: Sequence[Tensor], again: Sequence[Tensor], allowed: float) -> None:
    if [t.shape for t in first] != [t.shape for t in again]:
        raise CutError("the model remembers: for the same picture its outputs have other shapes after another picture")
    for a, b in zip(first, again, strict=True):
        moved = _moved(a, b)
        if not moved <= allowed:
            raise CutError(
                f"the model remembers, or draws random numbers: run on one picture, on another, and on the first again, it "
                f"answers the first differently (by {moved:.3g} of the output's standard deviation). A server answers the frames "
                "of many cameras in turn: cut a model whose answer depends on the picture alone"
            )


def _check_rows(batch: Sequence[Tensor], alone: Sequence[Sequence[Tensor]], allowed: float) -> None:
    """Every row of a batch is what its picture gives alone."""
    for index, whole in enumerate(batch):
        singles = [outputs[index] for outputs in alone]
        if singles[0].shape == whole.shape:  # depends on no picture: anchors, for example
            rows = [whole] * len(singles)
        else:
            axis = next((i for i, (a, b) in enumerate(zip(singles[0].shape, whole.shape, strict=True)) if a != b), 0)
            rows = list(whole.chunk(len(singles), axis))
        for number, (row, single) in enumerate(zip(rows, singles, strict=False), start=1):
            moved = _moved(single, row) if row.shape == single.shape else float("inf")
            if not moved <= allowed:
                raise CutError(
                    f"the model mixes the pictures of a batch: picture {number} of {len(singles)} is answered differently alone "
                    f"and beside other pictures (by {moved:.3g} of the output's standard deviation). A server batches frames of "
                    "different cameras, which must not see one another: a normalisation without running statistics does this"
                )


def _scale(tensor: Tensor) -> float:
    """The unit of relative differences: the standard deviation, or the size where all elements are equal."""
    spread = float(tensor.detach().double().std(correction=0)) if tensor.numel() else 0.0
    return spread or float(tensor.detach().double().abs().amax() if tensor.numel() else 0.0) or 1.0


def _moved(before: Tensor, after: Tensor) -> float:
    """Largest difference over the scale of ``before``; infinite where one of them is not finite."""
    if not before.numel():
        return 0.0
    gap = float((after.double() - before.double()).abs().amax()) / _scale(before)
    return gap if math.isfinite(gap) else float("inf")


def _difference(wanted: list[Tensor], got: list[Tensor], at: str) -> tuple[float, float, float]:
    if [w.shape for w in wanted] != [g.shape for g in got]:
        raise CutError(f"the cut at {at!r} is wrong: the tail's outputs have shapes {[tuple(g.shape) for g in got]}, "
                       f"the model's {[tuple(w.shape) for w in wanted]}")  # fmt: skip
    absolute, relative, spread = 0.0, 0.0, float("inf")
    for w, g in zip(wanted, got, strict=True):
        if not bool(torch.isfinite(w).all()):
            raise CutError(f"the model's own output is not finite on this input, so the cut at {at!r} cannot be verified")
        gap = float((w.double() - g.double()).abs().amax()) if w.numel() else 0.0
        absolute, relative = max(absolute, gap), max(relative, gap / _scale(w))
        spread = min(spread, float(w.double().std(correction=0)) if w.numel() else 0.0)
    return absolute, relative, spread


def _replacements(tensor: Tensor, other: Tensor) -> Iterator[Tensor]:
    """What may stand for a latent: nothing, another picture's, its own values elsewhere, half of it."""
    yield torch.zeros_like(tensor)
    if other.shape == tensor.shape:
        yield other
    for axis in range(1, tensor.ndim):
        yield tensor.roll(1, axis)
    if tensor.is_floating_point():
        yield tensor * 0.5


def _sensitivity(tail: Callable[..., Any], latents: Sequence[Tensor], others: Sequence[Tensor], index: int, enough: float) -> float:
    """The largest movement of any output over the replacements, over its scale; stops once it is enough."""
    before = [t.clone() for t in _tensors(tail(*_clones(latents)))]
    moved = 0.0
    for changed in _replacements(latents[index], others[index]):
        try:
            after = _tensors(tail(*_clones([*latents[:index], changed, *latents[index + 1 :]])))
        except Exception:  # noqa: BLE001, S112  (a tail may refuse what no picture gives: an index out of range)
            continue
        for a, b in zip(after, before, strict=True):
            moved = max(moved, _moved(b, a) if a.shape == b.shape else float("inf"))
        if moved > enough:
            break
    return moved
