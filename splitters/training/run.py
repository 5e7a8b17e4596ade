"""One training from a configuration and a folder of photos to a run directory that `splitters export` turns into a bundle."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protos.errors import ConfigError
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.exporting.learned import Rung
from splitters.training.config import TrainConfig
from splitters.training.devices import chosen_device
from splitters.training.finish import finish
from splitters.training.loop import StepReport, Trainer
from splitters.training.pictures.photos import Crops, PhotoCache, Told, hold_out, hold_out_evenly, list_photos
from splitters.training.single import single_from
from splitters.training.video import Pairs
from splitters.zoo.efficientnet_lite0.export import load_student
from splitters.zoo.efficientnet_lite0.network import load_efficientnet_lite0

log = logging.getLogger(__name__)
DEV_FILE = "dev.json"
_SAMPLE = 96
_AIMED = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How far a training is.

    Attributes:
        student: as trained so far; where the run is complete, with the averaged weights that were written.
        step: steps done.
        steps: steps there are.
        photos: trained on.
        unreadable: photos that could not be read and were left out.
        complete: whether the training is done, by its steps or by its time.
    """

    student: LearnedSplit
    step: int
    steps: int
    photos: int
    unreadable: tuple[Path, ...]
    complete: bool


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
        from splitters.zoo.efficientnet_lite0.split import build_learned_efficientnet, staged

        if config.start:
            return staged(load_efficientnet_lite0()), load_student(Path(config.start))
        return build_learned_efficientnet(sample, config.target_bytes)
    from splitters.bottleneck.learned_any import build_any
    from splitters.cutting.sources import load_source
    from splitters.exporting.learned_any import load_weights

    size = (config.size_px, config.size_px)
    source = load_source(config.model, weights=config.weights, size_px=None if config.model.endswith(".pt2") else size)
    if not isinstance(source.model, torch.nn.Module):
        raise ConfigError("an exported program cannot be trained around: give the model itself")
    base, student = build_any(source.model, sample[:1], config.cut, None if config.start else sample)
    if config.start:
        load_weights(student, Path(config.start))
        return base, student
    with torch.no_grad():
        latent = student.eval().latent(sample[:_AIMED], len(student.ensemble.tiers) - 1)
    student.quantiser.aim(latent, [8 * b for b in config.target_bytes])
    return base, student


def roots(config: TrainConfig, data: Path) -> list[Path]:
    """The folders to learn from: those the recipe names that exist below ``data``, or else ``data`` itself."""
    named = [data / part for part in config.data if (data / part).is_dir()]
    return named or [data]


def _held_out(config: TrainConfig, data: Path) -> tuple[list[Path], list[Path]]:
    photos = list_photos(roots(config, data))
    if config.hold_out_of:
        return hold_out_evenly(photos, config.hold_out, config.seed, data / config.hold_out_of)
    return hold_out(photos, config.hold_out, config.seed)


def run_training(
    config: TrainConfig, data: Path, out: Path, *, device: str = "cpu", on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] = lambda: False, cache: Path | None = None, fit: int = 240, command: Sequence[str] = tuple(sys.argv),
    decoding: Told | None = None,
) -> Trained:  # fmt: skip
    """Trains (or goes on training); after the last step writes weights, tables and recipe into ``out``.

    Args:
        config: the recipe's configuration.
        data: folder of photos; labels are not needed.
        out: run directory.
        device: torch device.
        on_step: told of every step.
        stop: asked before every step. The checkpoint then says how far the run is; nothing else is written.
        cache: where decoded photos lie (default: in ``out``).
        fit: photos the probability tables are fitted on.
        command: for the provenance.
        decoding: told how many photos are decoded.

    Raises:
        SourceError: no photos.
        ConfigError: too few photos, or ``out`` holds a run with other settings.
    """
    if fit < 1:
        raise ConfigError(f"the tables need at least one photo to fit on, got {fit}")
    chosen = chosen_device(device, "--device")
    train, dev = _held_out(config, data)
    if len(train) < config.batch:
        raise ConfigError(f"{data} holds {len(train) + len(dev)} photos, {len(dev)} of them held out: too few to train on")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    longest = round(1.15 * config.size_px) if config.letterbox else 0
    photos = PhotoCache(train, cache or out / "photos", short_px=max(256, config.size_px), longest_px=longest, progress=decoding)
    if len(photos) < config.batch:
        raise ConfigError(f"{len(photos)} photos of {data} can be read: too few for a batch of {config.batch}")
    whole = Crops(size_px=config.size_px, area=0.5, mean=config.mean, std=config.std, letterbox=config.letterbox, bgr=config.bgr)
    rng = np.random.default_rng(config.seed)
    sample = photos.batch(rng.choice(len(photos), min(_SAMPLE, len(photos)), replace=False), whole, rng)
    if config.single:
        config = single_from(config, config.single, sample, out / "start")
    base, student = build(config, sample)
    pairs = None
    if config.video is not None:
        crops = Crops(
            size_px=config.size_px, area=config.area, mean=config.mean, std=config.std, letterbox=config.letterbox, bgr=config.bgr
        )
        pairs = Pairs(config.video, data, photos, crops)
    trainer = Trainer(config, base, student, photos, out=out, device=chosen, clock_s=time.monotonic, pairs=pairs)
    (out / DEV_FILE).write_text(json.dumps([str(p) for p in dev], indent=0), encoding="utf-8")
    trainer.run(on_step, stop)
    told = Trained(
        student=student, step=trainer.step, steps=config.steps, photos=len(photos), unreadable=tuple(photos.unreadable),
        complete=trainer.progress >= 1,
    )  # fmt: skip
    if not told.complete:
        return told
    student.load_state_dict(trainer.ema)
    student.to("cpu").eval()
    recipe = {
        "command": shlex.join(command), "config": asdict(config), "photos": len(photos), "held_out": len(dev),
        "seed": config.seed, "steps": trainer.step, "seconds": round(trainer.spent_s), "torch": torch.__version__,
        "device": str(chosen), "unreadable": [p.name for p in photos.unreadable],
    }  # fmt: skip
    full = 224 if config.cut is None else config.size_px  # the default model is trained smaller than it runs
    channels = student.quantiser.log_gain.shape[1]
    finish(
        student, photos, replace(whole, size_px=full, area=0.6), out,
        rungs=[
            Rung(gain=g, channels=channels, single_layer=g >= config.single_layer_from) for g in config.rungs or (0.0,)
        ],
        layers=[*config.groups[1:], channels], recipe=recipe, count=fit, seed=config.seed, whole_state=config.cut is not None,
        filmed=pairs.pieces() if pairs is not None else (), published=base.stages,
    )  # fmt: skip
    return told
