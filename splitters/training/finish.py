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
from torch import Tensor

from splitters.bottleneck.learned import LearnedSplit
from splitters.codec.fit import fit_tables
from splitters.exporting.learned import RECIPE_FILE, TABLES_FILE, WEIGHTS_FILE, Rung, gains_at, tuned_state
from splitters.training.photos import Crops, PhotoCache

log = logging.getLogger(__name__)
Symbols = NDArray[np.int16]


@torch.no_grad()
def sample_latents(student: LearnedSplit, images: Sequence[Tensor]) -> Tensor:
    """Latents of all photos, the encoder tiers taking turns: what the tables must fit is what ships."""
    tiers = len(student.ensemble.tiers)
    return torch.cat([student.latent(batch, i % tiers) for i, batch in enumerate(images)])


def symbols_at(latents: Tensor, gains: Tensor) -> list[Symbols]:
    """Rounded symbols of every row of gains (R, C)."""
    return [(latents * row[:, None, None]).round().clamp(-2000, 2000).to(torch.int16).numpy() for row in gains]


def jittered(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """The same scenes a moment later, as a fixed camera sees them: sensor noise, a little light, something that moved.

    Stands in for video, of which the training photos hold none. Args: normalised images (N, 3, H, W).
    """
    later = batch * float(rng.uniform(0.97, 1.03)) + torch.from_numpy(rng.normal(0, 0.02, batch.shape).astype(np.float32))
    n, _, h, w = batch.shape
    for i in range(n):
        if rng.random() < 0.6:
            bh, bw = int(h * rng.uniform(0.1, 0.35)), int(w * rng.uniform(0.1, 0.35))
            top, left = int(rng.integers(0, h - bh)), int(rng.integers(0, w - bw))
            shift = int(rng.integers(-8, 9))
            patch = torch.roll(batch[i, :, top : top + bh, left : left + bw], shift, dims=2)
            later[i, :, top : top + bh, left : left + bw] = patch
    return later


def finish(
    student: LearnedSplit, photos: PhotoCache, crops: Crops, out: Path, *,
    rungs: Sequence[Rung], layers: Sequence[int], recipe: Mapping[str, Any],
    count: int = 240, seed: int = 0, whole_state: bool = False, progress: Callable[[str], None] = log.info,
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
    """
    out.mkdir(parents=True, exist_ok=True)
    state = tuned_state(student, everything=whole_state)
    student.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    student.eval()
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(photos), min(count, len(photos)), replace=False)
    batches = [photos.batch(chosen[i : i + 12], crops, rng) for i in range(0, len(chosen), 12)]
    latents = sample_latents(student, batches)
    later = sample_latents(student, [jittered(b, rng) for b in batches])
    gains = gains_at(student, list(dict.fromkeys(r.gain for r in rungs)))[0]
    now, before = symbols_at(later, gains), symbols_at(latents, gains)
    tables = fit_tables(before, layers, pairs_by_tier=list(zip(now, before, strict=True)), progress=progress)
    save_file(state, out / WEIGHTS_FILE)
    (out / TABLES_FILE).write_bytes(tables)
    about = {
        **recipe,
        "rungs": [asdict(r) for r in rungs],
        "layers": list(layers),
        "fitted_on": len(chosen),
    }
    (out / RECIPE_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
