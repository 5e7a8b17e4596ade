"""Recipes: plain functions that return a full training configuration. `splitters train RECIPE` calls one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from protos.errors import ConfigError
from splitters.models.learned_any import AnyCutConfig
from splitters.train.config import LossWeights, Stage, TrainConfig

RUNGS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def efficientnet_lite0() -> TrainConfig:
    """The default bundle's bottleneck: four encoder tiers, six gain tiers, one set of weights.

    First the base's own blocks with a frozen tail; then the cheap encoders learn the same latent; then all together, with
    the first blocks of the tail and the own blocks fine-tuned; then mostly the cheap encoders again, which start from
    nothing and need the most photos. Trained at 192 px, which costs three quarters of 224 px; targets are bytes at that
    size. About an hour on one core.
    """
    return TrainConfig(
        model="efficientnet-lite0", size_px=192, rungs=RUNGS,
        target_bytes=tuple(0.735 * b for b in (3800, 2500, 1600, 1000, 620, 380)),
        data=("imagenette160/train", "photos", "coco/train/images"),
        stages=(
            Stage(steps=500, lr=1e-3, tiers=(0, 0, 0, 1)),
            Stage(steps=350, lr=2e-3, tiers=(0.34, 0.33, 0.33, 0), latent_only=True),
            Stage(steps=326, lr=8e-4, lr_own=3e-5, lr_tail=1e-4, tiers=(0.34, 0.11, 0.11, 0.44)),
            Stage(steps=1020, lr=1.5e-3, tiers=(0.5, 0.15, 0.15, 0.2), warmup_steps=10),
        ),
    )  # fmt: skip


def efficientnet_lite0_single() -> TrainConfig:
    """The same recipe for one operating point (own blocks, one gain tier, no truncation): what slimmability costs."""
    return TrainConfig(
        model="efficientnet-lite0", size_px=192, target_bytes=(0.735 * 1000,), rungs=(0.0,), truncate=0.0,
        data=("imagenette160/train", "photos", "coco/train/images"),
        stages=(Stage(steps=500, lr=1e-3, tiers=(0, 0, 0, 1)),),
    )  # fmt: skip


def any_cut(
    source: str, at: str, *, stem_at: str = "", match: tuple[str, ...] = (), task: str = "classification", weights: str = "hub",
    size_px: int = 224, steps: int = 3000, batch: int = 32,
) -> TrainConfig:  # fmt: skip
    """A bottleneck for any model at any cut that one feature map crosses.

    Args:
        source: the model, as `splitters cut` names it.
        at: the cut.
        stem_at: an earlier cut, from whose map cheap encoders start; empty: the head runs as it is.
        match: later cuts where student and teacher are matched.
        task: ``classification`` distils the logits, ``detection`` matches the raw outputs.
        weights: as for `splitters cut`.
        size_px: side of the training crops.
        steps: of all stages together.
        batch: photos a step.
    """
    cheap = (0.25, 0.15) if stem_at else ()
    own = 1 - sum(cheap)
    alone = (*(0.0 for _ in cheap), 1.0)
    first = Stage(steps=max(1, steps // 3), tiers=alone)
    distil = (Stage(steps=max(1, steps // 6), lr=2e-3, tiers=(0.5, 0.5, 0.0), latent_only=True),) if stem_at else ()
    rest = steps - first.steps - sum(s.steps for s in distil)
    cut = AnyCutConfig(at=at, stem_at=stem_at, match=match, task=task)
    return TrainConfig(
        model=source, cut=cut, weights=weights, size_px=size_px, batch=batch, rungs=tuple(i / 2 for i in range(7)), groups=(0, 16),
        prefixes=(8, 12, 16, 24), target_bytes=tuple(size_px**2 / 224**2 * b for b in (4000, 2000, 1000, 500)),
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), loss=LossWeights(stages=(1.0,) * max(1, len(match))),
        stages=(first, *distil, Stage(steps=max(1, rest), lr=8e-4, lr_tail=1e-4, tail_stages=1, tiers=(*cheap, own))),
    )  # fmt: skip


RECIPES: Mapping[str, Callable[[], TrainConfig]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "efficientnet-lite0-single": efficientnet_lite0_single,
}


def recipe(name: str) -> TrainConfig:
    """The configuration of a named recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, or any (with --model and --at)")
    return RECIPES[name]()
