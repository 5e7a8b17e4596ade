"""What an evaluation found, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint
from splitters.evaluation.alone import DeviceWork
from splitters.evaluation.bdrate import BdRate, Curve
from splitters.profiling.encoder_cost import EncoderCost

Gap = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Jpeg95:
    """The published bar of generalised head network distillation, read on our own curve: accuracy lost at a share of JPEG's bytes.

    Matsubara & Levorato (2020, arXiv 2007.15818) lose 1.4 AP points at 28 % of the bytes of a JPEG of quality 95.

    Attributes:
        jpeg_bytes: mean bytes of the same inputs as JPEG of quality 95.
        jpeg_accuracy: of the whole model on those.
        share: at most so much of ``jpeg_bytes``.
        point: id of the most accurate operating point within; None where none is.
        point_bytes: its mean bytes.
        lost: accuracy of the whole model on uncompressed inputs minus the point's, (value, low, high), paired.
        lost_to_jpeg: the same against the whole model on the JPEGs.
    """

    jpeg_bytes: float
    jpeg_accuracy: float
    share: float
    point: int | None = None
    point_bytes: float = 0.0
    lost: Gap | None = None
    lost_to_jpeg: Gap | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was measured.

    Attributes:
        model: the bundle's name.
        photos: how many.
        metric: ``top1``, ``agreement`` or ``ap``.
        whole: the whole model's accuracy on the uncompressed photos; NaN where the bundle holds none.
        points: operating points with bytes, accuracy, head ms and Pareto marks.
        gaps: accuracy of each point minus the whole model's, (value, low, high), paired bootstrap.
        curves: measured curves, the bundle's first.
        bd_rates: against each image codec, of the whole frontier and of each encoder tier.
        encode_ms: of each image codec at its middle quality and full size.
        jpeg95: for detectors compared with image codecs.
        offloads: what the device may send instead, JPEG and WebP, with bytes and accuracy: the frontier.
        local: accuracy of the bundle's local model; None where it has none.
        unreadable: photos that could not be read and were left out.
        best_f1: of a detector judged by labels: the score from which on the best point's boxes give the best F1 at IoU .50, and
            that F1.
        encoders: what each set of graphs on the device weighs.
        work: the whole model alone on the device at smaller inputs, where it was asked for.
        also: other figures of the whole model (key -1) and of each point, by name: a detector's ``ap50``.
    """

    model: str
    photos: int
    metric: str
    whole: float
    points: tuple[OperatingPoint, ...]
    gaps: Mapping[int, Gap]
    curves: tuple[Curve, ...]
    bd_rates: Mapping[str, Mapping[str, BdRate | str]]
    encode_ms: Mapping[str, float]
    jpeg95: Jpeg95 | None = None
    also: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    offloads: tuple[OffloadOption, ...] = ()
    local: float | None = None
    unreadable: tuple[str, ...] = ()
    best_f1: tuple[float, float] | None = None
    encoders: tuple[EncoderCost, ...] = ()
    work: DeviceWork | None = None

    @property
    def top(self) -> OperatingPoint:
        """The operating point of the most bytes."""
        return max(self.points, key=lambda p: p.payload_bytes.p50)

    def to_json(self) -> dict[str, Any]:
        """As `splitters evaluate --json` prints it."""
        every = self.bd_rates.get("all tiers", {})
        told = {
            "model": self.model, "photos": self.photos, "accuracy_metric": self.metric, "whole_model": self.whole,
            **({"whole_model_also": dict(self.also[-1])} if self.also.get(-1) else {}),
            "points": [{**p.to_json(), **self.also.get(p.id, {}), "gap": self.gaps.get(p.id)} for p in self.points],
            "top_point": {"id": self.top.id, "gap": self.gaps.get(self.top.id)},
            "bd_rate_percent": {codec: r.percent if isinstance(r, BdRate) else None for codec, r in every.items()},
            "bd_rates": {t: {c: _plain(r) for c, r in row.items()} for t, row in self.bd_rates.items()},
            "baselines": {c.name: _table(c) for c in self.curves[1:]},
            "encode_ms": dict(self.encode_ms),
            "encoders": [cost.to_json() for cost in self.encoders],
            "offloads": [asdict(o) for o in self.offloads], "local": self.local,
            "unreadable": list(self.unreadable),
            **({"device_work": self.work.to_json()} if self.work else {}),
            **({"score_min": self.best_f1[0], "f1": self.best_f1[1]} if self.best_f1 else {}),
        }  # fmt: skip
        return told | ({"jpeg95": asdict(self.jpeg95)} if self.jpeg95 else {})


def _plain(rate: BdRate | str) -> dict[str, float] | str:
    return asdict(rate) if isinstance(rate, BdRate) else rate


def _table(curve: Curve) -> list[list[str | float]]:
    """Setting, mean bytes and accuracy of every point."""
    return [[label, *map(float, row)] for label, row in zip(curve.labels, curve.points(), strict=True)]


def dump(report: Report, path: Path) -> None:
    """Writes the report as JSON."""
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
