"""A prefilter fitted to one scene: a video from the camera, a detector as teacher, the first part calibrates, the rest tests.

Shape legend: F frames, K classes the prefilter knows, B boxes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, SourceError
from protos.messages import Detection
from splitters.bottleneck.narrow import narrow
from splitters.bundle import Bundle, replace_parts
from splitters.evaluation.gating.prefilter import Array, passage_scores, passages, present, roc_auc
from splitters.evaluation.steps import Told
from splitters.runtime.head import Head
from splitters.runtime.tail import load_tail
from splitters.runtime.video import VideoReader
from splitters.tasks.decoding.boxes import Detections, empty_detections, iou_matrix
from splitters.tasks.preprocess import Frame, input_image
from splitters.zoo.prefilter.promise import RECALLS, Calibration, score_at_precision, threshold_for

log = logging.getLogger(__name__)
UNSURE = 0.1  # a passage lasts while the teacher sees this much
_RIGHT_IOU = 0.5

Look = Callable[[Frame], Detections]
"""A detector: a BGR frame to its boxes, weak ones included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A video as the prefilter, the teacher and the bundle's own detector saw it.

    Attributes:
        category_ids: of the K classes.
        scores: the prefilter's, (F, K).
        confidence: of the teacher's surest box of each class, (F, K); 0 where there is none.
        own: scores of the bundle's own boxes (B,), whether the teacher confirms each (B,), and their frames (B,).
        answered: of the bundle's own surest box of each class, (F, K); 0 where there is none.
        fps: frames a second.
    """

    category_ids: tuple[int, ...]
    scores: Array
    confidence: Array
    own: tuple[Array, NDArray[np.bool_], NDArray[np.int64]]
    answered: Array
    fps: float

    def __len__(self) -> int:
        return len(self.scores)


def read_video(path: Path) -> tuple[Iterator[Frame], float, int]:
    """The frames of a video, BGR, its frames a second, and how many its container promises (0: it does not say).

    What is missing or damaged is said in a warning at the end.

    Raises:
        SourceError: it cannot be opened.
    """
    video = VideoReader(path, shown=str(path))
    counter = cv2.VideoCapture(str(path))
    count = max(0, int(counter.get(cv2.CAP_PROP_FRAME_COUNT)))
    counter.release()

    def frames() -> Iterator[Frame]:
        try:
            while (read := video.read()) is not None:
                yield read[0]
            if video.faults:
                log.warning("%s: %s", path, video.faults)
        finally:
            video.close()

    return frames(), video.fps or 25.0, count


def own_detector(bundle: Bundle) -> Look | None:
    """The bundle's whole model, as the server runs it; None where it holds none."""
    tail = load_tail(bundle)
    if not tail.takes_images:
        return None
    spec = bundle.manifest.preprocess

    def look(frame: Frame) -> Detections:
        (answer,) = tail.run_images([input_image(frame, spec)], [(frame.shape[1], frame.shape[0])])
        rows = [(*b.box_px, b.score, b.class_id) for b in narrow(answer, Detection).boxes]
        table = np.array(rows, np.float32).reshape(-1, 6)
        return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))

    return look


def watch(
    bundle: Bundle, frames: Iterable[Frame], fps: float, teacher: Look, *, sure: float, show: Told | None = None, count: int = 0
) -> Scene:
    """Runs prefilter, teacher and the bundle's own detector over a video.

    Args:
        bundle: a detector with a prefilter.
        frames: of one fixed camera.
        fps: of the video.
        teacher: says what is there.
        sure: from this score on the teacher's boxes confirm the detector's.
        show: told how many frames are watched, of how many.
        count: how many frames there should be; 0: not known.

    Raises:
        ConfigError: the bundle has no prefilter.
        SourceError: there is no frame.
    """
    if bundle.manifest.head.prefilter is None:
        raise ConfigError(f"bundle {bundle.manifest.name!r} has no prefilter to calibrate")
    ids = tuple(int(i) for i in json.loads(bundle.read_part(promise_part(bundle)))["category_ids"])
    head, own = Head(bundle), own_detector(bundle)
    scores, confidence, answered, boxes, right, at = [], [], [], [], [], []
    for index, frame in enumerate(frames):
        maps = head.stem_of(input_image(frame, bundle.manifest.preprocess))
        scores.append(np.asarray(head.prefilter_scores(maps))[: len(ids)])
        there = teacher(frame)
        found = own(frame) if own is not None else empty_detections()
        confidence.append(_best(there, ids))
        answered.append(_best(found, ids))
        for score, confirmed in _confirmed(found, there, ids, sure):
            boxes.append(score)
            right.append(confirmed)
            at.append(index)
        if show is not None:
            show(index + 1, max(count, index + 1), "frames")
    if not scores:
        raise SourceError("the video holds no frame")
    return Scene(
        category_ids=ids, scores=np.asarray(scores, np.float64), confidence=np.asarray(confidence, np.float64),
        own=(np.asarray(boxes, np.float64), np.asarray(right, bool), np.asarray(at, np.int64)),
        answered=np.asarray(answered, np.float64), fps=fps,
    )  # fmt: skip


def _best(found: Detections, ids: Sequence[int]) -> list[float]:
    return [float(found.scores[found.class_ids == c].max(initial=0.0)) for c in ids]


def _confirmed(found: Detections, there: Detections, ids: Sequence[int], sure: float) -> Iterator[tuple[float, bool]]:
    """Score of each box of a class in ``ids``, and whether the teacher has one of its class there."""
    certain = there.scores >= sure
    for box, score, category in zip(*found, strict=True):
        if int(category) in ids:
            same = there.boxes_px[certain & (there.class_ids == category)]
            yield float(score), bool(len(same)) and float(iou_matrix(box[None], same).max()) >= _RIGHT_IOU


def promise_part(bundle: Bundle) -> str:
    """Where the prefilter's promise lies in a bundle that has one."""
    return str(bundle.manifest.head.prefilter).removesuffix(".onnx") + ".json"


def columns_named(bundle: Bundle, interest: Sequence[str], category_ids: Sequence[int]) -> list[int]:
    """The prefilter's columns of the classes named.

    Raises:
        ConfigError: none is named, or the prefilter does not know one.
    """
    known = {bundle.manifest.labels.get(c, str(c)): k for k, c in enumerate(category_ids)}
    if not interest or any(name not in known for name in interest):
        raise ConfigError(f"the prefilter of {bundle.manifest.name!r} knows {', '.join(known)}; asked for {', '.join(interest)}")
    return [known[name] for name in interest]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What the first part of a scene says.

    Attributes:
        asked: for the recall asked for.
        others: for the recalls a client may ask for instead.
        sure: the own detector's score from which its boxes can be believed; None where that could not be measured.
        frames: how many calibrated.
        frames_positive: of them, with something of interest.
    """

    asked: Calibration
    others: tuple[Calibration, ...]
    sure: float | None
    frames: int
    frames_positive: int


def interesting(scene: Scene, columns: Sequence[int], sure: float) -> tuple[Array, NDArray[np.bool_]]:
    """The prefilter's score of interest, and whether there is something, of every frame (F,)."""
    chosen = list(columns)
    positive = present(scene.confidence[:, chosen].max(axis=1), sure, unsure=min(UNSURE, sure), gap=round(scene.fps))
    return scene.scores[:, chosen].max(axis=1), positive


def fit(scene: Scene, columns: Sequence[int], recall: float, *, sure: float, until: int) -> Fit:
    """Calibrates on the first ``until`` frames; the independent units are passages.

    A passage counts as kept when the threshold lets at least the share ``recall`` of its frames through.

    Raises:
        ConfigError: nothing of interest passed by.
    """
    scores, positive = interesting(scene, columns, sure)
    runs = passages(positive[:until], gap=round(scene.fps))
    if not runs:
        raise ConfigError("nothing of interest passes in the part that calibrates: take a longer video")
    found = [threshold_for(passage_scores(scores[:until], runs, r), r) for r in (recall, *RECALLS)]
    boxes, right, at = scene.own
    early = at < until
    return Fit(
        asked=found[0], others=tuple(found[1:]), sure=score_at_precision(boxes[early], right[early]),
        frames=until, frames_positive=int(positive[:until].sum()),
    )  # fmt: skip


def examine(scene: Scene, columns: Sequence[int], fitted: Fit, *, sure: float) -> dict[str, Any]:
    """How the fitted threshold does on the frames after those that calibrated it."""
    everything, positive = interesting(scene, columns, sure)
    raw = scene.confidence[:, list(columns)].max(axis=1)[fitted.frames :] >= sure
    scores, there = everything[fitted.frames :], positive[fitted.frames :]
    sent = scores >= fitted.asked.threshold
    runs = passages(there, gap=round(scene.fps))

    def share(hits: NDArray[np.bool_]) -> float | None:
        return round(float(hits.mean()), 4) if hits.size else None

    def area(truth: NDArray[np.bool_]) -> float | None:
        return round(roc_auc(scores, truth), 4) if truth.any() and not truth.all() else None

    reached = np.sort(scores[there])[int(np.floor((1 - fitted.asked.recall_asked) * there.sum() + 1e-9))] if there.any() else 0.0
    return {
        "frames": len(scores), "frames_positive": int(there.sum()), "passages": len(runs),
        "passages_seen": sum(bool(sent[r].any()) for r in runs), "recall": share(sent[there]), "stopped": share(~sent),
        "empty_stopped": share(~sent[~there]), "stopped_at_that_recall_by_hindsight": share(scores < reached),
        "roc_auc": area(there),
        "frames_where_the_teacher_is_sure": int(raw.sum()), "recall_where_the_teacher_is_sure": share(sent[raw]),
        "roc_auc_against_single_frames": area(raw), "roc_auc_a_perfect_filter_would_have_there": _ceiling(raw, there),
    }  # fmt: skip


def _ceiling(raw: NDArray[np.bool_], there: NDArray[np.bool_]) -> float | None:
    """The area of a filter that knows every passage, judged by single frames where the teacher is sure."""
    return round(roc_auc(there.astype(np.float64), raw), 4) if raw.any() and not raw.all() else None


def store(bundle: Bundle, interest: Sequence[str], fitted: Fit, told: str) -> Bundle:
    """Writes the promise into the bundle's ``device/prefilter.json``; the bundle's hash changes with it.

    Args:
        bundle: whose prefilter was fitted.
        interest: the classes it was fitted for.
        fitted: to what.
        told: on what, in words.
    """
    path = promise_part(bundle)
    old = json.loads(bundle.read_part(path))
    known = sure if (sure := fitted.sure) is not None else old.get("sure")
    least = float(bundle.manifest.postprocess.get("score_min", 0.0))
    new = {
        "category_ids": old["category_ids"], "interest": list(interest), **fitted.asked.to_json(), "unit": "passage",
        "calibrated_on": told, "recalls": [c.to_json() for c in fitted.others],
        # What photos said of these classes is void on this scene; of other classes it is all there is.
        "calibrated": [g for g in old.get("calibrated", ()) if set(g["interest"]) != set(interest)],
        **({"sure": max(least, known)} if known is not None else {}),
    }  # fmt: skip
    return replace_parts(bundle, {path: json.dumps(new, indent=1).encode()})
