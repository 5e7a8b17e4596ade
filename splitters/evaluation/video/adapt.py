"""A bundle's codec fitted to one site: a camera's unlabelled video becomes tables, and the scene that both sides know.

What moves at a site, and how much its picture flickers, is the same tomorrow as today, so the tables of predicted frames fit it
better than any others; the encoder's choice stays the bundle's own, so they tell the same symbols in fewer bytes. And the first
frame of every session shows the same place: the bundle carries its latent (the median over the video, in which what passes through
is gone), and key frames are predicted from that where it helps, which does change what they hold.

Each of the two is tried on the last quarter of the video, which was not fitted on, and kept only where it saves bytes there: the
tables at the same symbols, the scene at equal accuracy against the uncut model's own answers.

Shape legend: T frames, C channels, H x W cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.bundle import Bundle, open_bundle, replace_parts
from splitters.codec.fitting.fit import refit_predicted, with_scene
from splitters.codec.learned import LearnedCodec
from splitters.codec.learned_spec import check_learned, tier_prices
from splitters.evaluation.bdrate import Curve, bd_rate
from splitters.evaluation.video.clips import FPS, Part, read_clip
from splitters.evaluation.video.run import VideoConfig, evaluate_video, send_clip
from splitters.runtime.head import Head

Latents = NDArray[np.float32]
Tick = Callable[[str], None]
_MOST_FRAMES = 240  # of each video that are fitted on, evenly spread in pieces
_PIECE = 40
_CHEAP_SHARE = 3  # encoders other than the largest see one piece in this many
_FITTED = 0.75  # of the video; the rest tries what was fitted
_MOST_TRIED = 60  # frames of each video


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """What to fit on.

    Attributes:
        videos: of one site's camera.
        fps: frames a second that it will send.
        until: share of each video that is looked at.
        scene: whether the bundle may carry the scene.
    """

    videos: tuple[Path, ...]
    fps: float = FPS
    until: float = 1.0
    scene: bool = True

    def __post_init__(self) -> None:
        if not self.videos or not 0 < self.until <= 1 or not self.fps > 0:
            raise ConfigError("adapting needs a video, more than 0 frames a second and --until in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one change to the bundle did on frames that it was not fitted on.

    Attributes:
        what: ``tables`` or ``scene``.
        percent: change of bytes: of predicted frames for tables, of all at equal accuracy for the scene; None: none is known.
        reason: why there was none.
    """

    what: str
    percent: float | None
    reason: str = ""

    @property
    def pays(self) -> bool:
        """Whether bytes were saved."""
        return self.percent is not None and self.percent < 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """The bundle as it is now, how many frames were watched, and what was tried."""

    bundle: Bundle
    frames: int
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """As `splitters adapt --json` prints it."""
        return {
            "bundle": str(self.bundle.path), "sha256": self.bundle.sha256, "frames": self.frames,
            "trials": [asdict(t) | {"pays": t.pays} for t in self.trials],
        }  # fmt: skip


def adapt(bundle: Bundle, config: AdaptConfig, *, tick: Tick) -> Adapted:
    """Fits a bundle's codec to a site, in place.

    Args:
        bundle: with a learned codec; its tables part is rewritten where that pays, and its hash changes then.
        config: what to fit on.
        tick: told what has been done.

    Raises:
        ConfigError: the bundle has no learned codec, the video is too short, or nothing moves in it.
        SourceError: a video cannot be read.
    """
    spec = json.loads(bundle.read_part(bundle.manifest.codec))
    check_learned(spec, bundle.manifest.name)
    path, part = spec["tables"], bundle.read_part(spec["tables"])
    gains = np.asarray(spec["gains"])
    pieces, tried, seen = _latents(bundle, config, tick)
    largest = bundle.points[0].graphs
    clips = [p for graphs, own in pieces.items() for p in (own if graphs == largest else own[::_CHEAP_SHARE])]
    fitted = refit_predicted(part, clips, gains, prices=tier_prices(spec), progress=tick)
    points = [p.codec_point for p in bundle.points if p.graphs == largest]
    before, after = (_bytes(LearnedCodec(spec, tables), tried, points) for tables in (part, fitted))
    trials = [Trial(what="tables", percent=100 * (after / before - 1))]
    if trials[0].pays:
        bundle, part = replace_parts(bundle, {path: fitted}), fitted
    if config.scene:
        still = with_scene(part, np.median(np.concatenate(pieces[largest]), axis=0), gains)
        trials.append(_try_scene(bundle, {path: still}, config, tick))
        bundle = open_bundle(bundle.path) if trials[-1].pays else replace_parts(bundle, {path: part})
    return Adapted(bundle=bundle, frames=seen, trials=tuple(trials))


def _latents(bundle: Bundle, config: AdaptConfig, tick: Tick) -> tuple[dict[tuple[str, ...], list[Latents]], list[Latents], int]:
    """Pieces (T, C, H, W) of the videos by encoder, the largest encoder's latents to try with, and how many frames they are of."""
    head, largest = Head(bundle), bundle.points[0].graphs
    pieces: dict[tuple[str, ...], list[Latents]] = {p.graphs: [] for p in bundle.points}
    tried: list[Latents] = []
    for video in config.videos:
        read = partial(read_clip, video, bundle.manifest.preprocess, fps=config.fps)
        frames = read(part=Part(stop=_FITTED * config.until)).frames
        count = min(len(frames) // 2, max(1, _MOST_FRAMES // _PIECE))
        starts = np.linspace(0, max(0, len(frames) - _PIECE), count).astype(int) if len(frames) > _MOST_FRAMES else [0]
        length = _PIECE if len(frames) > _MOST_FRAMES else len(frames)
        for start in starts:
            maps = [head.stem_of(p) for p in frames.pictures[start : start + length]]
            for graphs, own in pieces.items():
                own.append(np.stack([head.latents(m, graphs)[0] for m in maps]))
        last = read(part=Part(start=_FITTED * config.until, stop=config.until), limit=_MOST_TRIED).frames
        tried.append(np.stack([head.latents(head.stem_of(p), largest)[0] for p in last.pictures]))
        tick(f"{video.name}: {len(frames) + len(last)} frames")
    return pieces, tried, sum(map(len, (*pieces[largest], *tried)))


def _bytes(codec: LearnedCodec, clips: Sequence[Latents], points: Sequence[str]) -> float:
    """Of all frames but the first, each predicted from the one before, at every point."""
    return float(sum(send_clip(codec, [(z,) for z in clip], point, 1).sizes[1:].sum() for clip in clips for point in points))


def _try_scene(bundle: Bundle, parts: dict[str, bytes], config: AdaptConfig, tick: Tick) -> Trial:
    """The bundle without and with it; with it the bundle stays."""
    part = Part(start=_FITTED * config.until, stop=config.until)
    video = VideoConfig(clips=config.videos, against=(), fps=config.fps, part=part, limit=_MOST_TRIED, ages=(1,), draws=10)
    try:
        without = evaluate_video(bundle, video, tick=tick).clips
        with_it = evaluate_video(replace_parts(bundle, parts), video, tick=tick).clips
        pairs = [(a.curves["ours 1"], b.curves["ours 1"]) for a, b in zip(without, with_it, strict=True)]
        return Trial(what="scene", percent=float(np.mean([_at_equal_accuracy(*pair) for pair in pairs])))
    except ConfigError as error:
        return Trial(what="scene", percent=None, reason=error.message)


def _at_equal_accuracy(before: Curve, after: Curve) -> float:
    """Change of bytes in percent.

    Raises:
        ConfigError: the curves share no accuracy.
    """
    if (after.accuracy >= before.accuracy).all():
        sizes = [np.log(c.sizes.mean(axis=1)).mean() for c in (before, after)]
        return float(np.expm1(sizes[1] - sizes[0]) * 100)
    return bd_rate(before.points(), after.points())[0]
