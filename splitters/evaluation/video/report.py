"""What a comparison with video codecs found, its JSON and its picture.

Shape legend: D resampled sets of segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.evaluation.bdrate import Array, BdRate, Curve, bd_rate, interval
from splitters.evaluation.video.codecs import VideoSetting

_ENOUGH = 0.8  # of the draws must be comparable


@dataclass(frozen=True, kw_only=True, slots=True)
class OurPoint:
    """One operating point with the reference some frames back.

    Attributes:
        id: the operating point's.
        reference_age: frames back.
        bytes_mean: over all frames, key frames included.
        key_bytes: of the first frame.
        predicted_bytes: mean of the predicted frames; NaN where there are none.
        key_frames: how many there were.
        accuracy: in the clip's metric.
        encode_ms, decode_ms: median of the predicted frames, one thread.
        head_ms: median, beside it.
    """

    id: int
    reference_age: int
    bytes_mean: float
    key_bytes: float
    predicted_bytes: float
    key_frames: int
    accuracy: float
    encode_ms: float
    decode_ms: float
    head_ms: float

    @classmethod
    def of(
        cls, point: OperatingPoint, age: int, sizes: Array, predicted: NDArray[np.bool_], accuracy: float, ms: tuple[Array, Array],
        head: Mapping[tuple[str, ...], Quantiles],
    ) -> OurPoint:  # fmt: skip
        """From what was measured of every frame."""
        counted = predicted if predicted.any() else ~predicted
        return cls(
            id=point.id, reference_age=age, bytes_mean=float(sizes.mean()), key_bytes=float(sizes[0]),
            predicted_bytes=float(sizes[predicted].mean()) if predicted.any() else float("nan"), key_frames=int((~predicted).sum()),
            accuracy=accuracy, encode_ms=float(np.median(ms[0][counted])), decode_ms=float(np.median(ms[1][counted])),
            head_ms=head[point.graphs].p50,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TheirPoint:
    """One setting of a video codec: mean bytes a frame, the first frame's, accuracy, median encode ms on one thread."""

    codec: str
    crf: int
    share: float
    bytes_mean: float
    key_bytes: float
    accuracy: float
    encode_ms: float

    @classmethod
    def of(cls, setting: VideoSetting, sizes: Array, accuracy: float, encode_ms: float) -> TheirPoint:
        """From what was measured of every frame."""
        return cls(
            codec=setting.codec, crf=setting.crf, share=setting.share, bytes_mean=float(sizes.mean()), key_bytes=float(sizes[0]),
            accuracy=accuracy, encode_ms=encode_ms,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipReport:
    """One clip: all points, and the curves they form (``ours 1`` … and the codecs' names)."""

    name: str
    frames: int
    fps: float
    metric: str
    ours: tuple[OurPoint, ...]
    theirs: tuple[TheirPoint, ...]
    curves: Mapping[str, Curve]

    @property
    def codecs(self) -> list[str]:
        """The video codecs compared with."""
        return [name for name in self.curves if not name.startswith("ours ")]

    def bd_rate(self, codec: str, age: int) -> BdRate | str:
        """Bytes of ours at equal accuracy, or why they cannot be compared."""
        try:
            percent, low, high = bd_rate(self.curves[codec].points(), self.curves[f"ours {age}"].points())
            drawn = self.drawn(codec, age)
        except ConfigError as error:
            return error.message
        bounds = interval(drawn)
        return BdRate(percent=percent, low=bounds[0], high=bounds[1], accuracy_from=low, accuracy_to=high)

    def drawn(self, codec: str, age: int) -> Array:
        """BD-rate of every resampled set, NaN where it cannot be compared, (D,).

        Raises:
            ConfigError: that is so for many.
        """
        pairs = zip(self.curves[codec].drawn_points(), self.curves[f"ours {age}"].drawn_points(), strict=True)
        figures = np.array([_figure(theirs, ours) for theirs, ours in pairs])
        if np.isfinite(figures).mean() < _ENOUGH:
            raise ConfigError("the curves hardly overlap: too few frames, or too different")
        return figures


def _figure(anchor: Array, test: Array) -> float:
    finite = [p[np.isfinite(p).all(axis=1)] for p in (anchor, test)]
    try:
        return bd_rate(*finite)[0]
    except ConfigError:
        return float("nan")


def compare_clips(clips: Sequence[ClipReport], ages: Sequence[int]) -> dict[int, dict[str, BdRate | str]]:
    """Mean over the clips of their BD-rates, by age of the reference and codec; a clip that cannot be compared is named."""
    return {age: {codec: _mean(clips, codec, age) for codec in clips[0].codecs} for age in ages}


def _mean(clips: Sequence[ClipReport], codec: str, age: int) -> BdRate | str:
    found = [(c, c.bd_rate(codec, age)) for c in clips]
    for clip, rate in found:
        if isinstance(rate, str):
            return f"{clip.name}: {rate}"
    rates = [r for _, r in found if isinstance(r, BdRate)]
    drawn = np.mean([c.drawn(codec, age) for c in clips], axis=0)
    low, high = interval(drawn)
    spans = [r.accuracy_from for r in rates], [r.accuracy_to for r in rates]
    return BdRate(
        percent=float(np.mean([r.percent for r in rates])), low=low, high=high,
        accuracy_from=float(np.mean(spans[0])), accuracy_to=float(np.mean(spans[1])),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoReport:
    """All clips, and the mean over them by age of the reference and codec."""

    model: str
    clips: tuple[ClipReport, ...]
    overall: Mapping[int, Mapping[str, BdRate | str]]

    def to_json(self) -> dict[str, Any]:
        """As `splitters evaluate --video --json` prints it; the first age is the headline."""
        ages = list(self.overall)
        return {
            "model": self.model,
            "video": {
                c.name: {
                    "frames": c.frames, "fps": c.fps, "accuracy_metric": c.metric, "points": [_clean(asdict(p)) for p in c.ours],
                    "baselines": [asdict(p) for p in c.theirs],
                    "bd_rate_percent": {codec: _percent(c.bd_rate(codec, ages[0])) for codec in c.codecs},
                    "bd_rates": {str(a): {codec: _plain(c.bd_rate(codec, a)) for codec in c.codecs} for a in ages},
                }
                for c in self.clips
            },
            "video_bd_rate_percent": {codec: _percent(r) for codec, r in self.overall[ages[0]].items()},
            "video_bd_rates": {str(a): {codec: _plain(r) for codec, r in row.items()} for a, row in self.overall.items()},
        }  # fmt: skip


def _percent(rate: BdRate | str) -> float | None:
    return rate.percent if isinstance(rate, BdRate) else None


def _plain(rate: BdRate | str) -> dict[str, float] | str:
    return asdict(rate) if isinstance(rate, BdRate) else rate


def _clean(point: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON."""
    return {k: None if isinstance(v, float) and v != v else v for k, v in point.items()}


def plot_video(report: VideoReport, path: Path) -> None:
    """One panel a clip: accuracy over mean bytes a frame, every setting a dot, every curve its Pareto front."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from splitters.evaluation.bdrate import front

    columns = min(3, len(report.clips))
    rows = -(-len(report.clips) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axis, clip in zip(axes.ravel(), report.clips, strict=False):
        for name, curve in clip.curves.items():
            points = curve.points()
            (line,) = axis.plot(*front(points).T, label=name.replace("ours", "ours, reference back by"))
            axis.scatter(*points.T, s=8, color=line.get_color())
        axis.set(xscale="log", xlabel="bytes a frame", ylabel=clip.metric, title=clip.name)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes.ravel()[len(report.clips) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
