"""A bundle beside video codecs on a camera's clips: bytes a frame, and how true the answers stay to the uncut model's.

Ours goes through real payloads, each frame predicted from the symbols of one a given number of frames back: one on a stream,
where the newest frame sent is what the server will have; more over datagrams, where a frame must have been acknowledged. The
first frame is a key frame and serves until later ones may; its bytes count. The video codecs go through `code_clip`: one
key frame, a ladder of qualities and sizes, and the same uncut model looks at what they give.

Shape legend: F frames of a clip, P settings, D resampled sets of segments.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.bundle.operating_point import OperatingPoint
from splitters.codec import LatentCodec, ReferenceStore, Symbols
from splitters.evaluation.bdrate import Array, Counts, Curve
from splitters.evaluation.cache import load, photos_key, store
from splitters.evaluation.judging.tasks import Score
from splitters.evaluation.measure import Measured, Photos, run_whole
from splitters.evaluation.run import loose
from splitters.evaluation.video.clips import FPS, WHOLE, Clip, Part, read_clip
from splitters.evaluation.video.codecs import VideoSetting, code_clip, video_ladder
from splitters.evaluation.video.fidelity import Fidelity, resample_segments
from splitters.evaluation.video.report import ClipReport, OurPoint, TheirPoint, VideoReport, compare_clips
from splitters.runtime.head import Head, open_codec
from splitters.runtime.tail import Tail, load_tail

log = logging.getLogger(__name__)
Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """What to measure.

    Attributes:
        clips: video files.
        against: video codecs to compare with.
        crfs: of the video codecs; None for the standard ladder.
        fps: frames a second that are taken of a clip.
        part: of each clip.
        limit: at most this many frames of each clip, from the part's start; None: all.
        ages: how many frames back the reference lies, each judged for itself; the first is the headline.
        points: ids of operating points; None: all those of the largest encoder.
        segment_s: of the bootstrap.
        draws: of the bootstrap.
        score_min: a detector's boxes from this score on count; AP needs the weak ones too.
        cache: folder in which the whole model's answers to decoded pictures are kept between calls; clips are coded every time.
    """

    clips: tuple[Path, ...]
    against: tuple[str, ...] = ("h264", "h265")
    crfs: tuple[int, ...] | None = None
    fps: float = FPS
    part: Part = WHOLE
    limit: int | None = 240
    ages: tuple[int, ...] = (1, 2, 3)
    points: tuple[int, ...] | None = None
    segment_s: float = 2.0
    draws: int = 200
    score_min: float = 0.01
    cache: Path | None = None

    def __post_init__(self) -> None:
        names = [c.stem for c in self.clips]
        if not names or len(set(names)) != len(names):
            raise ConfigError("give video files with names of their own")
        if not self.ages or any(not 1 <= a <= 16 for a in self.ages) or len(set(self.ages)) != len(self.ages):
            raise ConfigError("references lie 1..16 frames back")
        if self.draws < 10 or not self.segment_s > 0 or not 0 <= self.score_min < 1 or (self.limit is not None and self.limit < 2):
            raise ConfigError("video needs 2 frames, 10 draws, segments longer than nothing and 0 <= score_min < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bench:
    """One clip with what every setting shares."""

    bundle: Bundle
    codec: LatentCodec
    tail: Tail
    clip: Clip
    judge: Fidelity
    counts: Counts
    cache: Path | None
    tick: Tick

    def score(self, answers: Sequence[Answer]) -> Score:
        return self.judge.score(answers, self.counts)

    def curve(self, name: str, labels: Sequence[str], sizes: Sequence[Array], scores: Sequence[Score]) -> Curve:
        return Curve(
            name=name, labels=tuple(labels), sizes=np.stack(sizes), counts=self.counts,
            accuracy=np.array([s.value for s in scores]), drawn=np.stack([s.drawn for s in scores]),
        )  # fmt: skip


def evaluate_video(bundle: Bundle, config: VideoConfig, *, tick: Tick = log.info) -> VideoReport:
    """Measures a bundle's operating points and the video codecs beside it on every clip.

    Args:
        bundle: with a whole model, whose own answers are the measure.
        config: what to measure.
        tick: told what has been finished.

    Raises:
        ConfigError: the bundle holds no whole model, or a clip shows it nothing.
        SourceError: a clip cannot be read.
        MissingDependencyError: PyAV, or a codec in it, is absent.
    """
    ladders = {codec: video_ladder(codec, config.crfs) for codec in config.against}
    bundle = loose(bundle, config.score_min)
    codec, tail, head = open_codec(bundle), load_tail(bundle), Head(bundle)
    if not tail.takes_images:
        raise ConfigError("this bundle holds no whole model, and video is judged by the whole model's answers")
    points = _points(bundle, config.points)
    reports = []
    for path in config.clips:
        clip = read_clip(path, bundle.manifest.preprocess, fps=config.fps, part=config.part, limit=config.limit)
        whole = _whole(bundle, tail, clip.frames, config.cache)
        counts = resample_segments([len(clip)], max(1, round(config.segment_s * clip.fps)), config.draws)
        bench = _Bench(
            bundle=bundle, codec=codec, tail=tail, clip=clip, judge=Fidelity.to(whole), counts=counts, cache=config.cache,
            tick=tick,
        )  # fmt: skip
        reports.append(_clip(bench, head, points, config.ages, ladders))
    return VideoReport(model=bundle.manifest.name, clips=tuple(reports), overall=compare_clips(reports, config.ages))


def _points(bundle: Bundle, wanted: Sequence[int] | None) -> list[OperatingPoint]:
    if wanted is None:
        largest = bundle.points[0].graphs
        return [p for p in bundle.points if p.graphs == largest]
    known = {p.id: p for p in bundle.points}
    if unknown := [i for i in wanted if i not in known]:
        raise ConfigError(f"there is no operating point {unknown[0]}; this bundle has {', '.join(map(str, known))}")
    return [known[i] for i in wanted]


def _clip(
    bench: _Bench, head: Head, points: Sequence[OperatingPoint], ages: Sequence[int], ladders: dict[str, list[VideoSetting]]
) -> ClipReport:
    clip = bench.clip
    times = head.times_ms(clip.frames.pictures[0], list(dict.fromkeys(p.graphs for p in points)), rounds=12)
    latents = {
        graphs: [head.latents(head.stem_of(p), graphs) for p in clip.frames.pictures]
        for graphs in dict.fromkeys(p.graphs for p in points)
    }
    ours: list[OurPoint] = []
    curves: dict[str, Curve] = {}
    for age in ages:
        runs = [send_clip(bench.codec, latents[p.graphs], p.codec_point, age) for p in points]
        scores = [bench.score(_answers(bench, run.symbols)) for run in runs]
        curves[f"ours {age}"] = bench.curve(
            bench.bundle.manifest.name, [str(p.id) for p in points], [r.sizes for r in runs], scores
        )
        for point, run, score in zip(points, runs, scores, strict=True):
            ours.append(OurPoint.of(point, age, run.sizes, run.predicted, score.value, (run.encode_ms, run.decode_ms), times))
        bench.tick(f"{clip.name}: ours, reference {age} back")
    theirs: list[TheirPoint] = []
    for codec, settings in ladders.items():
        sizes, scores = [], []
        for setting in settings:
            size, encode_ms, score = _their_point(bench, setting)
            sizes.append(size)
            scores.append(score)
            theirs.append(TheirPoint.of(setting, size, score.value, encode_ms))
        curves[codec] = bench.curve(codec, [str(s) for s in settings], sizes, scores)
        bench.tick(f"{clip.name}: {codec}")
    return ClipReport(
        name=clip.name,
        frames=len(clip),
        fps=clip.fps,
        metric=bench.judge.metric,
        ours=tuple(ours),
        theirs=tuple(theirs),
        curves=curves,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A clip that went through the latent codec.

    Attributes:
        symbols: what the receiver decoded, frame by frame.
        sizes: payload bytes, (F,).
        predicted: whether each frame was predicted, (F,).
        encode_ms: from latent to payloads, (F,).
        decode_ms: from payloads to symbols, (F,).
    """

    symbols: list[Symbols]
    sizes: Array
    predicted: NDArray[np.bool_]
    encode_ms: Array
    decode_ms: Array


def send_clip(codec: LatentCodec, latents: Sequence[Sequence[NDArray[np.float32]]], point_id: str, age: int) -> Sent:
    """Codes and decodes a clip's latents, each frame against the one ``age`` frames back, the first against nothing.

    Raises:
        PayloadError: the decoder did not hold what the encoder referred to; that would be a fault of ours.
    """
    store = ReferenceStore()
    sent: list[Symbols] = []
    sizes, encode_ms, decode_ms = (np.zeros(len(latents)) for _ in range(3))
    predicted = np.zeros(len(latents), bool)
    for number, latent in enumerate(latents):
        back = max(0, number - age)
        reference = (sent[back], back) if number else (None, None)
        start_ns = time.perf_counter_ns()
        coded = codec.compress(latent, point_id, *reference)
        between_ns = time.perf_counter_ns()
        decoded = codec.decode(coded.payloads, store, strict=True)
        end_ns = time.perf_counter_ns()
        store.add(number, decoded)
        sent.append(decoded)
        predicted[number], sizes[number] = coded.predicted, sum(map(len, coded.payloads))
        encode_ms[number], decode_ms[number] = (between_ns - start_ns) / 1e6, (end_ns - between_ns) / 1e6
    return Sent(symbols=sent, sizes=sizes, predicted=predicted, encode_ms=encode_ms, decode_ms=decode_ms)


def _answers(bench: _Bench, symbols: Sequence[Symbols]) -> list[Answer]:
    answers: list[Answer] = []
    before: Symbols | None = None
    for held, size_px in zip(symbols, bench.clip.frames.sizes_px, strict=True):
        same = before is not None and all(np.array_equal(a, b) for a, b in zip(held.tensors, before.tensors, strict=True))
        answers += answers[-1:] if same else bench.tail.run([t[None] for t in bench.codec.dequantise(held)], [size_px])
        before = held
    return answers


def _their_point(bench: _Bench, setting: VideoSetting) -> tuple[Array, float, Score]:
    frames = bench.clip.frames
    coded = code_clip([p[a] for p, a in zip(frames.pictures, frames.content, strict=True)], setting, bench.clip.fps)
    restored = frames.pictures.copy()
    for picture, area, seen in zip(restored, frames.content, coded.pictures, strict=True):
        picture[area] = seen
    answers = _whole(bench.bundle, bench.tail, replace(frames, pictures=restored), bench.cache)
    return coded.sizes, float(np.median(coded.encode_ms)), bench.score(answers)


def _whole(bundle: Bundle, tail: Tail, frames: Photos, cache: Path | None) -> list[Answer]:
    """The whole model's answers to exactly these pictures, from the cache where they are known."""
    if cache is None:
        return run_whole(tail, frames)
    key = photos_key(bundle, frames, {"what": "whole model"})
    known = load(cache, key)
    if known is None:
        known = Measured(sizes=np.zeros(len(frames)), answers=run_whole(tail, frames))
        store(cache, key, known)
    return known.answers
