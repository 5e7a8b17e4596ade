"""A bundle's codec fitted to one site: a camera's unlabelled video becomes tables, and the scene that both sides know.

What moves at a site, and how much its picture flickers, is the same tomorrow as today, so the tables of predicted frames fit it
better than any others. And the first frame of every session shows the same place: the bundle carries its latent (the median over
the video, in which what passes through is gone), and key frames are predicted from that where it helps.

Shape legend: T frames, C channels, H x W cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.bundle import Bundle, replace_parts
from splitters.codec.fitting.fit import refit_predicted
from splitters.codec.learned_spec import check_learned, tier_prices
from splitters.evaluation.video.clips import FPS, Part, read_clip
from splitters.evaluation.video.run import send_clip
from splitters.runtime.head import Head, open_codec

Latents = NDArray[np.float32]
_MOST_FRAMES = 240  # of each video that are fitted on, evenly spread in pieces
_PIECE = 40
_CHEAP_SHARE = 3  # encoders other than the largest see one piece in this many


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """What to fit on.

    Attributes:
        videos: of one site's camera.
        fps: frames a second that it will send.
        until: share of each video that is fitted on; the rest tests.
        scene: whether the bundle is to carry the scene.
    """

    videos: tuple[Path, ...]
    fps: float = FPS
    until: float = 1.0
    scene: bool = True

    def __post_init__(self) -> None:
        if not self.videos or not 0 < self.until <= 1 or not self.fps > 0:
            raise ConfigError("adapting needs a video, more than 0 frames a second and --until in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One operating point on the video kept back, before and after.

    Attributes:
        id: the operating point's.
        bytes_before, bytes_after: mean of all frames, the first included.
        key_before, key_after: of the first frame.
        error_before, error_after: mean squared error of the latent, in the variance of the scene's.
    """

    id: int
    bytes_before: float
    bytes_after: float
    key_before: float
    key_after: float
    error_before: float
    error_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """The bundle as it is now, how many frames it was fitted on, and the test where something was kept back."""

    bundle: Bundle
    frames: int
    test: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """As `splitters adapt --json` prints it."""
        return {
            "bundle": str(self.bundle.path), "sha256": self.bundle.sha256, "frames": self.frames,
            "test": [asdict(c) for c in self.test],
        }  # fmt: skip


def adapt(bundle: Bundle, config: AdaptConfig, *, tick: Callable[[str], None]) -> Adapted:
    """Fits a bundle's codec to a site, in place.

    Args:
        bundle: with a learned codec; its tables part is rewritten and its hash changes.
        config: what to fit on.
        tick: told what has been done.

    Raises:
        ConfigError: the bundle has no learned codec, or nothing moves in the video.
        SourceError: a video cannot be read.
    """
    spec = json.loads(bundle.read_part(bundle.manifest.codec))
    check_learned(spec, bundle.manifest.name)
    head = Head(bundle)
    largest = bundle.points[0].graphs
    pieces, seen = _latents(bundle, head, config, tick)
    gains = np.asarray(spec["gains"])
    still = np.median(np.concatenate(pieces[largest]), axis=0) if config.scene else None
    part = bundle.read_part(spec["tables"])
    clips = [p for graphs, own in pieces.items() for p in (own if graphs == largest else own[::_CHEAP_SHARE])]
    before = open_codec(bundle)
    adapted = replace_parts(
        bundle, {spec["tables"]: refit_predicted(part, clips, gains, scene=still, prices=tier_prices(spec), progress=tick)}
    )
    test: list[Change] = []
    if config.until < 1:
        kept = [_clip(bundle, head, largest, v, config.fps, Part(start=config.until)) for v in config.videos]
        after = open_codec(adapted)
        test = [
            _change(p.id, p.codec_point, kept, before, after) for p in bundle.points if p.graphs == largest
        ]  # fmt: skip
    return Adapted(bundle=adapted, frames=seen, test=tuple(test))


def _latents(
    bundle: Bundle, head: Head, config: AdaptConfig, tick: Callable[[str], None]
) -> tuple[dict[tuple[str, ...], list[Latents]], int]:
    """Pieces (T, C, H, W) of the videos by encoder, and how many frames they are of."""
    pieces: dict[tuple[str, ...], list[Latents]] = {p.graphs: [] for p in bundle.points}
    seen = 0
    for video in config.videos:
        frames = read_clip(video, bundle.manifest.preprocess, fps=config.fps, part=Part(stop=config.until)).frames
        count = min(len(frames) // 2, max(1, _MOST_FRAMES // _PIECE))
        starts = np.linspace(0, max(0, len(frames) - _PIECE), count).astype(int) if len(frames) > _MOST_FRAMES else [0]
        length = _PIECE if len(frames) > _MOST_FRAMES else len(frames)
        for start in starts:
            maps = [head.stem_of(p) for p in frames.pictures[start : start + length]]
            for graphs, own in pieces.items():
                own.append(np.stack([head.latents(m, graphs)[0] for m in maps]))
            seen += len(maps)
        tick(f"{video.name}: {len(frames)} frames")
    return pieces, seen


def _clip(bundle: Bundle, head: Head, graphs: Sequence[str], video: Path, fps: float, part: Part) -> list[tuple[Latents, ...]]:
    frames = read_clip(video, bundle.manifest.preprocess, fps=fps, part=part).frames
    return [head.latents(head.stem_of(p), graphs) for p in frames.pictures]


def _change(point: int, codec_point: str, clips: Sequence[Sequence[tuple[Latents, ...]]], before: Any, after: Any) -> Change:
    """Both codecs on clips kept back, each frame predicted from the one before."""
    found = []
    for codec in (before, after):
        sizes, keys, errors, spread = [], [], [], []
        for latents in clips:
            sent = send_clip(codec, latents, codec_point, 1)
            sizes.append(sent.sizes)
            keys.append(sent.sizes[0])
            errors += [np.square(codec.dequantise(s)[0] - z[0]).mean() for s, z in zip(sent.symbols, latents, strict=True)]
            spread.append(np.var(np.stack([z[0] for z in latents])))
        found.append((float(np.concatenate(sizes).mean()), float(np.mean(keys)), float(np.mean(errors) / np.mean(spread))))
    (size, key, error), (size_after, key_after, error_after) = found
    return Change(
        id=point, bytes_before=size, bytes_after=size_after, key_before=key, key_after=key_after, error_before=error,
        error_after=error_after,
    )  # fmt: skip
