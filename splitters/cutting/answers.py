"""Whether a model's outputs are what its postprocess reads: tried on photographs before a bundle is written or trained.

A tail may return another shape than its postprocess reads, probabilities instead of logits, or corners instead of centres.
Without this check users would notice: the server ends at its first frame, or answers nonsense. So shapes and ranges are compared
with what the postprocess expects, and then the postprocess itself runs.

Shape legend: N batch, C classes, P positions or candidate boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, nn

from protos.errors import CutError, HeadtailError
from protos.schema import checked
from splitters.bundle.manifest import Preprocess
from splitters.cutting.checks import first_line, run_model
from splitters.tasks.base import make_task
from splitters.tasks.decoding import Decoding
from splitters.tasks.preprocess import Frame, preprocess

PHOTOS = 4
_STRIDES = (8, 16, 32)
_SUM = 1e-3  # how near to 1 the outputs of a softmax add up
_PIXELS = 2.0  # boxes whose corners all lie below are fractions of the input

Floats = NDArray[np.float32]


def raw_outputs(model: nn.Module, photos: Sequence[Frame], spec: Preprocess) -> list[Floats]:
    """What the model returns for a few photographs, one after the other, joined along the batch.

    Raises:
        CutError: it does not run on them, or returns no tensor, or tensors whose first axis is not the batch.
    """
    found = []
    for photo in photos[:PHOTOS]:
        leaves = pytree.tree_leaves(run_model(model, (torch.from_numpy(preprocess(photo, spec)),)))
        found.append([t.detach().cpu().numpy() for t in leaves if isinstance(t, Tensor)])
    shapes = [a.shape for a in found[0]]
    if not shapes or any(s[:1] != (1,) for s in shapes) or any([a.shape for a in f] != shapes for f in found):
        raise CutError(
            f"for one picture the model returns tensors of shape {_shapes(found[0])}; expected a first axis of 1, the batch"
        )
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def count_classes(postprocess: Mapping[str, Any], outputs: Sequence[Floats], spec: Preprocess) -> int:
    """How many classes the outputs tell apart; 0 where a declaration reads a class from the outputs themselves.

    Raises:
        CutError: they are not what a postprocess of that kind reads; says what was seen and what was expected.
    """
    for output in outputs:
        if not np.isfinite(output).all():
            raise CutError("the model returns numbers that are not finite for a photograph")
    kind = str(postprocess.get("kind", "softmax"))
    if kind == "declared":
        return _declared(postprocess, outputs)
    known = {"softmax": _softmax, "yolox": _yolox, "dense_boxes": _boxes}
    if kind not in known:
        raise CutError(f"postprocess kind {kind!r} is unknown; it is declared or one of {', '.join(known)}")
    return known[kind](outputs, spec)


def check_answers(
    model: nn.Module,
    photos: Sequence[Frame],
    *,
    preprocess: Preprocess,
    postprocess: Mapping[str, Any],
    labels: Mapping[int, str],
    task: str = "classification",
) -> None:
    """Runs the model and its postprocess on photographs.

    Raises:
        CutError: the outputs do not fit the postprocess, or the labels do not fit the outputs.
    """
    kind = str(postprocess.get("kind", "softmax"))
    outputs = raw_outputs(model, photos, preprocess)
    classes = count_classes(postprocess, outputs, preprocess)
    ids = list(postprocess.get("class_ids") or range(classes))
    if classes and len(ids) != classes:
        raise CutError(f"the model tells {classes} classes apart, and there are {len(ids)} class ids{_seen(outputs)}")
    if classes and labels and set(labels) != set(ids):
        raise CutError(
            f"the model tells {classes} classes apart and there are {len(labels)} labels{_seen(outputs)}; give one for each "
            f"of the ids {_span(ids)}"
        )
    try:
        make_task(task, postprocess, preprocess).decode(outputs, [(p.shape[1], p.shape[0]) for p in photos[:PHOTOS]])
    except HeadtailError as error:
        raise CutError(f"{error.message}{_seen(outputs)}") from error
    except Exception as error:
        raise CutError(f"the postprocess {kind} fails on the model's outputs: {first_line(error)}{_seen(outputs)}") from error


def _span(ids: Sequence[int]) -> str:
    low, high = min(ids), max(ids)
    return f"{low} to {high}" if len(ids) == high - low + 1 else ", ".join(map(str, ids[:12])) + (", …" if len(ids) > 12 else "")


def _shapes(outputs: Sequence[Floats]) -> str:
    return ", ".join(f"(1, {', '.join(map(str, o.shape[1:]))})" if o.ndim > 1 else "(1,)" for o in outputs) or "none"


def _seen(outputs: Sequence[Floats]) -> str:
    return f" (for one picture the model returns {_shapes(outputs)})"


def _declared(postprocess: Mapping[str, Any], outputs: Sequence[Floats]) -> int:
    how = checked({k: v for k, v in postprocess.items() if k != "kind"}, Decoding, what="the decoding", error=CutError)
    if how.class_id is not None:
        return 0
    try:
        return int(how.scores.read(outputs).shape[2]) - (how.background != "none")
    except HeadtailError as error:
        raise CutError(f"{error.message}{_seen(outputs)}") from error


def _softmax(outputs: Sequence[Floats], _spec: Preprocess) -> int:
    if len(outputs) != 1 or outputs[0].ndim != 2:
        raise CutError(
            f"--output softmax reads class logits, one tensor (N, classes); for one picture the model returns {_shapes(outputs)}. "
            "Wrap the model so that it returns the logits alone, or name another --output"
        )
    logits = outputs[0].astype(np.float64)
    if logits.shape[1] < 2:
        raise CutError(
            "--output softmax reads class logits (N, classes); the model returns one, (1, 1), whose softmax is always 1. "
            "Wrap it so that it returns two: zero and the logit"
        )
    if logits.min() >= 0 and np.abs(logits.sum(axis=1) - 1).max() <= _SUM:
        raise CutError(
            f"the model returns probabilities, (1, {logits.shape[1]}) that add up to 1; --output softmax reads logits, and softmax "
            "would be applied twice: --output probabilities reads them"
        )
    return int(logits.shape[1])


def _yolox(outputs: Sequence[Floats], spec: Preprocess) -> int:
    cells = sum((spec.size_px[0] // s) * (spec.size_px[1] // s) for s in _STRIDES)
    shape = outputs[0].shape
    if len(outputs) != 1 or len(shape) != 3 or shape[1] != cells or shape[2] < 6:
        raise CutError(
            f"--output yolox reads one tensor (N, {cells}, 5 + classes) at an input of {spec.size_px[0]}x{spec.size_px[1]} px, its "
            f"strides 8, 16 and 32; for one picture the model returns {_shapes(outputs)}"
        )
    scores = outputs[0][..., 4:]
    if scores.min() < 0 or scores.max() > 1:
        raise CutError(
            f"--output yolox reads scores after their sigmoid, 0..1, in columns 4 and up; the model returns {scores.min():.3g} to "
            f"{scores.max():.3g} there"
        )
    return int(shape[2]) - 5


def _boxes(outputs: Sequence[Floats], spec: Preprocess) -> int:
    shapes = [o.shape for o in outputs]
    fit = len(outputs) == 2 and all(len(s) == 3 for s in shapes) and shapes[0][1] == shapes[1][1] and shapes[0][2] == 4
    if not fit:
        raise CutError(
            f"--output boxes reads two tensors, boxes (N, P, 4) and scores (N, P, classes); for one picture the model returns "
            f"{_shapes(outputs)}"
        )
    boxes, scores = outputs
    if scores.size and (scores.min() < 0 or scores.max() > 1):
        raise CutError(
            f"--output boxes reads scores of 0..1, of shape {_shapes(outputs[1:])}; the model returns {scores.min():.3g} to "
            f"{scores.max():.3g} there"
        )
    if boxes.size and float(np.abs(boxes).max()) <= _PIXELS:
        raise CutError(
            f"--output boxes reads corners x1, y1, x2, y2 in pixels of the {spec.size_px[0]}x{spec.size_px[1]} input; the model's "
            f"lie within {boxes.min():.3g} to {boxes.max():.3g}, so they are fractions: multiply them by the input's size"
        )
    turned = float(np.mean((boxes[..., 2:] < boxes[..., :2]).any(axis=-1))) if boxes.size else 0.0
    if turned > 0.1:
        raise CutError(
            f"--output boxes reads corners x1, y1, x2, y2; {turned:.0%} of the model's boxes end before they begin, as centre and "
            "size would: convert them to corners"
        )
    return int(shapes[1][2])
