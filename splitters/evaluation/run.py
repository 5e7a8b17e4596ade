"""Accuracy against real payload bytes: every operating point of a bundle, beside image codecs feeding the same model.

``evaluate`` measures, ``Report`` holds what was found, and `splitters.bundle.rewrite_points` stores the table.

Shape legend: P points, M photos, D resampled sets of photos.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from protos.errors import ConfigError
from protos.messages import Answer, Detection
from splitters.bundle import Bundle, rewrite_points
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles, best_point, mark_pareto
from splitters.evaluation.alone import measure_alone
from splitters.evaluation.bdrate import BdRate, Counts, Curve, compare, interval, resample
from splitters.evaluation.cache import describe, load, photos_key, store
from splitters.evaluation.choices import measure_local, measure_offloads, offload_ladder, video_settings
from splitters.evaluation.image_codecs import Setting, ladder
from splitters.evaluation.judging.agreement import Agreement
from splitters.evaluation.judging.tasks import AveragePrecision, Judge, Score, list_images, read_labels
from splitters.evaluation.measure import (
    Each,
    Measured,
    Photos,
    encode_ms,
    load_photos,
    run_image_codec,
    run_points,
    run_whole,
)
from splitters.evaluation.report import Gap, Jpeg95, Report, dump
from splitters.evaluation.steps import Steps, Told
from splitters.profiling.encoder_cost import encoder_costs
from splitters.runtime.head import Head, open_codec
from splitters.runtime.tail import Tail, load_tail
from splitters.tasks.base import form_of

__all__ = ["Bench", "EvaluateConfig", "Report", "dump", "evaluate", "open_bench", "rewrite"]

log = logging.getLogger(__name__)
Tick = Callable[[str], None]

JPEG95_SHARE = 0.28


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        images: folder of photos.
        labels: JSON {file name: class index}, a COCO instances.json for detectors, or None for agreement with the
            whole model: the same first class, or F1 of the boxes.
        against: image codecs to compare with.
        qualities: of the image codecs; None for the standard ladder.
        limit: at most this many photos, evenly spread.
        draws: of the bootstrap.
        cache: folder in which the image codecs' results are kept between calls.
        alone_px: smaller inputs at which a classifier's whole model is measured alone on the device.
        score_min: a detector's boxes from this score on count. AP needs the weak ones too; a bundle's own threshold is for viewers.
    """

    images: Path
    labels: Path | None = None
    against: tuple[str, ...] = ("jpeg", "webp", "avif")
    qualities: tuple[int, ...] | None = None
    limit: int | None = None
    draws: int = 1000
    cache: Path | None = None
    alone_px: tuple[int, ...] = ()
    score_min: float = 0.01

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 2) or self.draws < 10 or not 0 <= self.score_min < 1:
            raise ConfigError("evaluation needs at least 2 photos, at least 10 draws and 0 <= score_min < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The model, the photos and the judge that every setting shares."""

    bundle: Bundle
    tail: Tail
    photos: Photos
    judge: Judge
    counts: Counts
    config: EvaluateConfig
    tick: Tick
    each: Each
    whole: Sequence[Answer] | None

    def score(self, answers: Sequence[Answer]) -> Score:
        """How good these answers are, one a photo."""
        return self.judge.score(answers, self.counts)

    def curve(self, name: str, labels: Sequence[str], sizes: Sequence[object], scores: Sequence[Score]) -> Curve:
        """A measured curve over these photos."""
        return Curve(
            name=name, labels=tuple(labels), sizes=np.stack([np.asarray(s, np.float64) for s in sizes]), counts=self.counts,
            accuracy=np.array([s.value for s in scores]), drawn=np.stack([s.drawn for s in scores]),
        )  # fmt: skip


def evaluate(bundle: Bundle, config: EvaluateConfig, *, tick: Tick = log.info, show: Told | None = None) -> Report:
    """Measures every operating point of ``bundle`` and the image codecs beside it.

    Args:
        bundle: any bundle; comparing with image codecs needs one whose tail takes whole images.
        config: what to measure.
        tick: told what has been finished.
        show: told how many photos have been run, of how many, over all settings.

    Raises:
        ConfigError: image codecs were asked for and the bundle has no whole model, or there are no labels where they are needed,
            or the labels are at odds with model or photos.
        SourceError: no photos.
    """
    bench = open_bench(bundle, config, tick, show)
    photos = bench.photos
    whole = bench.score(bench.whole) if bench.whole is not None else None
    points, curve, also, best = _measure_points(bench)
    curves = [_image_curve(bench, codec) for codec in config.against]
    local = measure_local(bench.bundle, photos.files, lambda answers: bench.score(answers).value, each=bench.each)
    offloads = _offloads(bench) if config.against else []
    work = measure_alone(bundle, photos, config.alone_px, bench.score, each=bench.each) if config.alone_px else None
    rates = {name: {c.name: _try_compare(c, mine) for c in curves} for name, mine in _tier_curves(points, curve).items()}
    detector = form_of(bundle.manifest.task) is Detection
    middle = [ladder(codec, photos.input_px, detector=detector)[-3] for codec in config.against]
    return Report(
        model=bundle.manifest.name, photos=len(photos), metric=bench.judge.metric, whole=whole.value if whole else float("nan"),
        points=tuple(points), gaps={p.id: _gap(curve, i, whole) for i, p in enumerate(points)} if whole else {},
        curves=(curve, *curves), bd_rates=rates, encode_ms={s.codec: encode_ms(photos, s) for s in middle},
        jpeg95=_jpeg95(bench, curve, points, whole) if whole and detector and config.against else None,
        also={-1: whole.also if whole else {}, **also}, offloads=tuple(offloads), local=local,
        unreadable=tuple(str(f) for f in photos.unreadable), best_f1=best, encoders=tuple(encoder_costs(bundle)),
        work=work,
    )  # fmt: skip


def rewrite(bundle: Bundle, report: Report) -> Bundle:
    """The bundle with what was measured: its points with their frontier, offload options, the local model's accuracy."""
    local = (report.local, report.metric) if report.local is not None else None
    score_min = report.best_f1[0] if report.best_f1 else None
    return rewrite_points(bundle, report.points, offloads=report.offloads or None, local=local, score_min=score_min)


def open_bench(bundle: Bundle, config: EvaluateConfig, tick: Tick, show: Told | None) -> Bench:
    """Opens model, photos and judge, and runs the whole model once over the photos; errors as with ``evaluate``."""
    detector = form_of(bundle.manifest.task) is Detection
    if bundle.manifest.inputs:
        taken = ", ".join(f"{i.name} ({i.source})" for i in bundle.manifest.inputs)
        raise ConfigError(f"{bundle.manifest.name} takes {taken}; only bundles of one picture can be evaluated")
    if config.labels is not None:
        bundle = loose(bundle, config.score_min)  # against the whole model's boxes its own threshold is the right one
    tail = load_tail(bundle)
    if not tail.takes_images and (config.against or config.labels is None):
        raise ConfigError("this bundle holds no whole model: give --labels and --against none")
    if config.labels is None and detector and "score_min" not in bundle.manifest.postprocess:
        raise ConfigError("this detector's bundle says no score from which on its boxes count: give --labels a COCO instances.json")
    files, judge = list_images(config.images), _judge(config, bundle)
    files = list(judge.files) if judge is not None else files
    if config.limit is not None and config.limit < len(files):
        keep = [i * len(files) // config.limit for i in range(config.limit)]
        files = [files[i] for i in keep]
        judge = judge.only(keep) if judge is not None else None
    photos = load_photos(files, bundle)
    if judge is not None:
        judge = judge.only([files.index(f) for f in photos.files]) if photos.unreadable else judge
        if isinstance(judge, AveragePrecision):
            judge.check_sizes(photos.sizes_px)
    each = Steps(_runs(tail, photos, config) * len(photos), show)
    whole = run_whole(tail, photos, each=each) if tail.takes_images else None
    if judge is None:
        judge = Agreement(files=photos.files, wanted=tuple(whole or ()))
    counts = resample(len(photos), config.draws)
    return Bench(
        bundle=bundle, tail=tail, photos=photos, judge=judge, counts=counts, config=config, tick=tick, each=each, whole=whole
    )


def _runs(tail: Tail, photos: Photos, config: EvaluateConfig) -> int:
    """How often every photo is run through some model, at the most."""
    manifest = tail.bundle.manifest
    detector = form_of(manifest.task) is Detection
    images = sum(len(ladder(c, photos.input_px, config.qualities, detector=detector)) for c in config.against)
    offloads = len(offload_ladder(tail, photos)) + len(video_settings(tail, photos)) + detector if config.against else 0
    alone = 1 + len(set(config.alone_px)) if config.alone_px else 0
    return alone + len(tail.bundle.points) + images + offloads + tail.takes_images + (manifest.local is not None)


def _judge(config: EvaluateConfig, bundle: Bundle) -> Judge | None:
    if config.labels is None:
        return None
    files = list_images(config.images)
    if form_of(bundle.manifest.task) is Detection:
        return AveragePrecision(config.labels, files, config.images, bundle.manifest.labels or None)
    return read_labels(config.labels, files, config.images, bundle.manifest.labels)


def loose(bundle: Bundle, score_min: float) -> Bundle:
    """The bundle with another score threshold; its files stay as they are."""
    manifest = bundle.manifest
    if form_of(manifest.task) is not Detection:
        return bundle
    tail = {**manifest.tail, **({"score_min": score_min} if "score_min" in manifest.tail else {})}
    return replace(bundle, manifest=replace(manifest, postprocess={**manifest.postprocess, "score_min": score_min}, tail=tail))


def _measure_points(
    bench: Bench,
) -> tuple[list[OperatingPoint], Curve, dict[int, dict[str, float]], tuple[float, float] | None]:
    bundle, photos = bench.bundle, bench.photos
    measured = run_points(bundle, open_codec(bundle), bench.tail, photos, bundle.points, tick=bench.tick, each=bench.each)
    times = Head(bundle).times_ms(photos.pictures[0], list(dict.fromkeys(p.graphs for p in bundle.points)))
    scores = {p.id: bench.score(measured[p.id].answers) for p in bundle.points}
    points = [
        replace(
            p, payload_bytes=Quantiles.of(measured[p.id].sizes), accuracy=scores[p.id].value, accuracy_metric=bench.judge.metric,
            head_ms=times[p.graphs],
        )
        for p in bundle.points
    ]  # fmt: skip
    sizes = [measured[p.id].sizes for p in points]
    curve = bench.curve(bundle.manifest.name, [str(p.id) for p in points], sizes, [scores[p.id] for p in points])
    judge, best = bench.judge, None
    if isinstance(judge, AveragePrecision):
        best = judge.best_score(measured[best_point(points).id].answers)
    return mark_pareto(points), curve, {i: dict(s.also) for i, s in scores.items()}, best


def _tier_curves(points: Sequence[OperatingPoint], curve: Curve) -> dict[str, Curve]:
    """The whole curve, and one for each set of encoder graphs where there are several."""
    kinds = dict.fromkeys(p.graphs for p in points)
    tiers = {"+".join(g): curve.only([i for i, p in enumerate(points) if p.graphs == g]) for g in kinds}
    return {"all tiers": curve, **(tiers if len(kinds) > 1 else {})}


def _try_compare(anchor: Curve, test: Curve) -> BdRate | str:
    try:
        return compare(anchor, test)
    except ConfigError as error:
        return error.message


def _gap(curve: Curve, row: int, other: Score) -> Gap:
    return (float(curve.accuracy[row] - other.value), *interval(curve.drawn[row] - other.drawn))


def _image_curve(bench: Bench, codec: str) -> Curve:
    config, detector = bench.config, form_of(bench.bundle.manifest.task) is Detection
    settings = ladder(codec, bench.photos.input_px, config.qualities, detector=detector)
    sizes, scores = [], []
    for setting in settings:
        measured = _cached(bench, setting)
        sizes.append(measured.sizes)
        scores.append(bench.score(measured.answers))
        bench.tick(str(setting))
    return bench.curve(codec, [str(s) for s in settings], sizes, scores)


def _offloads(bench: Bench) -> list[OffloadOption]:
    def value(answers: Sequence[Answer]) -> float:
        return bench.score(answers).value

    return measure_offloads(bench.tail, bench.photos, value, tick=bench.tick, remember=partial(_remembered, bench), each=bench.each)


def _jpeg95(bench: Bench, curve: Curve, points: Sequence[OperatingPoint], whole: Score) -> Jpeg95:
    measured = _cached(bench, Setting(codec="jpeg", quality=95, size_px=bench.photos.input_px))
    jpeg, size = bench.score(measured.answers), float(measured.sizes.mean())
    means = curve.sizes.mean(axis=1)
    within = [i for i in range(len(points)) if means[i] <= JPEG95_SHARE * size]
    found = Jpeg95(jpeg_bytes=size, jpeg_accuracy=jpeg.value, share=JPEG95_SHARE)
    if not within:
        return found
    best = max(within, key=lambda i: (curve.accuracy[i], -means[i]))
    return replace(
        found, point=points[best].id, point_bytes=float(means[best]), lost=_minus(_gap(curve, best, whole)),
        lost_to_jpeg=_minus(_gap(curve, best, jpeg)),
    )  # fmt: skip


def _minus(gap: Gap) -> Gap:
    return -gap[0], -gap[2], -gap[1]


def _cached(bench: Bench, setting: Setting) -> Measured:
    return _remembered(bench, describe(setting), lambda: run_image_codec(bench.tail, bench.photos, setting, each=bench.each))


def _remembered(bench: Bench, what: Mapping[str, object], run: Callable[[], Measured]) -> Measured:
    """What ``run`` measures, or measured on an earlier call for the same photos and whole model."""
    cache = bench.config.cache
    if cache is None:
        return run()
    key = photos_key(bench.bundle, bench.photos, what)
    found = load(cache, key)
    if found is None:
        found = run()
        store(cache, key, found)
    else:
        for _ in found.answers:
            bench.each()
    return found
