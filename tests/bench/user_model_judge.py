"""How far one answer lies from another, in the tolerance of its task (see `tests.bench.user_models`).

A distance of 1 is what an answer may just differ by: .5 px of the model's input for a box, a key point or a turned box's corner,
.005 for a score, and 1e-3 of the largest value for a mask's numbers, a vector, or a tensor that no task reads. Pixels are those
of the model's input, so that no row depends on how large a photograph it was shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from splitters.bundle.manifest import Manifest
from splitters.tasks.base import open_task
from splitters.tasks.decoding import Kept, declared, declared_decoding
from splitters.tasks.objects import KeypointsTask, OrientedTask

BOX_PX, SCORE, VECTOR = 0.5, 0.005, 1e-3
OBJECTS = ("detection", "keypoints", "oriented", "instances")

Outputs = Sequence[np.ndarray[Any, Any]]


def distance(manifest: Manifest, mine: Outputs, wanted: Outputs) -> float:
    """Of raw outputs, read as the manifest declares, before a threshold or a suppression chooses among near equals.

    Rows among which nothing is suppressed are a set, and compared as one: those of the graph's own top-k change places where
    they score alike.

    Args:
        manifest: of the bundle.
        mine: what came through head, codec and tail.
        wanted: what the whole file returns.
    """
    if manifest.task in OBJECTS:
        return _objects(manifest, mine, wanted)
    if manifest.task == "classification":
        scores = declared_decoding(manifest.postprocess).scores
        return _largest(scores.read(mine), scores.read(wanted)) / SCORE
    return raw(mine, wanted) / VECTOR


def raw(mine: Outputs, wanted: Outputs) -> float:
    """The largest difference of any output over its largest value, whatever it means."""
    return max((relative(a, b) for a, b in zip(mine, wanted, strict=True)), default=0.0)


def relative(mine: Any, wanted: Any) -> float:
    """The largest difference over the largest value."""
    return _largest(mine, wanted) / (float(np.abs(np.asarray(wanted, np.float64)).max(initial=0.0)) or 1.0)


def _largest(mine: Any, wanted: Any) -> float:
    a, b = (np.asarray(each, np.float64) for each in (mine, wanted))
    return float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else float("inf")


def _objects(manifest: Manifest, mine: Outputs, wanted: Outputs) -> float:
    how = declared_decoding(manifest.postprocess)
    masks = 0.0
    if how.task == "instances" and isinstance(how.prototypes, int):
        masks = relative(mine[how.prototypes], wanted[how.prototypes]) / VECTOR
    (a, sure_a), (b, sure_b) = (_rows(manifest, each, wanted) for each in (mine, wanted))
    if how.suppression == "none":
        return max(masks, _one_way(a, b, sure_a), _one_way(b, a, sure_b))
    return max(masks, _largest(a, b))


def _rows(manifest: Manifest, outputs: Outputs, wanted: Outputs) -> tuple[Any, Any]:
    """All rows of one frame, every column over its tolerance; and how sure each is."""
    height, width = manifest.preprocess.size_px
    read = declared(manifest.postprocess, manifest.preprocess).candidates
    found = read(outputs)
    boxes, scores = found.boxes_px[0], found.scores[0].astype(np.float64)
    sure = scores.max(axis=1, initial=0.0)
    columns = [np.clip(boxes, 0, [width, height] * 2) / BOX_PX, scores / SCORE]
    if found.class_ids is not None:
        columns.append(np.rint(found.class_ids[0]) * 1e6)  # another class is never near
    task = open_task(manifest)
    if found.extras is not None and isinstance(task, KeypointsTask | OrientedTask):
        row = Kept(boxes_px=boxes, scores=scores, class_ids=np.zeros(len(boxes), np.int64), extras=found.extras[0])
        (points,) = (v for k, v in task.more(row, outputs, 0, (width, height)).items() if k in ("keypoints", "corners"))
        units = [BOX_PX, BOX_PX, SCORE][: points.shape[2]]
        columns.append((points / np.asarray(units)).reshape(len(boxes), -1))
    elif found.extras is not None:
        columns.append(found.extras[0] / (VECTOR * float(np.abs(read(wanted).extras).max())))
    return np.concatenate(columns, axis=1), sure


def _one_way(rows: Any, others: Any, sure: Any) -> float:
    """How far the row lies that has the farthest next one; the least sure, unless all are alike, may have fallen off the end."""
    surer = sure > sure.min(initial=np.inf) + SCORE
    counted = rows[surer] if surer.any() else rows
    if not len(others):
        return float("inf") if len(counted) else 0.0
    return max((float(np.abs(others - row).max(axis=1).min()) for row in counted), default=0.0)
