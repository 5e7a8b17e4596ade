"""The proof that head and tail are the user's file: run on different pictures, against ONNX Runtime on the whole original.

Without optimisation both sides run the same operators in the same order, so that they must agree to the last bit. Optimised,
as they are served, ONNX Runtime joins operators differently in the pieces than in the whole, and rounding shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.errors import CutError, ModelError
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.model import OnnxModel, to_bytes
from splitters.cutting.onnx.pieces import Pieces, latent_name
from splitters.cutting.onnx.runtime import Session

TOLERANCE = 1e-3
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What was shown.

    Attributes:
        identical: whether the pieces, not optimised, agree with the original to the last bit.
        difference: largest difference of the pieces as they are served, over the output's largest value.
        free_batch: whether pictures in one batch give what each gives alone.
        pictures: how many different ones were compared.
        notes: what else was seen.
    """

    identical: bool
    difference: float
    free_batch: bool
    pictures: int
    notes: tuple[str, ...]


def prove(model: OnnxModel, pieces: Pieces, feeds: Sequence[Feed]) -> Proof:
    """Compares the pieces with the whole file.

    Args:
        model: the file.
        pieces: cut from it.
        feeds: at least one frame; different ones where there are.

    Raises:
        CutError: they differ, or the model has a memory from one picture to the next.
        ModelError: a piece cannot be run.
    """
    chosen = list(feeds[:3])
    if len(chosen) == 1:
        chosen.append({n: np.ascontiguousarray(a[..., ::-1]) for n, a in chosen[0].items()})
    wanted = [model.run_reference(feed) for feed in chosen]
    again = model.run_reference(chosen[0])
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(wanted[0], again, strict=True)):
        raise CutError(
            f"{model.path.name} answers the same picture differently a second time: it draws random numbers or remembers, "
            "and cannot be proved or served"
        )
    if not all(np.isfinite(a).all() for run in wanted for a in run if a.dtype.kind == "f"):
        raise CutError(f"{model.path.name}'s own output is not finite on a photograph: is its input prepared as it expects?")
    plain = _Halves(model, pieces, optimised=False)
    plain_gap = max(_difference(model, w, plain(feed)[1]) for w, feed in zip(wanted, chosen, strict=True))
    served = _Halves(model, pieces, optimised=True)
    runs = [served(feed) for feed in chosen]
    gap = max(_difference(model, w, run[1]) for w, run in zip(wanted, runs, strict=True))
    if plain_gap > TOLERANCE or (plain_gap and gap > TOLERANCE):
        raise CutError(
            f"head and tail of {model.path.name} differ from the whole file by {max(plain_gap, gap):.2g} of its largest output "
            f"(allowed: {TOLERANCE})"
        )
    notes = _weak(served, runs[0], runs[1])
    if gap > TOLERANCE:
        notes.append(
            f"the pieces are the file to the last bit, but ONNX Runtime's own optimisation moves an output by {gap:.2g} of its "
            "largest: the model picks among near equals, as a top-k does"
        )
    free = model.free_batch and _rows_apart(served, chosen[:2], [run[1] for run in runs[:2]])
    return Proof(identical=plain_gap == 0.0, difference=gap, free_batch=free, pictures=len(chosen), notes=tuple(notes))


class _Halves:
    """Both pieces in ONNX Runtime."""

    def __init__(self, model: OnnxModel, pieces: Pieces, *, optimised: bool) -> None:
        name = model.path.name
        self._head = Session(to_bytes(pieces.head, name), optimised=optimised, what=f"the head of {name}")
        self._tail = Session(to_bytes(pieces.tail, name), optimised=optimised, what=f"the tail of {name}")

    def __call__(self, feed: Feed) -> tuple[list[Array], list[Array]]:
        latents = self._head.run(feed)
        return latents, self.tail(latents)

    def tail(self, latents: Sequence[Array]) -> list[Array]:
        return self._tail.run({latent_name(i): latent for i, latent in enumerate(latents)})


def _difference(model: OnnxModel, wanted: Sequence[Array], got: Sequence[Array]) -> float:
    worst = 0.0
    for name, w, g in zip(model.outputs, wanted, got, strict=True):
        if g.shape == (1, *w.shape):  # the pieces give every output a batch axis
            g = g[0]  # noqa: PLW2901
        if w.shape != g.shape:
            raise CutError(
                f"output {name!r} of {model.path.name} has shape {g.shape} from the halves, {w.shape} from the whole file"
            )
        if w.dtype.kind not in "fiub" or not w.size or np.array_equal(w, g):
            continue
        gap = np.abs(w.astype(np.float64) - g.astype(np.float64))
        worst = max(worst, float(gap.max()) / (float(np.abs(w.astype(np.float64)).max()) or 1.0))
    return worst


def _weak(halves: _Halves, first: tuple[list[Array], list[Array]], second: tuple[list[Array], list[Array]]) -> list[str]:
    """Tensors that cross and change nothing when another picture's takes their place."""
    weak = []
    for index in range(len(first[0])):
        swapped = [*first[0][:index], second[0][index], *first[0][index + 1 :]]
        try:
            moved = halves.tail(swapped)
        except ModelError:
            continue
        if all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(moved, first[1], strict=True)):
            weak.append(latent_name(index))
    return [f"another picture's {', '.join(weak)} changes no output: the model barely uses what crosses there"] if weak else []


def _rows_apart(halves: _Halves, feeds: Sequence[Feed], alone: Sequence[Sequence[Array]]) -> bool:
    """Whether different pictures in one batch, in both orders, give what each gives alone."""
    for order in ([0, 1], [1, 0], [0, 1, 0]):
        try:
            _, got = halves({name: np.concatenate([feeds[i][name] for i in order]) for name in feeds[0]})
        except ModelError:
            return False
        for output, rows in enumerate(zip(*(alone[i] for i in order), strict=True)):
            if any(r.ndim == 0 or r.shape[0] != 1 for r in rows):
                return False
            shapes = {r.shape for r in rows}
            if len(shapes) != 1 or got[output].shape != (len(order), *rows[0].shape[1:]):
                return False
            wanted = np.concatenate(rows).astype(np.float64)
            gap = float(np.abs(wanted - got[output].astype(np.float64)).max()) if wanted.size else 0.0
            if gap > 1e-4 * (float(np.abs(wanted).max()) or 1.0):
                return False
    return True
