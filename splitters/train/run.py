"""One training from a configuration and a folder of photos to a run directory that `splitters export` turns into a bundle."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protos.errors import ConfigError
from splitters.models.learned import LearnedSplit, StagedModel
from splitters.models.learned_export import Rung
from splitters.train.config import TrainConfig
from splitters.train.finish import finish
from splitters.train.loop import StepReport, Trainer
from splitters.train.photos import Crops, PhotoCache, hold_out, list_photos

log = logging.getLogger(__name__)
_SAMPLE = 96


def build(config: TrainConfig, sample: Tensor) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and untrained student of a configuration.

    Args:
        config: the configuration.
        sample: normalised photos, some tens.

    Raises:
        ConfigError: the model is not known, or cannot be given a bottleneck at that cut.
    """
    if config.cut is None:
        if config.model != "efficientnet-lite0":
            raise ConfigError(f"model {config.model!r} needs a cut")
        from splitters.models.learned_efficientnet import build_learned_efficientnet

        base, student = build_learned_efficientnet(sample)
        tiers = len(config.target_bytes)
        if tiers != len(student.quantiser.log_gain):
            middle = [student.quantiser.log_gain.shape[0] // 2] * tiers
            for name in ("log_gain", "log_ungain", "prior_mean", "prior_log_scale"):
                value = getattr(student.quantiser, name)
                setattr(student.quantiser, name, torch.nn.Parameter(value.detach()[middle].clone()))
        return base, student
    from splitters.models.learned_any import build_any
    from splitters.sources import load_source

    size = (config.size_px, config.size_px)
    source = load_source(config.model, weights=config.weights, size_px=None if config.model.endswith(".pt2") else size)
    if not isinstance(source.model, torch.nn.Module):
        raise ConfigError("an exported program cannot be trained around: give the model itself")
    return build_any(source.model, sample[:1], config.cut, sample)


def roots(config: TrainConfig, data: Path) -> list[Path]:
    """The folders to learn from: those the recipe names that exist below ``data``, or else ``data`` itself."""
    named = [data / part for part in config.data if (data / part).is_dir()]
    return named or [data]


def run_training(
    config: TrainConfig, data: Path, out: Path, *, device: str = "cpu", on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] = lambda: False, cache: Path | None = None, fit: int = 240, command: Sequence[str] = tuple(sys.argv),
) -> LearnedSplit:  # fmt: skip
    """Trains (or goes on training) and writes weights, tables and recipe into ``out``.

    Args:
        config: the recipe's configuration.
        data: folder of photos; labels are not needed.
        out: run directory.
        device: torch device.
        on_step: told of every step.
        stop: asked before every step; the run can be resumed.
        cache: where decoded photos lie (default: in ``out``).
        fit: photos the probability tables are fitted on.
        command: for the provenance.

    Raises:
        SourceError: no photos.
        ConfigError: too few photos, or ``out`` holds another recipe's checkpoint.
    """
    train, dev = hold_out(list_photos(roots(config, data)), config.hold_out, config.seed)
    if len(train) < config.batch:
        raise ConfigError(f"{data} holds {len(train) + len(dev)} photos, {len(dev)} of them held out: too few to train on")
    out.mkdir(parents=True, exist_ok=True)
    (out / "dev.json").write_text(json.dumps([str(p) for p in dev], indent=0), encoding="utf-8")
    torch.manual_seed(config.seed)
    photos = PhotoCache(train, cache or out / "photos", short_px=max(256, config.size_px))
    whole = Crops(size_px=config.size_px, area=0.5, mean=config.mean, std=config.std)
    rng = np.random.default_rng(config.seed)
    base, student = build(config, photos.batch(rng.choice(len(photos), min(_SAMPLE, len(photos)), replace=False), whole, rng))
    trainer = Trainer(config, base, student, photos, out=out, device=torch.device(device), clock_s=time.monotonic)
    trainer.run(on_step, stop)
    student.load_state_dict(trainer.ema)
    student.to("cpu").eval()
    recipe = {
        "command": shlex.join(command), "config": asdict(config), "photos": len(train), "held_out": len(dev),
        "seed": config.seed, "steps": trainer.step, "torch": torch.__version__,
    }  # fmt: skip
    full = 224 if config.cut is None else config.size_px  # the default model is trained smaller than it runs
    channels = student.quantiser.log_gain.shape[1]
    finish(
        student, photos, replace(whole, size_px=full, area=0.6), out,
        rungs=[Rung(gain=g, channels=channels) for g in config.rungs or (0.0,)],
        layers=[*config.groups[1:], channels], recipe=recipe, count=fit, seed=config.seed, whole_state=config.cut is not None,
    )  # fmt: skip
    return student
