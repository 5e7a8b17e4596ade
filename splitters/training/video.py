"""Pairs of neighbouring frames to learn from, and what the second of them costs when it is predicted from the first.

Half of the pairs are frames of clips, a tenth of a second or a few apart; half are photos as a fixed camera would see them twice:
sensor noise, a little light, an exposure step now and then, something that moves through. The choice of the temporal codec itself
says which symbols of the second frame are sent, so decoder and tail learn to answer from what a receiver really holds: symbols
that stayed behind included.

Shape legend: P pairs, C latent channels, h x w cells; images (P, 3, H, W), normalised; latents (P, C, h, w).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from protos.errors import ConfigError, SourceError
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.codec.predicted.choice import Costs, choose_symbols
from splitters.codec.predicted.motion import neighbours
from splitters.training.config import VideoLearning
from splitters.training.finish import moving
from splitters.training.pictures.photos import Crops, PhotoCache, drawn, normalise

log = logging.getLogger(__name__)
Picture = NDArray[np.uint8]
_AGES, _AGE_SHARES = (1, 2, 3), (0.7, 0.2, 0.1)
_EXPOSURE_SHARE, _EXPOSURE = 0.2, 0.05
_LIMIT = 2000
_MOST = 4.0  # squared steps of flicker that count: a cell that differs by more was no still one
# What the choice reckons with: rough bits of a symbol that stays as predicted and of one that does not, of bundles fitted before.
_COSTS = (0.15, 5.0)
_COARSEST = 0.5  # of the price, as `splitters.exporting.learned.prices_at` has it
_STILL = 0.02  # of the full range: a picture's cell that changed by less, noise averaged out, did not change
_BLUR_PX = 8


def clip_frames(path: Path, fps: float, until: float, longest_px: int) -> list[Picture]:
    """The first part of a video at a camera's pace, (H, W, 3) RGB each.

    Args:
        path: the file.
        fps: frames a second that are taken.
        until: share of the frames that is taken.
        longest_px: what the longer side is reduced to.

    Raises:
        SourceError: the file cannot be read, or gives fewer than two frames.
    """
    import cv2

    from splitters.runtime.video import VideoReader

    taken: list[Picture] = []
    reader = VideoReader(path, shown=str(path))
    tick, first = 0, None
    try:
        while (read := reader.read()) is not None:
            frame, time_s = read
            first = time_s if first is None else first
            if (time_s - first) * fps < tick - 0.25:
                continue
            tick = max(tick + 1, int((time_s - first) * fps) + 1)
            scale = longest_px / max(frame.shape[:2])
            if scale < 1:
                size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
            taken.append(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        reader.close()
    taken = taken[: round(until * len(taken))]
    if len(taken) < 2:
        raise SourceError(f"{path}: {len(taken)} frames to learn from; two at least are needed")
    return taken


class Pairs:
    """Draws pairs of frames.

    Args:
        learning: which clips, and how.
        data: the folder their names start from.
        photos: the other half.
        crops: how both are shown; the two frames of a pair alike.

    Raises:
        SourceError: a clip cannot be read.
    """

    def __init__(self, learning: VideoLearning, data: Path, photos: PhotoCache, crops: Crops) -> None:
        self._photos, self._crops = photos, crops
        longest = round(1.15 * crops.size_px)
        self.clips = [clip_frames(data / name, learning.fps, learning.until, longest) for name in learning.clips]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The earlier and the later frame of ``count`` pairs, (P, 3, H, W) each; the clips come first."""
        filmed = (count + 1) // 2 if self.clips else 0
        before: list[NDArray[np.uint8]] = []
        now: list[NDArray[np.uint8]] = []
        for _ in range(filmed):
            clip = self.clips[int(rng.integers(len(self.clips)))]
            age = min(int(rng.choice(_AGES, p=_AGE_SHARES)), len(clip) - 1)
            at, seed = int(rng.integers(age, len(clip))), int(rng.integers(2**32))
            for side, frame in ((before, clip[at - age]), (now, clip[at])):
                side.append(drawn(frame, self._crops, np.random.default_rng(seed)))
        told = [normalise(np.stack(side), self._crops.mean, self._crops.std) for side in (before, now)] if filmed else []
        if count > filmed:
            stills = self._photos.batch(rng.integers(0, len(self._photos), count - filmed), self._crops, rng)
            seen = moving(stills, rng, 2)
            steps = np.where(rng.random(len(seen)) < _EXPOSURE_SHARE, 1 + rng.normal(0, _EXPOSURE, len(seen)), 1.0)
            seen[:, 1] *= torch.from_numpy(steps.astype(np.float32)).view(-1, 1, 1, 1)
            told = [torch.cat([*told[i : i + 1], seen[:, i]]) for i in range(2)]
        return told[0], told[1]

    def pieces(self, most: int = 40) -> list[Tensor]:
        """Whole frames of every clip in their order, at most ``most`` of each, (T, 3, H, W): what tables are fitted on."""
        from dataclasses import replace

        whole = replace(self._crops, area=1.0)
        found = []
        for clip in self.clips:
            start = (len(clip) - most) // 2 if len(clip) > most else 0
            shown = [drawn(f, whole, np.random.default_rng(0)) for f in clip[start : start + most]]
            found.append(normalise(np.stack(shown), self._crops.mean, self._crops.std))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What predicting the second frames came to.

    Attributes:
        restored: (P, C, h, w) latents as the receiver has them; the gradient is that of the second frames' own latents.
        bits: (P,) a smooth estimate of what is sent.
        flicker: squared steps by which still cells lie from the symbols that the receiver holds, their mean: whatever has not left
            its symbol's cell costs nothing, so values are drawn to the middle.
    """

    restored: Tensor
    bits: Tensor
    flicker: Tensor


def predict(quantiser: GainQuantiser, before: Tensor, now: Tensor, gain: Tensor, still: Tensor, price: float) -> Predicted:
    """Sends the second frames against the first.

    Args:
        quantiser: with the gains.
        before: the first frames' latents.
        now: the second frames'.
        gain: (P,) gain tier of each pair.
        still: (P, 1, h, w) 1 where the picture did not change.
        price: of a bit, in squared steps; half as much at the coarsest tier, where bundles have it so.
    """
    wanted = quantiser.symbols(now, gain)
    with torch.no_grad():
        reference = quantiser.symbols(before, gain).round()
        coarsest = gain == len(quantiser.log_gain) - 1
        prices = torch.where(coarsest, price * _COARSEST, price).tolist()
        chosen, changed = _choose(wanted, reference, prices)
    off = wanted - reference
    # A step of one costs about 1.5 bits where a cell is sent at all, a doubling as much again (see `choice`).
    bits = (1.5 * torch.log2(1 + off.square()) * changed).sum((1, 2, 3))
    cells = (still.sum() * off.shape[1]).clamp_min(1.0)
    flicker = (off.square().clamp_max(_MOST) * still).sum() / cells
    return Predicted(restored=quantiser.restore(wanted + (chosen - wanted).detach(), gain), bits=bits, flicker=flicker)


def _choose(wanted: Tensor, reference: Tensor, prices: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The codec's own choice: symbols (P, C, h, w), and 1 in the cells that are sent (P, 1, h, w)."""
    count, channels, height, width = wanted.shape
    near = neighbours(height, width)
    same, other = (np.full((channels, 1), bits, np.float32) for bits in _COSTS)
    costs = Costs(same=same, other=other)
    symbols, sent = [], []
    rows = zip(*(t.reshape(count, channels, -1).cpu().numpy().clip(-_LIMIT, _LIMIT) for t in (wanted, reference)), strict=True)
    for turn, (mine, held) in enumerate(rows):
        choice = choose_symbols(mine, held.astype(np.int16), near, costs, prices[turn], turn, _LIMIT)
        symbols.append(choice.values.astype(np.float32))
        sent.append(choice.changed.astype(np.float32))
    shape = (count, -1, height, width)
    return tuple(torch.from_numpy(np.stack(a)).reshape(shape).to(wanted.device) for a in (symbols, sent))  # type: ignore[return-value]


def still_cells(before: Tensor, now: Tensor, std: Sequence[float], grid: tuple[int, int]) -> Tensor:
    """Where the picture did not change, noise apart: (P, 1, h, w), 1 or 0.

    Args:
        before: the first images.
        now: the second.
        std: what they were divided by.
        grid: h, w.
    """
    full = (now - before) * torch.tensor(std, device=now.device).view(-1, 1, 1)
    moved = functional.avg_pool2d(full, _BLUR_PX).abs().amax(1, keepdim=True)
    found: Tensor = (functional.adaptive_max_pool2d(moved, grid) < _STILL).to(now.dtype)
    return found


def checked(names: Sequence[Path], data: Path) -> tuple[str, ...]:
    """Clips by their path below ``data``, or in full where they lie elsewhere.

    Raises:
        ConfigError: there is no such file.
    """
    for name in names:
        if not name.is_file():
            raise ConfigError(f"--video {name}: there is no such file")
    return tuple(str(n.relative_to(data)) if n.is_relative_to(data) else str(n.resolve()) for n in names)
