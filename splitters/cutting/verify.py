"""Proof of a cut: head then tail give what the model gives, at two batch sizes, and every tensor that crosses matters.

A cut that drops a branch can still be right to six digits if the branch hardly matters. So each latent in turn is
disturbed by 1 %, and the output must move by more than ten times the tolerance to which equality was shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from protos.errors import CutError
from splitters.cutting.checks import inference
from splitters.cutting.trace import flat_inputs, rebatch

DISTURBANCE = 0.01
MARGIN = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was measured.

    Attributes:
        max_difference: largest absolute difference to the uncut model's output.
        relative_difference: the same over the standard deviation of that output tensor, the worst of all.
        output_std: standard deviation of the output, the smallest of all output tensors.
        sensitivity: of each latent, how far 1 % of it moves the output, over the standard deviation.
        batches: the batch sizes compared.
    """

    max_difference: float
    relative_difference: float
    output_std: float
    sensitivity: tuple[float, ...]
    batches: tuple[int, ...]


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
    """Compares and disturbs; see the module's text.

    Raises:
        CutError: the halves are another function, or a latent does not matter.
    """
    given = flat_inputs(inputs)
    batch = given[0].shape[0]
    batches = (batch, batch + 1) if dynamic_batch else (batch,)
    worst, relative, spread = 0.0, 0.0, float("inf")
    with inference(model):
        for size in batches:
            image = rebatch(given, size)
            wanted = _tensors(model(*image))
            got = _tensors(tail(*head(*image)))
            absolute, scaled, std = _difference(wanted, got, at)
            worst, relative, spread = max(worst, absolute), max(relative, scaled), min(spread, std)
            if not scaled <= tolerance:
                raise CutError(
                    f"the cut at {at!r} is wrong: with a batch of {size} head and tail differ from the model by {absolute:.3g}, "
                    f"{scaled:.3g} of the output's standard deviation (allowed: {tolerance:.3g}); do not use it"
                )
        latents = head(*given)
        before = _tensors(tail(*latents))
        sensitivity = tuple(_sensitivity(tail, latents, i, before, MARGIN * tolerance) for i in range(len(latents)))
    for name, moved in zip(names, sensitivity, strict=True):
        if not moved > MARGIN * tolerance:
            raise CutError(
                f"the cut at {at!r} does not verify: 1 % of the tensor {name!r} moves the output by only {moved:.3g} of its "
                f"standard deviation (needed: {MARGIN * tolerance:.3g}), so equality proves nothing about it; verify with an "
                "input, or weights, for which it matters"
            )
    return Verification(
        max_difference=worst, relative_difference=relative, output_std=spread, sensitivity=sensitivity, batches=batches
    )


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _scale(tensor: Tensor) -> float:
    """The unit of relative differences: the standard deviation, or the size where all elements are equal."""
    spread = float(tensor.detach().double().std(correction=0)) if tensor.numel() else 0.0
    return spread or float(tensor.detach().double().abs().amax() if tensor.numel() else 0.0) or 1.0


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


def _disturbed(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor with 1 % changes of several patterns: a normalisation or a mean may cancel one, not all of them."""
    generator = torch.Generator().manual_seed(1)

    def signs(shape: Sequence[int]) -> Tensor:
        return (torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1).to(tensor)

    if not tensor.is_floating_point():
        yield tensor + 1
        return
    step = tensor * DISTURBANCE if bool(tensor.any()) else torch.full_like(tensor, DISTURBANCE)
    yield tensor + step
    for axis in range(1, tensor.ndim):
        shape = [1] * tensor.ndim
        shape[axis] = tensor.shape[axis]
        yield tensor + step * signs(shape)
    yield tensor + step * signs(tensor.shape)


def _steepest(tail: Callable[..., Any], latents: Sequence[Tensor], index: int) -> Iterator[Tensor]:
    """The 1 % change of every element in the direction that moves the outputs most, by their gradient."""
    tensor = latents[index]
    if not tensor.is_floating_point():
        return
    with torch.enable_grad():
        variable = tensor.detach().clone().requires_grad_()
        outputs = _tensors(tail(*latents[:index], variable, *latents[index + 1 :]))
        total = sum(o.flatten()[:: max(1, o.numel() // 2)].sum() / _scale(o) for o in outputs if o.requires_grad and o.numel())
        if not isinstance(total, Tensor):
            return
        (gradient,) = torch.autograd.grad(total, variable)
    yield tensor + DISTURBANCE * tensor.abs() * gradient.sign()


def _sensitivity(tail: Callable[..., Any], latents: Sequence[Tensor], index: int, before: list[Tensor], enough: float) -> float:
    """The largest movement of any output over the patterns, over its scale; stops once it is enough."""
    moved = 0.0
    for changed in itertools.chain(_disturbed(latents[index]), _steepest(tail, latents, index)):
        after = _tensors(tail(*latents[:index], changed, *latents[index + 1 :]))
        for a, b in zip(after, before, strict=True):
            if a.numel():
                moved = max(moved, float((a.double() - b.double()).abs().amax()) / _scale(b))
        if moved > enough:
            break
    return moved
