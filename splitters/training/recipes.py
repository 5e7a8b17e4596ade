"""Recipes: plain functions that return a full training configuration. `splitters train RECIPE` calls one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from protos.messages import Detection
from splitters.bottleneck.learned_any import AnyCutConfig
from splitters.registry import Registry
from splitters.tasks.base import form_of
from splitters.training.config import LossWeights, Stage, TrainConfig, share_out
from splitters.zoo.efficientnet_lite0 import WEIGHTS

_GENTLE = 2e-4  # a start from the outputs' own metric is good already; 1e-3 undoes it before it learns anything
RUNGS = (0.0, 0.8, 1.4, 2.0, 2.8, 3.3, 4.0, 5.0)


def efficientnet_lite0() -> TrainConfig:
    """The default bundle's bottleneck: four encoder tiers, six gain tiers, one set of weights, photos of all kinds.

    Every part starts near its goal (`splitters.zoo.efficientnet_lite0.split.build_learned_efficientnet`), the largest encoder so
    near that faster rates would only take it away: what all tiers share moves slowly, the tail not at all, and the cheap encoders
    learn to give what decoder and tail understand, first the largest one's latent, then the answer. Give ``--seconds`` on a busy
    machine.
    """
    return TrainConfig(
        model="efficientnet-lite0", size_px=192, rungs=RUNGS, single_layer_from=2.8, area=0.5, amp=True, even=True,
        target_bytes=tuple(0.735 * b for b in (3800, 2500, 1600, 1000, 620, 380)),
        data=("photos", "coco/train/images"), disturb=0.2, truncate=0.05, lost_slices=0.03, loss=LossWeights(logits=2.0),
        stages=(
            Stage(steps=600, lr=5e-4, tiers=(0.34, 0.33, 0.33, 0), latent_only=True),
            Stage(steps=5400, lr=5e-4, lr_shared=2e-5, lr_own=1e-5, tiers=(0.23, 0.23, 0.22, 0.32), warmup_steps=100),
        ),
    )  # fmt: skip


def efficientnet_lite0_joint() -> TrainConfig:
    """Goes on from earlier weights; a few steps let the cheap encoders catch up with the largest one's latent."""
    first, then = efficientnet_lite0().stages
    return replace(
        efficientnet_lite0(), start=str(WEIGHTS), stages=(replace(first, steps=200, lr=3e-4), replace(then, steps=1800, lr=3e-4)),
    )  # fmt: skip


def any_cut(
    source: str, cut: AnyCutConfig, *, weights: str = "hub", size_px: int = 224, steps: int = 3000, batch: int = 32,
    target_bytes: tuple[float, ...] = (), serving: Mapping[str, Any] | None = None,
) -> TrainConfig:  # fmt: skip
    """A bottleneck for any model at any cut.

    A third of the steps train the bottleneck alone, then (a sixth) the cheap encoders learn its latent, then everything and the
    tail. Detectors see whole photos and large parts, letterboxed, and are matched at the taps and at their raw outputs.

    Args:
        source: the model, as `splitters cut` names it.
        cut: where, and how its bottleneck is built.
        weights: as for `splitters cut`.
        size_px: side of the training crops.
        steps: of all stages together.
        batch: photos a step.
        target_bytes: payload each gain tier aims at, finest first; default: by task and size.
        serving: the manifest's ends of the model (see `commands.common.serving_arguments`); default: ImageNet's normalisation.
    """
    detects = form_of(cut.task) is Detection
    cheap = (0.25, 0.15) if cut.stem_at else ()
    own = 1 - sum(cheap)
    alone = (*(0.0 for _ in cheap), 1.0)
    first, distil, last = share_out(steps, (2, 1, 3) if cut.stem_at else (1, 0, 2))
    usual = (5200, 3050, 1800, 1050, 580) if detects else (4000, 2000, 1000, 500)
    finest = target_bytes or tuple(size_px**2 / 224**2 * b for b in usual)
    spec = (serving or {}).get("preprocess", {})
    stages = (
        (first, partial(Stage, lr_shared=_GENTLE, tiers=alone)),
        (distil, partial(Stage, lr=2e-3, tiers=(0.5, 0.5, 0.0), latent_only=True)),
        (last, partial(Stage, lr=8e-4, lr_shared=_GENTLE, lr_tail=5e-5, tiers=(*cheap, own))),
    )
    return TrainConfig(
        model=source, cut=replace(cut, steps=_steps(len(finest))), weights=weights, size_px=size_px, batch=batch,
        rungs=tuple(i / 2 for i in range(2 * len(finest) - 1)), groups=(0, 16) if cut.channels > 16 else (0,),
        prefixes=tuple(sorted({max(1, cut.channels * n // 8) for n in (2, 3, 4, 6)})), target_bytes=finest,
        truncate=0.1 if detects else 0.25, letterbox=detects, area=0.4 if detects else 0.25, first_weight=0.5 if detects else 0.0,
        mean=tuple(spec.get("mean", (0.485, 0.456, 0.406))), std=tuple(spec.get("std", (0.229, 0.224, 0.225))),
        loss=LossWeights(cut=0.05, stages=(0.2,)) if detects else LossWeights(stages=(1.0,)), serving=serving or {}, hold_out=200,
        stages=tuple(make(steps=count) for count, make in stages if count),
    )  # fmt: skip


def _steps(tiers: int) -> tuple[float, ...]:
    """First quantiser steps, each 1.7 times the one before; training moves them to the targets."""
    return tuple(0.4 * 1.7**i for i in range(tiers))


RECIPES: Registry[Callable[[], TrainConfig]] = Registry(
    "headtail.recipes",
    "recipe",
    {
        "efficientnet-lite0": "splitters.training.recipes:efficientnet_lite0",
        "efficientnet-lite0-joint": "splitters.training.recipes:efficientnet_lite0_joint",
    },
)


def recipe(name: str) -> TrainConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    return RECIPES.get(name)()
