"""Trains the learned bottleneck of our detector within a fixed time, from unlabelled photographs.

``python -m splitters.training.detector.bottleneck --data DIR --out runs/detector-bottleneck --minutes 40``

The loop is that of `splitters.training.loop`, and the teacher is our own detector. The student is matched to it at every layer and
position, so no labels are needed. The clock counts, not the steps: a run ends when it was told to, however busy the machine is,
and the learning rates follow. Started again with the same ``--out``, a run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from splitters.exporting.learned import Rung, tuned_state
from splitters.training.checkpoint import save_checkpoint
from splitters.training.config import LossWeights, Stage, TrainConfig
from splitters.training.fast import speed_up
from splitters.training.finish import finish
from splitters.training.loop import Trainer
from splitters.training.pictures.photos import Crops, PhotoCache, hold_out, list_photos
from splitters.zoo.detector.network import INPUT_SIZE_PX, load_detector
from splitters.zoo.detector.network import WEIGHTS as DETECTOR
from splitters.zoo.detector.split import C_LATENT, build_learned_detector, load_learned_detector
from splitters.zoo.efficientnet_lite0.network import INPUT_MEAN, INPUT_STD

log = logging.getLogger(__name__)
TICKS = 20_000  # the clock's steps in a whole run
DATA = ("coco/train/images", "photos", "imagenette160/train")
TARGET_BYTES = (6500.0, 4000.0, 2500.0, 1500.0, 900.0)  # at the detector's own input size, finest tier first
RUNGS = tuple(i / 2 for i in range(2 * len(TARGET_BYTES) - 1))
_SAMPLE, _HOLD_OUT = 96, 200
_GENTLE = 2e-4
_TIERS = (0.2, 0.2, 0.6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the command line decides.

    Attributes:
        minutes: wall-clock time of the run.
        size_px: side of the training pictures.
        batch: photos a step.
        detector: the detector's weights.
        start: weights of a bottleneck to go on from, trained around the same first blocks; its tail is left, since it belongs to
            another detector. Empty: from the outputs' own metric.
        light_until: share of the run in which the light encoders only learn the largest one's latent.
        tail_from: share of the run after which the tail's backbone trains too.
        fit: photos the probability tables are fitted on.
        seed: of all chance.
    """

    minutes: float = 40.0
    size_px: int = 256
    batch: int = 12
    detector: str = str(DETECTOR)
    start: str = ""
    light_until: float = 0.12
    tail_from: float = 0.5
    fit: int = 240
    seed: int = 0


def configuration(plan: Plan) -> TrainConfig:
    """The loop's configuration; its steps are the clock's ticks.

    First the light encoders learn the largest one's latent, then all learn together, slowly in what they share: its start is good
    already. At last the backbone behind the cut trains too.
    """
    area = (plan.size_px / INPUT_SIZE_PX) ** 2
    light, alone = round(plan.light_until * TICKS), round(plan.tail_from * TICKS)
    stages = (
        Stage(steps=light, lr=2e-3, tiers=(0.5, 0.5, 0.0), latent_only=True, warmup_steps=TICKS // 100),
        Stage(steps=alone - light, lr=8e-4, lr_shared=_GENTLE, tiers=_TIERS, warmup_steps=TICKS // 100),
        Stage(steps=TICKS - alone, lr=8e-4, lr_shared=_GENTLE, lr_tail=5e-5, tiers=_TIERS, warmup_steps=TICKS // 100),
    )
    return TrainConfig(
        model="detector", size_px=plan.size_px, batch=plan.batch, seed=plan.seed, data=DATA, rungs=RUNGS,
        target_bytes=tuple(area * b for b in TARGET_BYTES), letterbox=True, amp=True, area=0.4, truncate=0.1, first_weight=0.5,
        prefixes=(16, 24, 32, 48), groups=(0, 24), mean=(INPUT_MEAN,) * 3, std=(INPUT_STD,) * 3, hold_out=_HOLD_OUT, ema=0.99,
        loss=LossWeights(cut=0.05, stages=(0.2,)), stages=stages,
    )  # fmt: skip


def train(plan: Plan, data: Path, out: Path, *, cache: Path | None = None) -> None:
    """Runs (or goes on with) a training; leaves weights, tables and ``recipe.json`` in ``out``.

    Args:
        plan: see ``Plan``.
        data: the data directory.
        out: run directory.
        cache: where decoded photos lie; in ``out`` when None.
    """
    config = configuration(plan)
    torch.manual_seed(config.seed)
    chosen, _ = hold_out(list_photos([data / part for part in config.data]), config.hold_out, config.seed)
    longest = round(1.15 * INPUT_SIZE_PX)
    photos = PhotoCache(chosen, cache or out / "photos", longest_px=longest)
    whole = Crops(size_px=config.size_px, area=0.5, mean=config.mean, std=config.std, letterbox=True)
    rng = np.random.default_rng(config.seed)
    detector = load_detector(Path(plan.detector))
    sample = photos.batch(rng.choice(len(photos), min(_SAMPLE, len(photos)), replace=False), whole, rng)
    base, student = build_learned_detector(sample, [8 * b for b in config.target_bytes], detector)
    if plan.start:
        earlier = {k: v.float() for k, v in load_file(plan.start).items() if not k.startswith("stages.")}
        student.load_state_dict(earlier, strict=False)
    speed_up(base.modules())
    speed_up(student)
    trainer = Trainer(config, base, student, photos, out=out, device=torch.device("cpu"), clock_s=time.monotonic)
    steps = _run(trainer, plan.minutes)
    student.load_state_dict(trainer.ema)
    save_final(plan, photos, trainer, out, steps)


def _run(trainer: Trainer, minutes: float) -> int:
    """Trains until the time is over; returns the steps really made."""
    spent_s, saved_s, steps, sums = 60 * minutes * trainer.step / TICKS, 0.0, 0, np.zeros(3)
    saved_s = spent_s
    while trainer.step < TICKS:
        before = time.monotonic()
        report = trainer.train_step()
        spent_s += time.monotonic() - before
        steps += 1
        trainer.step = max(trainer.step + 1, min(TICKS, round(spent_s / (60 * minutes) * TICKS)))
        sums += (report.distortion, report.latent, 1)
        if steps % 25 == 0:
            told = " ".join(f"{b:.0f}" for b in report.tier_bytes)
            mean = sums / sums[2]
            log.info("step %d, %.3f of the time: distortion %.3f, latent %.3f, bytes %s",
                     steps, trainer.step / TICKS, mean[0], mean[1], told)  # fmt: skip
            sums[:] = 0
        if spent_s - saved_s > trainer.config.checkpoint_s:
            save_checkpoint(trainer)
            saved_s = spent_s
    save_checkpoint(trainer)
    return steps


def save_final(plan: Plan, photos: PhotoCache, trainer: Trainer, out: Path, steps: int) -> None:
    """Weights in half precision, probability tables for the detector's own input size, recipe."""
    config = trainer.config
    state = out / "final.safetensors"
    save_file(tuned_state(trainer.student, published=trainer.base.stages), state)
    _, student = load_learned_detector(state, INPUT_SIZE_PX, load_detector(Path(plan.detector)))
    state.unlink()
    recipe = {
        "command": shlex.join(sys.argv), "plan": asdict(plan), "config": asdict(config), "photos": len(photos),
        "held_out": config.hold_out, "seed": config.seed, "steps": steps, "torch": torch.__version__,
    }  # fmt: skip
    crops = Crops(size_px=INPUT_SIZE_PX, area=0.5, mean=config.mean, std=config.std, letterbox=True)
    finish(
        student, photos, crops, out, rungs=[Rung(gain=g, channels=C_LATENT) for g in config.rungs],
        layers=[*config.groups[1:], C_LATENT], recipe=recipe, count=plan.fit, seed=config.seed,
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/ and imagenette160/")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an interrupted run there goes on")
    parser.add_argument("--cache", type=Path, help="where decoded photos lie; in OUT by default")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    plan = replace(Plan(), **{name: getattr(args, name) for name in asdict(Plan())})
    train(plan, args.data, args.out, cache=args.cache)


if __name__ == "__main__":
    main()
