"""Accuracy against real payload bytes: every operating point of a bundle, beside image codecs feeding the same model.

``evaluate`` measures, ``Report`` holds what was found, and `splitters.bundle.rewrite_points` stores the table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from protos.errors import ConfigError
from splitters.bundle import Bundle
from splitters.codec import LatentCodec, codec_from_spec
from splitters.evaluation.bdrate import BdRate, Curve, compare
from splitters.evaluation.image_codecs import Setting, ladder
from splitters.evaluation.measure import (
    Device,
    Measured,
    Photos,
    encode_ms,
    load_photos,
    quantiles,
    run_image_codec,
    run_points,
    run_whole,
)
from splitters.evaluation.tasks import AveragePrecision, Judge, TopOne, list_images, read_labels
from splitters.operating_point import OperatingPoint, mark_pareto
from splitters.tails import Tail, load_tail

log = logging.getLogger(__name__)
Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        images: folder of photos.
        labels: JSON {file name: class index}, a COCO instances.json for detectors, or None for agreement with the
            whole model.
        against: image codecs to compare with.
        qualities: of the image codecs; None for the standard ladder.
        limit: at most so many photos, evenly spread.
        draws: of the bootstrap.
        cache: folder in which the image codecs' results are kept between calls.
    """

    images: Path
    labels: Path | None = None
    against: tuple[str, ...] = ("jpeg", "webp", "avif")
    qualities: tuple[int, ...] | None = None
    limit: int | None = None
    draws: int = 1000
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was measured.

    Attributes:
        model: the bundle's name.
        photos: how many.
        metric: ``top1``, ``agreement`` or ``AP``.
        whole: the whole model's accuracy on the uncompressed photos.
        points: operating points with bytes, accuracy, head ms and Pareto marks.
        gaps: accuracy of each point minus the whole model's, (value, low, high), paired bootstrap.
        curves: measured curves, the bundle's first.
        bd_rates: against each image codec, of the whole frontier and of each encoder tier.
        encode_ms: of each image codec at its middle quality and full size.
        whole_ms: the whole model's time here, one ONNX Runtime thread; None where the bundle cannot say.
    """

    model: str
    photos: int
    metric: str
    whole: float
    points: tuple[OperatingPoint, ...]
    gaps: dict[int, tuple[float, float, float]]
    curves: tuple[Curve, ...]
    bd_rates: dict[str, dict[str, BdRate | str]]
    encode_ms: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As `splitters evaluate --json` prints it."""
        every = self.bd_rates.get("all tiers", {})
        return {
            "model": self.model, "photos": self.photos, "accuracy_metric": self.metric, "whole_model": self.whole,
            "points": [{**p.to_json(), "gap": self.gaps.get(p.id)} for p in self.points],
            "bd_rate_percent": {codec: r.percent if isinstance(r, BdRate) else None for codec, r in every.items()},
            "bd_rates": {t: {c: _plain(r) for c, r in row.items()} for t, row in self.bd_rates.items()},
            "baselines": {c.name: _table(c) for c in self.curves[1:]},
            "encode_ms": self.encode_ms,
        }  # fmt: skip


def _plain(rate: BdRate | str) -> dict[str, float] | str:
    return asdict(rate) if isinstance(rate, BdRate) else rate


def _table(curve: Curve) -> list[list[str | float]]:
    """Setting, mean bytes and accuracy of every point."""
    return [[label, *map(float, row)] for label, row in zip(curve.labels, curve.points(), strict=True)]


def open_codec(bundle: Bundle) -> LatentCodec:
    """The bundle's latent codec."""
    return codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)


def make_judge(config: EvaluateConfig, bundle: Bundle) -> Judge | None:
    """The judge that ``config.labels`` asks for, None for agreement with the whole model."""
    files = list_images(config.images)
    if config.labels is None:
        return None
    if bundle.manifest.task == "detection":
        return AveragePrecision(config.labels, files)
    return read_labels(config.labels, files, config.images)


def evaluate(bundle: Bundle, config: EvaluateConfig, *, tick: Tick = log.info) -> Report:
    """Measures every operating point of ``bundle`` and the image codecs beside it.

    Args:
        bundle: any bundle; comparing with image codecs needs one whose tail takes whole images.
        config: what to measure.
        tick: told what has been finished.

    Raises:
        ConfigError: image codecs were asked for and the bundle has no whole model, or there are neither labels nor one.
        SourceError: no photos.
    """
    tail = load_tail(bundle)
    judge = make_judge(config, bundle)
    if not tail.takes_images and (config.against or judge is None):
        raise ConfigError("this bundle holds no whole model: give --labels and --against none")
    judge, photos = _limited(judge, config, bundle, tail)
    whole = judge.scorer(run_whole(tail, photos)) if tail.takes_images else None
    points, curve = _measure_points(bundle, tail, photos, judge, tick)
    curves = [_image_curve(tail, photos, judge, codec, config, tick) for codec in config.against]
    tiers = _tier_curves(points, curve)
    rates = {name: {c.name: _try_compare(c, mine, config.draws) for c in curves} for name, mine in tiers.items()}
    middle = [ladder(codec, min(photos.pictures.shape[1:3]))[-4] for codec in config.against]
    return Report(
        model=bundle.manifest.name, photos=len(photos), metric=judge.metric, whole=whole(None) if whole else float("nan"),
        points=tuple(points), gaps=_gaps(curve, points, whole, len(photos), config.draws) if whole else {},
        curves=(curve, *curves), bd_rates=rates, encode_ms={s.codec: encode_ms(photos, s) for s in middle},
    )  # fmt: skip


def _limited(judge: Judge | None, config: EvaluateConfig, bundle: Bundle, tail: Tail) -> tuple[Judge, Photos]:
    files = judge.files if judge is not None else tuple(list_images(config.images))
    if config.limit is not None and config.limit < len(files):
        keep = [i * len(files) // config.limit for i in range(config.limit)]
        files = tuple(files[i] for i in keep)
        if isinstance(judge, TopOne):
            judge = replace(judge, files=files, wanted=tuple(judge.wanted[i] for i in keep))
        elif config.labels is not None:
            judge = AveragePrecision(config.labels, files)
    photos = load_photos(files, bundle)
    if judge is None:
        judge = TopOne.agreeing_with(run_whole(tail, photos), files)
    return judge, photos


def _measure_points(bundle: Bundle, tail: Tail, photos: Photos, judge: Judge, tick: Tick) -> tuple[list[OperatingPoint], Curve]:
    measured = run_points(bundle, open_codec(bundle), tail, photos, bundle.points, tick=tick)
    times = Device(bundle).time_ms(photos.pictures[0], list(dict.fromkeys(p.graphs for p in bundle.points)))
    scorers = [judge.scorer(measured[p.id].answers) for p in bundle.points]
    points = [
        replace(
            p,
            payload_bytes=quantiles(measured[p.id].sizes),
            accuracy=s(None),
            accuracy_metric=judge.metric,
            head_ms=times[p.graphs],
        )
        for p, s in zip(bundle.points, scorers, strict=True)
    ]
    sizes = np.stack([measured[p.id].sizes for p in points])
    curve = Curve(
        name=bundle.manifest.name, labels=tuple(str(p.id) for p in points), sizes=sizes, accuracy=lambda i, drawn: scorers[i](drawn)
    )
    return mark_pareto(points), curve


def _tier_curves(points: Sequence[OperatingPoint], curve: Curve) -> dict[str, Curve]:
    """The whole curve, and one for each set of encoder graphs where there are several."""
    tiers = {"all tiers": curve}
    kinds = dict.fromkeys(p.graphs for p in points)
    for graphs in kinds if len(kinds) > 1 else ():
        rows = [i for i, p in enumerate(points) if p.graphs == graphs]

        def accuracy(p: int, photos: Any, rows: list[int] = rows) -> float:
            return curve.accuracy(rows[p], photos)

        tiers["+".join(graphs)] = Curve(
            name=curve.name, labels=tuple(curve.labels[i] for i in rows), sizes=curve.sizes[rows], accuracy=accuracy
        )
    return tiers


def _try_compare(anchor: Curve, test: Curve, draws: int) -> BdRate | str:
    try:
        return compare(anchor, test, draws=draws)
    except ConfigError as error:
        return error.message


def _gaps(
    curve: Curve, points: Sequence[OperatingPoint], whole: Any, photos: int, draws: int
) -> dict[int, tuple[float, float, float]]:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, photos, photos) for _ in range(draws)]
    base = np.array([whole(d) for d in drawn])
    gaps = {}
    for i, point in enumerate(points):
        low, high = np.percentile(np.array([curve.accuracy(i, d) for d in drawn]) - base, [2.5, 97.5])
        gaps[point.id] = (point.accuracy - whole(None), float(low), float(high))
    return gaps


def _image_curve(tail: Tail, photos: Photos, judge: Judge, codec: str, config: EvaluateConfig, tick: Tick) -> Curve:
    settings = ladder(codec, min(photos.pictures.shape[1:3]), config.qualities)
    sizes, scorers = [], []
    for setting in settings:
        measured = _cached(tail, photos, setting, config.cache)
        sizes.append(measured.sizes)
        scorers.append(judge.scorer(measured.answers))
        tick(str(setting))
    return Curve(name=codec, labels=tuple(map(str, settings)), sizes=np.stack(sizes), accuracy=lambda i, drawn: scorers[i](drawn))


def _cached(tail: Tail, photos: Photos, setting: Setting, cache: Path | None) -> Measured:
    if cache is None:
        return run_image_codec(tail, photos, setting)
    from splitters.evaluation.cache import load, photos_key, store

    key = photos_key(tail.bundle, photos, setting)
    found = load(cache, key)
    if found is None:
        found = run_image_codec(tail, photos, setting)
        store(cache, key, found)
    return found


def dump(report: Report, path: Path) -> None:
    """Writes the report as JSON."""
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
