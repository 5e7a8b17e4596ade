"""How far answers through head, codec and tail are those of the user's whole file, at every operating point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos.errors import BundleError, ConfigError
from protos.messages import Answer, Box, Classification, Detection, Tensors
from splitters.codec import LatentCodec
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.model import OnnxModel
from splitters.cutting.onnx.pieces import whole_outputs
from splitters.tasks.base import TASKS, task_of
from splitters.tasks.decoding.boxes import iou_matrix
from splitters.tasks.preprocess import Frame

METRIC = "agreement"
_OVERLAPS = np.arange(0.5, 1.0, 0.05)
_FINDING = ("detection", "keypoints", "oriented", "instances")
_FEW = 24  # photographs that points are judged on

Array = np.ndarray[Any, Any]
Tail = Callable[[Sequence[Array]], list[Array]]
Decode = Callable[[Sequence[Array], Sequence[tuple[int, int]]], list[Answer]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """One operating point against the whole file.

    Attributes:
        photos: how many.
        found: of the whole file: boxes, or for a classifier photographs.
        matched: of them, those the point gives too: same class, boxes overlapping by half.
        box_px: largest difference of a matched box's side, in source pixels.
        score: largest difference of a matched score.
        accuracy: 0..1; boxes: F1 averaged over overlaps of .5 to .95; classes: 1 less the change of the best class's score, 0
            where it is another class; other tasks: their own measure; no answer
            on any photograph: 1 less the outputs' relative distance.
    """

    photos: int
    found: int
    matched: int
    box_px: float
    score: float
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """What is asked of each point, and what the whole file answers.

    Attributes:
        decode: outputs to answers.
        tail: the served tail.
        wanted: the whole file's answers, a photograph each.
        outputs: its raw outputs.
        sizes_px: (width, height) of the photographs.
    """

    decode: Decode
    tail: Tail
    wanted: tuple[Answer, ...]
    outputs: tuple[Sequence[Array], ...]
    sizes_px: tuple[tuple[int, int], ...]

    def check_found(self, task: str, postprocess: Mapping[str, Any]) -> None:
        """A detector finds something on one photograph at least: else nothing shows that its outputs are read rightly.

        Raises:
            ConfigError: it finds nothing on any.
        """
        kind = TASKS.get(task)
        if task not in _FINDING or any(kind.classes(answer) for answer in self.wanted):
            return
        raise ConfigError(
            f"the whole model finds nothing above {postprocess.get('score_min')} on {len(self.wanted)} photographs, so that "
            "nothing shows whether its outputs are read rightly: give --photos DIR with what it is made to find, a lower "
            "--score-min, another --output or --preprocess, or --allow-nothing-found"
        )

    def point(self, codec: LatentCodec, point_id: str, runs: Sequence[Sequence[Array]]) -> tuple[Agreement, list[Answer]]:
        """Latents of the photographs through the codec, decoded and compared."""
        answers, distances = [], []
        for latents, wanted, size in zip(runs, self.outputs, self.sizes_px, strict=False):
            payload = codec.encode(codec.quantise([t[0] for t in latents], point_id))
            outputs = self.tail([latent[None] for latent in codec.dequantise(codec.decode(payload))])
            answers.append(self.decode(outputs, [size])[0])
            distances.append(_distance(wanted, outputs))
        return _compared(self.wanted, answers, float(np.mean(distances))), answers


def judge(model: OnnxModel, decode: Decode, tail: Tail, photos: Sequence[Frame], feeds: Sequence[Feed]) -> Judge:
    """Runs the whole file on the photographs.

    Raises:
        ConfigError: its outputs do not have the form declared.
    """
    chosen = list(zip(photos, feeds, strict=True))[:_FEW]
    outputs = [whole_outputs(model, feed) for _, feed in chosen]
    sizes = tuple((photo.shape[1], photo.shape[0]) for photo, _ in chosen)
    try:
        wanted = tuple(decode(o, [size])[0] for o, size in zip(outputs, sizes, strict=True))
    except BundleError as error:
        raise ConfigError(f"--output does not fit what {model.path.name} returns: {error.message}") from error
    return Judge(decode=decode, tail=tail, wanted=wanted, outputs=tuple(outputs), sizes_px=sizes)


def _distance(wanted: Sequence[Array], got: Sequence[Array]) -> float:
    """Of all outputs, over their length; 1 where shapes differ."""
    if any(w.shape != g.shape for w, g in zip(wanted, got, strict=True)):
        return 1.0
    gap = sum(float(np.square(w.astype(np.float64) - g.astype(np.float64)).sum()) for w, g in zip(wanted, got, strict=True))
    length = sum(float(np.square(w.astype(np.float64)).sum()) for w in wanted)
    return min(1.0, float(np.sqrt(gap / length))) if length else float(gap > 0)


def _compared(wanted: Sequence[Answer], got: Sequence[Answer], distance: float) -> Agreement:
    found = matched = both = 0
    box_px = score = 0.0
    hits = np.zeros(len(_OVERLAPS))
    shares: list[float] = []
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(theirs, Detection) and isinstance(mine, Detection):
            pairs = _pairs(theirs.boxes, mine.boxes)
            found, matched, both = found + len(theirs.boxes), matched + len(pairs), both + len(theirs.boxes) + len(mine.boxes)
            for a, b, overlap in pairs:
                hits += overlap >= _OVERLAPS
                box_px = max(box_px, *(abs(x - y) for x, y in zip(a.box_px, b.box_px, strict=True)))
                score = max(score, abs(a.score - b.score))
        elif isinstance(theirs, Classification) and isinstance(mine, Classification):
            found += 1
            gap = abs(theirs.top[0].score - mine.top[0].score)
            same = theirs.top[0].class_id == mine.top[0].class_id
            matched, score = matched + same, max(score, gap)
            shares.append(1 - gap if same else 0.0)
        elif isinstance(theirs, Tensors):
            right, of = task_of(theirs).agreement(mine, theirs)
            found, matched = found + 1, matched + (right >= of - 1e-3)
            if of:
                shares.append(right / of)
    accuracy = float(np.mean(shares)) if shares else float((2 * hits / both).mean()) if both else 1 - distance
    return Agreement(
        photos=len(got), found=found, matched=matched, box_px=box_px, score=score, accuracy=round(min(1.0, max(0.0, accuracy)), 6)
    )


def _pairs(wanted: Sequence[Box], got: Sequence[Box]) -> list[tuple[Box, Box, float]]:
    """Boxes of the same class that overlap by half, each used once, best score first, with their overlap."""
    free, pairs = list(got), []
    for box in wanted:
        same = [b for b in free if b.class_id == box.class_id]
        if not same:
            continue
        overlap = iou_matrix(np.asarray([box.box_px], np.float32), np.asarray([b.box_px for b in same], np.float32))[0]
        best = int(overlap.argmax())
        if overlap[best] >= _OVERLAPS[0]:
            pairs.append((box, same[best], float(overlap[best])))
            free.remove(same[best])
    return pairs
