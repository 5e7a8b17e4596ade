"""What every cut of an ONNX model would cost: the same table, from the user's own graph and in ONNX Runtime alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from protos.errors import CutError, HeadtailError
from splitters.cutting.checks import OnStep, silent
from splitters.cutting.onnx.cost import CrossingCost, best_cut, crossing_costs
from splitters.cutting.onnx.cuts import Cuts, OnnxCut, reads
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.model import OnnxModel, at_batch_one, to_bytes
from splitters.cutting.onnx.pieces import divide, latent_name, whole
from splitters.cutting.onnx.runtime import Session
from splitters.profiling.table import CutCost, Profile, mark_good
from splitters.profiling.times import clock_ms, coarse_to_fine

Array = np.ndarray[Any, Any]


def profile_onnx(
    model: OnnxModel, feed: Feed, *, name: str, picture_bytes: int, budget_s: float, on_step: OnStep = silent
) -> Profile:
    """Measures every cut on this machine, one thread.

    Args:
        model: ready to be cut.
        feed: what the head is given for one frame.
        name: how the table calls the model.
        picture_bytes: what sending the picture would cost.
        budget_s: time for the latency measurements; rows that do not fit are interpolated and say so.
        on_step: told how many of how many cuts are timed, and what is done next.

    Raises:
        CutError: the model has no cut.
    """
    model = at_batch_one(model)
    cuts = Cuts(model)
    offered = cuts.candidates()
    if not offered:
        raise CutError(f"{name} can be cut nowhere: at every place something crosses that cannot be sent exactly")
    on_step(0, len(offered), f"measuring what crosses at {len(offered)} places")
    costs = crossing_costs(cuts, offered, feed)
    good = mark_good(
        [c.name for c in offered], [c.macs for c in offered], [costs[c.position].zstd_bytes for c in offered], picture_bytes
    )
    first = [c for c, is_good in zip(offered, good, strict=True) if is_good]
    notes = list(model.notes)
    whole_ms = _ms(Session(to_bytes(whole(model), name), optimised=True, what=name), feed)
    measured = _times(cuts, [*first, *coarse_to_fine(offered)], costs, feed, budget_s, notes, on_step)
    knots = [0, *sorted(measured), len(cuts.order)]
    heads = [0.0, *(measured[p][0] for p in sorted(measured)), whole_ms]
    tails = [whole_ms, *(measured[p][1] for p in sorted(measured)), 0.0]
    rows = []
    given = sum(a.size for a in feed.values())
    for cut, is_good in zip(offered, good, strict=True):
        cost = costs[cut.position]
        before, after = _weights(cuts, cut.position)
        head_ms, tail_ms = (float(np.interp(cut.position, knots, values)) for values in (heads, tails))
        rows.append(
            CutCost(
                name=cut.name, shapes=cost.shapes, float_bytes=cost.float_bytes, int8_bytes=cost.int8_bytes,
                zstd_bytes=cost.zstd_bytes, head_macs=cut.macs, tail_macs=cuts.total_macs - cut.macs, head_params=before,
                tail_params=after, head_ms=head_ms, tail_ms=tail_ms, head_torch_ms=head_ms, tail_torch_ms=tail_ms,
                timed=cut.position in measured, good=is_good,
            )
        )  # fmt: skip
    if not all(r.timed for r in rows):
        timed = sum(r.timed for r in rows)
        notes.append(f"times marked ~ are interpolated between measured cuts ({timed} of {len(rows)} measured)")
    notes.append(f"without --at, cut takes {best_cut(cuts, feed)[0].name}")
    return Profile(
        model=name, rows=tuple(rows), input_bytes=given, picture_bytes=picture_bytes, total_macs=cuts.total_macs,
        local_ms=whole_ms, local_torch_ms=whole_ms, notes=tuple(notes),
    )  # fmt: skip


def _times(
    cuts: Cuts,
    order: Sequence[OnnxCut],
    costs: dict[int, CrossingCost],
    feed: Feed,
    budget_s: float,
    notes: list[str],
    on_step: OnStep,
) -> dict[int, tuple[float, float]]:
    """Milliseconds of head and tail by position, for as long as the budget lasts; what cannot be timed is left out and counted."""
    measured: dict[int, tuple[float, float]] = {}
    failed: list[str] = []
    start = time.monotonic()
    for cut in dict.fromkeys(order):
        if time.monotonic() - start > budget_s and len(measured) + len(failed) >= 2:
            break
        on_step(len(measured), len(costs), f"timing {cut.name} (for {budget_s:g} s at most)")
        try:
            pieces = divide(cuts.model, cut, costs[cut.position].shapes)
            head = Session(to_bytes(pieces.head, cut.name), optimised=True, what=f"the head at {cut.name}")
            tail = Session(to_bytes(pieces.tail, cut.name), optimised=True, what=f"the tail at {cut.name}")
            latents = {latent_name(i): latent for i, latent in enumerate(head.run(feed))}
            measured[cut.position] = (_ms(head, feed), _ms(tail, latents))
        except HeadtailError as error:
            failed.append(f"{cut.name}: {error.message}")
    on_step(len(costs), len(costs), f"{len(measured)} cuts timed, the others interpolated")
    if failed:
        notes.append(f"{len(failed)} cuts could not be timed, the first {failed[0]}")
    return measured


def _ms(session: Session, arrays: Feed) -> float:
    return clock_ms(lambda: session.run(arrays))


def _weights(cuts: Cuts, position: int) -> tuple[int, int]:
    """Elements of the weights that head and tail need."""
    sides = []
    for nodes in (cuts.order[:position], cuts.order[position:]):
        own = {v for n in nodes for v in reads(n) if v.const_value is not None}
        sides.append(sum(int(v.const_value.size) for v in own if v.const_value is not None))
    return sides[0], sides[1]
