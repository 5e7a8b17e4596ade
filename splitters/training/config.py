"""The full configuration of one training, as returned by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from protos.errors import ConfigError
from splitters.bottleneck.learned_any import AnyCutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of newly made parts; falls along a cosine over the stage.
        lr_shared: that of what all tiers share, decoder and gains, and of the largest encoder's projection; None: ``lr``.
        lr_own: that of the own encoder's blocks, 0 keeps them frozen.
        lr_tail: that of the student's tail, 0 keeps it frozen.
        tail_stages: how many leading tail stages ``lr_tail`` applies to.
        tiers: share of each encoder tier among a batch's samples, cheapest first; they sum to 1.
        latent_only: nothing but the cheap tiers' latents is learned, from the largest tier's: several times faster,
            a start for the stages that answer through decoder and tail.
    """

    steps: int
    lr: float = 1e-3
    lr_shared: float | None = None
    lr_own: float = 0.0
    lr_tail: float = 0.0
    tail_stages: int = 1
    tiers: tuple[float, ...] = (1.0,)
    warmup_steps: int = 50
    latent_only: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or abs(sum(self.tiers) - 1) > 1e-6:
            raise ConfigError("a stage needs at least one step and tier shares that sum to 1")


def share_out(steps: int, weights: Sequence[float]) -> list[int]:
    """``steps`` divided in proportion to ``weights``, exactly: they sum to ``steps``. A part may be 0 where there are few.

    Raises:
        ConfigError: there is no step to divide.
    """
    if steps < 1:
        raise ConfigError(f"a training needs at least one step, got {steps}")
    ideal = [steps * w / sum(weights) for w in weights]
    counts = [int(i + 1e-9) for i in ideal]
    by_rest = sorted(range(len(weights)), key=lambda i: (counts[i] - ideal[i], i))
    for i in by_rest[: steps - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the loss's terms; features are compared in units of the teacher's variance.

    Attributes:
        cut: mean squared error at the cut.
        stages: at each matched stage but the last.
        logits: Kullback-Leibler divergence of the logits (classification), divergence and box error of a detector's raw
            outputs, else squared error at the last stage.
        latent: a cheap tier's latent against the largest tier's.
    """

    cut: float = 0.3
    stages: tuple[float, ...] = (1.0, 1.0)
    logits: float = 1.0
    latent: float = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLearning:
    """How a training learns from neighbouring frames (see `splitters.training.video`).

    Attributes:
        clips: video files, below the data folder or absolute.
        until: share of each clip that is learned from, from its start; the rest can judge.
        fps: frames a second that a camera will send.
        share: of a batch that is the second frame of a pair.
        bits: weight of a predicted frame's bit, in that of a key frame's.
        flicker: weight of a still cell's mean squared change, in squared steps.
        price: of a bit in the codec's choice, in squared steps.
    """

    clips: tuple[str, ...] = ()
    until: float = 0.5
    fps: float = 10.0
    share: float = 0.5
    bits: float = 2.0
    flicker: float = 0.5
    price: float = 0.4

    def __post_init__(self) -> None:
        if not (0 < self.until <= 1 and self.fps > 0 and 0 < self.share <= 1 and min(self.bits, self.flicker, self.price) >= 0):
            raise ConfigError(
                "learning from video needs 0 < until <= 1, fps above 0, 0 < share <= 1 and weights that are not negative"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training.

    Attributes:
        model: ``efficientnet-lite0``, or a source as `splitters cut` takes it (``timm:NAME`` …) with ``cut``.
        cut: where a model other than the default is cut and how its bottleneck is built.
        weights: of the source, as `splitters cut --weights` takes it.
        rungs: settings of the bitrate knob in the bundle: gain tiers, fractions lying between two of them.
        serving: for the manifest: ``preprocess``, ``postprocess``, ``labels``, as JSON; empty: the source's own.
        letterbox: photos are shown whole or as large cut-outs, scaled to fit and padded, as detectors see them; else cropped.
        amp: the student's decoder and tail in bfloat16 on the processor too; on a GPU they always are.
        even: every operating point's distortion counts in proportion to what is usual there; else the coarse points and the cheap
            encoders, which lose most, decide nearly alone what the decoder learns.
        first_weight: of the bits in the loss, relative to a bit's share of the finest tier's target, at the start.
        single_layer_from: rungs from this gain on are so small that a frame fits one packet, and travel in one layer.
        start: folder with trained weights to go on from; empty: the published model.
        single: ``TIER:GAIN``: train for this one operating point alone, from ``start`` (see `splitters.training.single`).
        data: sub-folders of the data directory to learn from; empty for all of it.
        target_bytes: estimated payload of each gain tier in the largest encoder tier, finest first: the trade-off
            between loss and bits of every tier is steered towards it.
        disturb: probability that a photo is shown poorer, to teacher and student alike (see `splitters.training.pictures.disturb`).
        seconds: the training ends when so much time is spent, or after its steps, whichever comes first, and the learning rate
            follows whichever is further; 0: after its steps.
        truncate: probability that a sample loses a random number of its trailing channels (tail-drop).
        prefixes: how many channels such a sample keeps.
        lost_layers: probability that a sample loses a channel group in the middle (masks of lost layers).
        lost_slices: probability that a slice of a sample, a quarter of its plane, does not arrive; all four are never lost.
        groups: first channel of every group.
        hold_out: photos kept for ``dev``.
        hold_out_of: sub-folder of the data directory to take them from, equally many of each folder in it; empty: of all.
        ema: decay of the averaged weights.
        video: learn from neighbouring frames too; None: from photos alone.
    """

    model: str
    stages: tuple[Stage, ...]
    target_bytes: tuple[float, ...]
    cut: AnyCutConfig | None = None
    weights: str = "random"
    rungs: tuple[float, ...] = ()
    serving: Mapping[str, Any] = field(default_factory=dict)
    letterbox: bool = False
    amp: bool = False
    even: bool = False
    first_weight: float = 0.0
    single_layer_from: float = 1e9
    start: str = ""
    disturb: float = 0.0
    seconds: float = 0.0
    single: str = ""
    data: tuple[str, ...] = ()
    size_px: int = 224
    mean: tuple[float, float, float] = (127 / 255, 127 / 255, 127 / 255)
    std: tuple[float, float, float] = (128 / 255, 128 / 255, 128 / 255)
    loss: LossWeights = LossWeights()
    batch: int = 32
    area: float = 0.25
    truncate: float = 0.25
    prefixes: tuple[int, ...] = (8, 12, 16, 24, 32, 40)
    lost_layers: float = 0.0
    lost_slices: float = 0.0
    groups: tuple[int, ...] = (0, 16, 32)
    hold_out: int = 500
    hold_out_of: str = ""
    ema: float = 0.998
    clip_norm: float = 2.0
    seed: int = 0
    checkpoint_s: float = 300.0
    video: VideoLearning | None = None

    def __post_init__(self) -> None:
        if any(b <= 0 for b in self.target_bytes) or list(self.target_bytes) != sorted(self.target_bytes, reverse=True):
            raise ConfigError("target_bytes falls from the finest tier to the coarsest")
        if not 0 <= self.lost_slices < 1:
            raise ConfigError(f"lost_slices must be a probability below 1, got {self.lost_slices}")
        if not self.target_bytes or not self.stages:
            raise ConfigError("a training needs a gain tier and a stage")
        if not 0 <= self.disturb <= 1 or self.seconds < 0:
            raise ConfigError(f"disturb must be a probability and seconds not negative, got {self.disturb} and {self.seconds}")
        for name, low, high in (("batch", 1, 65_536), ("hold_out", 0, 10_000_000), ("size_px", 16, 8192), ("seed", 0, 2**31 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be {low}..{high}, got {getattr(self, name)}")

    def scaled(self, steps: int) -> TrainConfig:
        """The same with ``steps`` steps in all, divided among the stages as now; a stage left without a step goes."""
        counts = share_out(steps, [stage.steps for stage in self.stages])
        stages = tuple(replace(s, steps=n) for s, n in zip(self.stages, counts, strict=True) if n)
        return replace(self, stages=stages)

    @property
    def bgr(self) -> bool:
        """Whether the model takes blue first, as its end in the manifest says."""
        return bool(self.serving.get("preprocess", {}).get("channel_order") == "bgr")

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage that step number ``step`` falls into, and its index within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], self.stages[-1].steps - 1
