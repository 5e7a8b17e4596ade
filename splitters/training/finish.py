"""From a finished (or running) training to what ships: half-precision weights, frozen tables, recipe.

Shape legend: symbols (N, C, h, w) int16; R rungs of the bitrate knob.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from protos.errors import ConfigError
from splitters.bottleneck.learned import LearnedSplit
from splitters.codec.fitting.fit import fit_tables, refit_predicted
from splitters.exporting.learned import RECIPE_FILE, TABLES_FILE, WEIGHTS_FILE, Rung, gains_at, prices_at, tuned_state
from splitters.training.pictures.photos import Crops, PhotoCache

log = logging.getLogger(__name__)
Symbols = NDArray[np.int16]
CLIP_FRAMES = 5
_CLIP_SHARE = 4  # one batch in this many becomes clips


@torch.no_grad()
def sample_latents(student: LearnedSplit, images: Sequence[Tensor]) -> Tensor:
    """Latents of all photos, the encoder tiers taking turns: what the tables must fit is what ships."""
    tiers = len(student.ensemble.tiers)
    return torch.cat([student.latent(batch, i % tiers) for i, batch in enumerate(images)])


@torch.no_grad()
def clip_latents(student: LearnedSplit, clips: Tensor) -> list[NDArray[np.float32]]:
    """The largest encoder's latents of clips (N, T, 3, H, W), as N arrays (T, C, h, w)."""
    largest = len(student.ensemble.tiers) - 1
    return [student.latent(clip, largest).numpy() for clip in clips]


def symbols_at(latents: Tensor, gains: Tensor) -> list[Symbols]:
    """Rounded symbols of every row of gains (R, C)."""
    return [(latents * row[:, None, None]).round().clamp(-2000, 2000).to(torch.int16).numpy() for row in gains]


def moving(batch: Tensor, rng: np.random.Generator, frames: int = CLIP_FRAMES) -> Tensor:
    """Short clips of the same scenes as a fixed camera sees them: sensor noise, a little light, something that moves through.

    Stands in for video, of which the training photos hold none.

    Args:
        batch: normalised images (N, 3, H, W).
        rng: source of all randomness.
        frames: T.

    Returns:
        (N, T, 3, H, W).
    """
    h, w = batch.shape[2:]
    clips = batch[:, None].repeat(1, frames, 1, 1, 1)
    for clip, other in zip(clips, batch.roll(1, 0), strict=True):
        for _ in range(int(rng.integers(0, 4))):
            bh, bw = int(h * rng.uniform(0.05, 0.3)), int(w * rng.uniform(0.05, 0.3))
            top, left = int(rng.integers(0, h - bh)), int(rng.integers(0, w - bw))
            piece, speed = other[:, top : top + bh, left : left + bw], rng.normal(0, 6, size=2)
            for t in range(frames):
                y, x = (int(np.clip(at + t * v, 0, room)) for at, v, room in zip((top, left), speed, (h - bh, w - bw), strict=True))
                clip[t, :, y : y + bh, x : x + bw] = piece
        noise = torch.from_numpy(rng.normal(0, 10 ** rng.uniform(-2.3, -1.5), clip.shape).astype(np.float32))
        light = torch.from_numpy(1 + rng.normal(0, 0.004, (frames, 1, 1, 1)).astype(np.float32))
        clip.mul_(light).add_(noise)
    return clips


def finish(
    student: LearnedSplit, photos: PhotoCache, crops: Crops, out: Path, *,
    rungs: Sequence[Rung], layers: Sequence[int], recipe: Mapping[str, Any],
    count: int = 240, seed: int = 0, whole_state: bool = False, progress: Callable[[str], None] = log.info,
    filmed: Sequence[Tensor] = (), published: Sequence[nn.Module] = (),
) -> None:  # fmt: skip
    """Writes weights, tables and recipe into ``out``.

    Args:
        student: trained, eval mode; saved and fitted in half precision, as it ships.
        photos: training photos the tables are fitted on.
        crops: how they are shown.
        out: the folder.
        rungs: settings of the bitrate knob.
        layers: where each payload layer ends, in channels.
        recipe: provenance: command, data, seed, steps.
        count: photos fitted on.
        seed: of their choice.
        whole_state: keep every weight, not only what differs from the published model.
        progress: told what is being done.
        published: the uncut model's stages, which need not be shipped where the student's are the same.
        filmed: frames of real clips (T, 3, H, W), which predicted frames are fitted on in place of moved photos.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = tuned_state(student, published=published, everything=whole_state)
    student.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)
    student.eval()
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(photos), min(count, len(photos)), replace=False)
    batches = [photos.batch(chosen[i : i + 12], crops, rng) for i in range(0, len(chosen), 12)]
    latents = sample_latents(student, batches)
    gains = gains_at(student, list(dict.fromkeys(r.gain for r in rungs)))[0]
    moved = (moving(batch, rng) for batch in batches[::_CLIP_SHARE])
    clips = [c for clip in ([f[None] for f in filmed] or moved) for c in clip_latents(student, clip)]
    tables = fit_tables(symbols_at(latents, gains), layers, progress=progress)
    try:
        by_gain = dict(zip((r.gain for r in rungs), prices_at(rungs).values(), strict=True))
        prices = [by_gain[gain] for gain in dict.fromkeys(r.gain for r in rungs)]
        tables = refit_predicted(tables, clips, gains.numpy(), prices=prices, progress=progress)
    except ConfigError as error:  # a latent of few cells, or photos in which nothing can move: key frames alone
        log.warning("no tables of predicted frames: %s; `splitters adapt` fits them to a camera's video", error.message)
    save_file(state, out / WEIGHTS_FILE)
    (out / TABLES_FILE).write_bytes(tables)
    about = {
        **recipe,
        "rungs": [asdict(r) for r in rungs],
        "layers": list(layers),
        "fitted_on": len(chosen),
    }
    (out / RECIPE_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
