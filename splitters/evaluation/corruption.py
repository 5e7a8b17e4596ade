"""Poor pictures: what darkness, noise, blur and JPEG cost the bundle beside what they cost its own whole model.

After Hendrycks & Dietterich (2019, arXiv 1903.12261), three strengths each; the model's input pictures are corrupted, a letterbox's
border is not. Truth are the labels, or the whole model's answers on the clean pictures.

Shape legend: M photos; pictures are (H, W, 3) uint8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from protos.errors import ConfigError
from splitters.bundle import Bundle
from splitters.bundle.operating_point import OperatingPoint, best_point
from splitters.evaluation.bdrate import interval
from splitters.evaluation.image_codecs import Picture
from splitters.evaluation.judging.tasks import Score
from splitters.evaluation.measure import Photos, run_points, run_whole
from splitters.evaluation.report import Gap
from splitters.evaluation.run import Bench, EvaluateConfig, Tick, open_bench
from splitters.evaluation.steps import Steps, Told
from splitters.runtime.head import open_codec

log = logging.getLogger(__name__)
STRENGTHS = (1, 2, 3)
_DARK = (0.5, 0.25, 0.12)  # of the light
_NOISE = (8.0, 16.0, 32.0)  # standard deviation, of 255
_BLUR = (0.01, 0.02, 0.03)  # standard deviation, of the picture's shorter side
_JPEG = (25, 12, 6)  # quality


def _darkened(picture: Picture, strength: int, _rng: np.random.Generator) -> Picture:
    """Less light on the sensor, then a camera's curve: values fall in linear light."""
    linear = (np.arange(256) / 255) ** 2.2 * _DARK[strength - 1]
    table = np.rint(255 * linear ** (1 / 2.2)).astype(np.uint8)
    return table[picture]


def _noisy(picture: Picture, strength: int, rng: np.random.Generator) -> Picture:
    noise = rng.normal(0, _NOISE[strength - 1], picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def _blurred(picture: Picture, strength: int, _rng: np.random.Generator) -> Picture:
    sigma = _BLUR[strength - 1] * min(picture.shape[:2])
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.uint8)


def _compressed(picture: Picture, strength: int, _rng: np.random.Generator) -> Picture:
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG[strength - 1]])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


CORRUPTIONS: dict[str, Callable[[Picture, int, np.random.Generator], Picture]] = {
    "dark": _darkened, "noise": _noisy, "blur": _blurred, "jpeg": _compressed,
}  # fmt: skip


def corrupted(photos: Photos, name: str, strength: int, seed: int = 0) -> Photos:
    """The photos, poorer; the same for the same seed.

    Args:
        photos: clean ones.
        name: one of ``CORRUPTIONS``.
        strength: 1 to 3.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    pictures = photos.pictures.copy()
    for picture, area in zip(pictures, photos.content, strict=True):
        picture[area] = CORRUPTIONS[name](np.ascontiguousarray(picture[area]), strength, rng)
    return replace(photos, pictures=pictures)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """What one corruption costs.

    Attributes:
        corruption: its name; ``clean`` for none.
        strength: 1 to 3; 0 for none.
        whole: accuracy of the whole model.
        points: accuracy of each operating point.
        more: what each point loses beyond what the whole model loses, (value, low, high), paired bootstrap.
    """

    corruption: str
    strength: int
    whole: float
    points: dict[int, float]
    more: dict[int, Gap]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionReport:
    """All corruptions at all strengths, the clean photos first."""

    model: str
    photos: int
    metric: str
    bytes_mean: dict[int, float]
    rows: tuple[Lost, ...]

    @property
    def worst(self) -> dict[int, float]:
        """The most that each point loses beyond the whole model."""
        return {i: max(row.more[i][0] for row in self.rows) for i in self.bytes_mean}

    def to_json(self) -> dict[str, Any]:
        """As ``splitters evaluate --corrupt --json`` prints it."""
        return {
            "model": self.model, "photos": self.photos, "accuracy_metric": self.metric, "worst_more": self.worst,
            "bytes_mean": self.bytes_mean,
            "corrupted": [
                {"corruption": r.corruption, "strength": r.strength, "whole_model": r.whole, "points": r.points, "more": r.more}
                for r in self.rows
            ],
        }  # fmt: skip


def evaluate_corrupted(
    bundle: Bundle, config: EvaluateConfig, names: Sequence[str], *, points: Sequence[int] | None = None,
    tick: Tick = log.info, show: Told | None = None,
) -> CorruptionReport:  # fmt: skip
    """Measures whole model and operating points on clean and on corrupted photos.

    Args:
        bundle: with a whole model.
        config: what to measure on; nothing is compared with image codecs.
        names: of ``CORRUPTIONS``.
        points: ids; None: the most accurate point, and the most accurate one of half its bytes or less.
        tick: told of every finished setting.
        show: told how many photos are done.

    Raises:
        ConfigError: an unknown corruption or point, or a bundle without whole model.
    """
    unknown = [n for n in names if n not in CORRUPTIONS]
    if unknown or not names:
        raise ConfigError(f"--corrupt takes {', '.join(CORRUPTIONS)}, comma-separated, not {', '.join(unknown) or 'nothing'}")
    chosen = _chosen(bundle.points, points)
    bench = open_bench(bundle, replace(config, against=()), tick, None)
    if bench.whole is None:
        raise ConfigError("this bundle holds no whole model to compare with")
    each = Steps((1 + len(names) * len(STRENGTHS)) * len(bench.photos) * (1 + len(chosen)), show)
    whole, found, sizes = _scores(bench, bench.photos, chosen, each)
    clean = whole, found
    rows = [Lost(corruption="clean", strength=0, whole=whole.value, points=_values(found), more=_more(clean, (whole, found)))]
    for name in names:
        for strength in STRENGTHS:
            whole, found, _ = _scores(bench, corrupted(bench.photos, name, strength), chosen, each)
            more = _more(clean, (whole, found))
            rows.append(Lost(corruption=name, strength=strength, whole=whole.value, points=_values(found), more=more))
            tick(f"{name} {strength}")
    return CorruptionReport(
        model=bundle.manifest.name, photos=len(bench.photos), metric=bench.judge.metric, bytes_mean=sizes, rows=tuple(rows)
    )


def _chosen(points: Sequence[OperatingPoint], ids: Sequence[int] | None) -> list[OperatingPoint]:
    if ids is not None:
        if missing := set(ids) - {p.id for p in points}:
            raise ConfigError(f"there is no operating point {', '.join(map(str, sorted(missing)))}")
        return [p for p in points if p.id in ids]
    best = best_point(points)
    smaller = [p for p in points if p.payload_bytes.p50 <= best.payload_bytes.p50 / 2]
    return [best, *([best_point(smaller)] if smaller else [])]


def _scores(
    bench: Bench, photos: Photos, points: Sequence[OperatingPoint], each: Callable[[], None]
) -> tuple[Score, dict[int, Score], dict[int, float]]:
    whole = bench.score(run_whole(bench.tail, photos, each=each))
    measured = run_points(bench.bundle, open_codec(bench.bundle), bench.tail, photos, points, tick=bench.tick, each=each)
    return whole, {i: bench.score(m.answers) for i, m in measured.items()}, {i: float(m.sizes.mean()) for i, m in measured.items()}


def _values(scores: dict[int, Score]) -> dict[int, float]:
    return {i: s.value for i, s in scores.items()}


def _more(clean: tuple[Score, dict[int, Score]], poor: tuple[Score, dict[int, Score]]) -> dict[int, Gap]:
    """What each point loses beyond the whole model."""
    more = {}
    for i, score in poor[1].items():
        value = (clean[1][i].value - score.value) - (clean[0].value - poor[0].value)
        drawn = (clean[1][i].drawn - score.drawn) - (clean[0].drawn - poor[0].drawn)
        more[i] = (float(value), *interval(drawn))
    return more
