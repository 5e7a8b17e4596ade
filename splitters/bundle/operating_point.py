"""Operating points: one setting of every knob, with what it was measured to cost and to give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from protos.errors import BundleError
from protos.schema import checked, read_json

MAX_POINTS = 4096
_MAX_QUANTITY = 1e12  # bytes or milliseconds
Count = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Name = Annotated[str, msgspec.Meta(max_length=100)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """Median and 95th percentile of one measured quantity."""

    p50: float
    p95: float

    def __post_init__(self) -> None:
        if not (0 <= self.p50 <= _MAX_QUANTITY and 0 <= self.p95 <= _MAX_QUANTITY):
            raise BundleError(f"quantiles must lie in 0..{_MAX_QUANTITY:g}, got p50={self.p50}, p95={self.p95}")

    @classmethod
    def of(cls, values: ArrayLike) -> Quantiles:
        """Of measured values, at least one."""
        p50, p95 = np.percentile(np.asarray(values, np.float64), (50, 95))
        return cls(p50=float(p50), p95=float(p95))

    def scaled(self, factor: float) -> Quantiles:
        """Both times a factor, and at most what can be said."""
        return Quantiles(p50=min(self.p50 * factor, _MAX_QUANTITY), p95=min(self.p95 * factor, _MAX_QUANTITY))


UNMEASURED = Quantiles(p50=0.0, p95=0.0)
UNMEASURED_METRIC = "unmeasured"


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """One setting of every knob.

    Attributes:
        id: unique within the bundle, 0..65535; travels in every payload.
        encoders: how many encoders run, 1..E (1 where the head is a single graph).
        width: fraction of the slimmable layers' channels in use, (0, 1].
        channels: latent channels kept.
        bits: bits per symbol at most (plain latents), or the log2 of the gain tier's span.
        codec_point: the latent codec's own point (gain tier and channels, or bits); several operating points may share
            one. Empty: the id as text.
        graphs: encoder parts, by name in the manifest, run on the stem's output and summed; empty: the stem's
            outputs are the latents.
        payload_bytes: of one frame, header and all layers included.
        accuracy: 0..1, in ``accuracy_metric``; measured on real payloads, or 0 where not measured yet.
        accuracy_metric: e.g. ``top1`` or ``ap``.
        head_ms: stem and encoders on the machine that measured the table; a prior, the client measures its own.
        pareto: on the frontier of (payload_bytes, head_ms, accuracy).
    """

    id: int
    encoders: Count = 1
    width: float = 1.0
    channels: Count
    bits: Annotated[float, msgspec.Meta(gt=0, le=64)]
    codec_point: Name = ""
    graphs: tuple[str, ...] = ()
    payload_bytes: Quantiles = field(default=UNMEASURED)
    accuracy: float = 0.0
    accuracy_metric: Name = UNMEASURED_METRIC
    head_ms: Quantiles = field(default=UNMEASURED)
    pareto: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.id <= 0xFFFF:
            raise BundleError(f"operating point id must be 0..65535, got {self.id}")
        if not 0 < self.width <= 1 or self.encoders < 1 or self.channels < 1 or self.bits <= 0:
            raise BundleError(f"operating point {self.id}: width in (0, 1], encoders, channels >= 1 and bits > 0 are required")
        if not 0 <= self.accuracy <= 1:
            raise BundleError(f"operating point {self.id}: accuracy must be a fraction 0..1, got {self.accuracy}")
        if not self.codec_point:
            object.__setattr__(self, "codec_point", str(self.id))

    @property
    def measured(self) -> bool:
        """Whether what it costs and gives was measured."""
        return self.accuracy_metric != UNMEASURED_METRIC and self.payload_bytes.p50 > 0

    def to_json(self) -> dict[str, Any]:
        """The point as plain JSON types."""
        return {**asdict(self), "graphs": list(self.graphs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OperatingPoint:
        """Reads what ``to_json`` wrote.

        Raises:
            BundleError: a field is missing, unknown or out of range.
        """
        return checked(dict(data), cls, what="an operating point")


def _dominates(a: OperatingPoint, b: OperatingPoint) -> bool:
    no_worse = a.payload_bytes.p50 <= b.payload_bytes.p50 and a.head_ms.p50 <= b.head_ms.p50 and a.accuracy >= b.accuracy
    better = a.payload_bytes.p50 < b.payload_bytes.p50 or a.head_ms.p50 < b.head_ms.p50 or a.accuracy > b.accuracy
    return no_worse and better


def mark_pareto(points: Iterable[OperatingPoint]) -> list[OperatingPoint]:
    """The same points with ``pareto`` set where no other is at least as good in bytes, head ms and accuracy."""
    all_points = list(points)
    return [replace(p, pareto=not any(_dominates(q, p) for q in all_points)) for p in all_points]


def best_point(points: Sequence[OperatingPoint]) -> OperatingPoint:
    """The most accurate point; among equals the one of the fewest bytes, then of the shortest head time."""
    return max(points, key=lambda p: (p.accuracy, -p.payload_bytes.p50, -p.head_ms.p50, -p.id))


def dump_points(points: Iterable[OperatingPoint]) -> str:
    """``operating_points.json`` as text."""
    return json.dumps([p.to_json() for p in points], indent=1) + "\n"


def load_points(text: str | bytes) -> tuple[OperatingPoint, ...]:
    """Reads ``operating_points.json``.

    Raises:
        BundleError: not JSON, empty, ids repeated, or a point is invalid.
    """
    points = read_json(text, tuple[OperatingPoint, ...], what="operating_points.json")
    if not 1 <= len(points) <= MAX_POINTS:
        raise BundleError(f"operating_points.json lists {len(points)} points; 1..{MAX_POINTS} are allowed")
    if len({p.id for p in points}) != len(points):
        raise BundleError("operating_points.json holds the same id twice")
    return points
