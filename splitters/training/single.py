"""The same recipe for one operating point: what slimmability costs is the difference.

The single arm starts from the same weights, keeps one gain tier, shows every photo of every step to one encoder tier, never
drops channels, and aims at the bytes which that point takes at the start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protos.errors import ConfigError
from splitters.bottleneck.learned import LearnedSplit
from splitters.exporting.learned import WEIGHTS_FILE
from splitters.training.config import TrainConfig
from splitters.zoo.efficientnet_lite0.export import load_student
from splitters.zoo.efficientnet_lite0.split import TIERS


def parse_point(text: str) -> tuple[int, int]:
    """``TIER:GAIN``, such as ``own:3`` or ``s:3``, as numbers of encoder and gain tier.

    Raises:
        ConfigError: it names no tier.
    """
    names = [tier.name for tier in TIERS]
    name, _, gain = text.partition(":")
    if name not in names or not gain.isdigit():
        raise ConfigError(f"a single point is TIER:GAIN with TIER one of {', '.join(names)}, not {text!r}")
    return names.index(name), int(gain)


@torch.no_grad()
def estimated_bytes(student: LearnedSplit, images: Tensor, tier: int, gain: int) -> float:
    """Mean estimated payload of normalised ``images`` at one point, bytes."""
    latent = student.latent(images, tier)
    index = torch.full((len(images),), gain)
    symbols = student.quantiser.symbols(latent, index).round()
    return float(student.quantiser.bits(symbols, index, torch.ones(latent.shape[:2])).mean()) / 8


def single_point(config: TrainConfig, tier: int, gain: int, target_bytes: float, folder: Path) -> TrainConfig:
    """``config`` for one operating point; writes its start, the weights with one gain tier, into ``folder``.

    Stages that only teach cheap encoders the latent are left out, and their steps given to the others.

    Args:
        config: a recipe that goes on from trained weights.
        tier: encoder tier.
        gain: gain tier.
        target_bytes: estimated payload to aim at.
        folder: for the start.

    Raises:
        ConfigError: the recipe starts from nothing, or there is no such gain tier.
    """
    if not config.start:
        raise ConfigError("a single point goes on from trained weights: give --start")
    state = load_file(Path(config.start) / WEIGHTS_FILE)
    if gain >= len(state["quantiser.log_gain"]):
        raise ConfigError(f"there are {len(state['quantiser.log_gain'])} gain tiers, so no tier {gain}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v[gain : gain + 1].clone() if k.startswith("quantiser.") else v for k, v in state.items()}, folder / WEIGHTS_FILE)
    only = tuple(float(i == tier) for i in range(len(TIERS)))
    return replace(
        config, start=str(folder), target_bytes=(target_bytes,), rungs=(0.0,), truncate=0.0, lost_layers=0.0,
        stages=tuple(replace(stage, tiers=only) for stage in config.stages if not stage.latent_only),
    ).scaled(config.steps)  # fmt: skip


def single_from(config: TrainConfig, text: str, images: Tensor, folder: Path) -> TrainConfig:
    """As ``single_point``, aiming at what the start's own point takes on normalised ``images``."""
    tier, gain = parse_point(text)
    if not config.start:
        raise ConfigError("a single point goes on from trained weights: give --start")
    student = load_student(Path(config.start))
    if gain >= len(student.quantiser.log_gain):
        raise ConfigError(f"there are {len(student.quantiser.log_gain)} gain tiers, so no tier {gain}")
    return single_point(config, tier, gain, estimated_bytes(student, images, tier, gain), folder)
