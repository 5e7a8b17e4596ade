"""The training loop of a learned bottleneck: any staged base model, any folder of photos, CPU or GPU.

One step draws a batch, runs the teacher once, gives every sample its own encoder tier, gain tier and number of
channels (the sandwich rule spread over the batch), and answers all of them through one decoder and tail.
Everything random in step k comes from (seed, k), so a resumed run continues exactly where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from splitters.bottleneck.ensemble import OwnEncoder
from splitters.bottleneck.learned import LearnedSplit, StagedModel, run_stages
from splitters.bottleneck.learned_any import FusedEncoder
from splitters.training.checkpoint import load_checkpoint, save_checkpoint
from splitters.training.config import Stage, TrainConfig, VideoLearning
from splitters.training.fast import speed_up
from splitters.training.losses import BitrateSteering, arrived, relative_error, staged_distortion
from splitters.training.pictures.photos import Crops, PhotoCache
from splitters.training.schedule import average_in, rise_and_fall
from splitters.training.video import Pairs, Predicted, predict, still_cells

log = logging.getLogger(__name__)
_USUAL = 0.02  # how fast an operating point's usual distortion follows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step measured: means over the batch.

    Attributes:
        step: steps done, of ``steps``.
        progress: share of the training that is done, by steps or by time, whichever is further.
        loss: the whole loss.
        distortion: without the bits.
        latent: the cheap tiers' squared error against the largest latent, in its variance.
        tier_bytes: running estimate of each gain tier's payload.
    """

    step: int
    steps: int
    progress: float
    loss: float
    distortion: float
    latent: float
    tier_bytes: tuple[float, ...]


class Trainer:
    """One training run.

    Args:
        config: what the recipe says.
        base: the teacher.
        student: trained in place.
        photos: decoded training photos.
        out: run directory: checkpoints.
        device: torch device.
        clock_s: monotonic seconds, for checkpoints and for a training that ends by time.
        pairs: neighbouring frames, where the configuration learns from them.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: StagedModel,
        student: LearnedSplit,
        photos: PhotoCache,
        *,
        out: Path,
        device: torch.device,
        clock_s: Callable[[], float],
        pairs: Pairs | None = None,
    ) -> None:
        self.config, self.base, self.student, self.photos, self.out, self.device, self.clock_s = (
            config,
            base,
            student,
            photos,
            out,
            device,
            clock_s,
        )
        self.crops = Crops(
            size_px=config.size_px, area=config.area, mean=config.mean, std=config.std, letterbox=config.letterbox, bgr=config.bgr,
            disturb=config.disturb,
        )  # fmt: skip
        self.pairs = pairs
        self.shares_front = base.same_front and all(stage.lr_own == 0 for stage in config.stages)
        for module in (base.modules(), student):
            module.to(device)
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        base.modules().eval().requires_grad_(False)
        if config.cut is None and device.type == "cpu":  # known layers: another model's convolutions may be of any kind
            speed_up(nn.ModuleList([base.modules(), student.decoder, student.stages]))
        self.groups = parameter_groups(student)
        self.optimiser = torch.optim.Adam([{"params": params, "lr": 0.0} for params in self.groups.values()], betas=(0.9, 0.99))
        self.ema = {name: value.detach().clone() for name, value in student.state_dict().items()}
        bits = [8 * b for b in config.target_bytes]
        first = 1000 * config.first_weight / bits[0] if config.first_weight else 0.02
        self.steering = BitrateSteering(bits, [first * bits[0] / b for b in bits])
        self.running_bytes = list(config.target_bytes)
        self.usual = torch.zeros(len(student.ensemble.tiers), len(bits))
        self.step, self.spent_s = 0, 0.0
        if (out / "checkpoint.safetensors").exists():
            self.step = load_checkpoint(self)
            log.info("resumed at step %d", self.step)

    def run(self, on_step: Callable[[StepReport], None] | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains to the last step or second, or until ``stop`` says so, with checkpoints."""
        saved_s = before_s = self.clock_s()
        while self.progress < 1 and not stop():
            report = self.train_step()
            self.step += 1
            now_s = self.clock_s()
            self.spent_s += now_s - before_s
            before_s = now_s
            if on_step is not None:
                on_step(replace(report, progress=self.progress))
            if now_s - saved_s > self.config.checkpoint_s:
                save_checkpoint(self)
                saved_s = now_s
        save_checkpoint(self)

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0..1: of its steps or of its time, whichever is further."""
        timed = self.spent_s / self.config.seconds if self.config.seconds else 0.0
        return min(1.0, max(self.step / self.config.steps, timed))

    def _prepare(self, stage: Stage, index: int) -> None:
        factor = rise_and_fall(index, stage.warmup_steps, index / stage.steps, floor=0.02)
        for group, (name, params) in zip(self.optimiser.param_groups, self.groups.items(), strict=True):
            shared = stage.lr if stage.lr_shared is None else stage.lr_shared
            lr = {"new": stage.lr, "shared": shared, "bridge": shared, "quantiser": 4 * shared, "own": stage.lr_own}.get(name, 0.0)
            if name.startswith("tail"):
                lr = stage.lr_tail if int(name[4:]) < stage.tail_stages else 0.0
            group["lr"] = lr * factor
            for p in params:
                p.requires_grad_(lr > 0)

    def _teach(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the student is matched to, and the stem's map."""
        with torch.no_grad(), self._amp():
            stem_map = self.base.stem(images)
            cut = self.base.body(stem_map)
            cuts = cut if isinstance(cut, tuple) else (cut,)
            told = stem_map.float() if isinstance(stem_map, Tensor) else stem_map  # several tensors are a cut's, without a stem
            return [t.float() for t in [*cuts, *run_stages(self.base.stages, cut)]], told

    def _amp(self) -> torch.autocast:
        fast = self.device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def _answer(self, restored: Tensor) -> list[Tensor]:
        """The student's tensors, in half precision on the way where that is wanted; quantiser and losses stay in float32."""
        enabled = self.config.amp or self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            return [t.float() for t in self.student.answer(restored)]

    def _draw(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Gain tier (n,) and kept channels (n, C) of every sample."""
        config, c = self.config, self.student.quantiser.log_gain.shape[1]
        gain = (np.arange(n) + rng.integers(len(config.target_bytes))) % len(config.target_bytes)
        kept = np.ones((n, c), np.float32)
        for row in kept:
            if rng.random() < config.truncate:
                row[int(rng.choice(config.prefixes)) :] = 0
            elif rng.random() < config.lost_layers:
                group = int(rng.integers(1, len(config.groups)))
                row[config.groups[group] : ([*config.groups, c])[group + 1]] = 0
        return torch.from_numpy(rng.permutation(gain)).to(self.device), torch.from_numpy(kept).to(self.device)

    def _largest(self, stem_map: Tensor, *, frozen: bool) -> Tensor:
        """The largest tier's latent; where its blocks are ``frozen`` they run fast, and only the projection learns."""
        ensemble = self.student.ensemble
        largest = len(ensemble.tiers) - 1
        own = ensemble.encoders[ensemble.tiers[largest].runs[0][0]]
        if frozen and isinstance(own, OwnEncoder):
            with torch.no_grad(), self._amp():
                cut = own.body(stem_map)
            if isinstance(own, FusedEncoder):
                return own.from_cut(tuple(t.float() for t in cut) if isinstance(cut, tuple) else cut.float())
            projected: Tensor = own.project(cut.float())
            return projected
        best: Tensor = ensemble(stem_map, largest)
        return best

    def _mismatch(self, mine: Tensor, best: Tensor) -> Tensor:
        """Squared error of cheap latents against the largest, each channel as fine as the middle gain tier sees it, (n,)."""
        gains = self.student.quantiser.log_gain.detach()
        gain = gains[len(gains) // 2].exp()[:, None, None]
        return relative_error(mine * gain, best.detach() * gain)

    def _latents(
        self, images: Tensor, stage: Stage, rng: np.random.Generator, front: tuple[Tensor, Sequence[Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (n, C, h, w) of every sample in its own tier, the cheap ones' mean mismatch, and the tiers (n,).

        Args:
            images: normalised.
            stage: of the training.
            rng: of this step.
            front: the teacher's stem map and crossing tensors, where they are the student's too.
        """
        ensemble = self.student.ensemble
        own = ensemble.encoders[-1]
        counts = shares(stage.tiers, len(images), rng)
        cheap = len(images) - counts[-1]
        if front is not None and isinstance(own, FusedEncoder):
            stem_map, best = front[0], own.from_cut(tuple(front[1]))
        else:
            with torch.no_grad():
                stem_map = self.student.stem(images)
            if stage.lr_own == 0 or cheap in (0, len(images)):
                best = self._largest(stem_map, frozen=stage.lr_own == 0 or cheap > 0)
            else:  # to the cheap tiers' samples the largest latent is an example only
                shown = self._largest(stem_map[:cheap], frozen=True).detach()
                best = torch.cat([shown, self._largest(stem_map[cheap:], frozen=False)])
        parts, errors, at = [], [], 0
        for tier, count in enumerate(counts):
            if count and tier < len(ensemble.tiers) - 1:
                mine = ensemble(stem_map[at : at + count], tier)
                errors.append(self._mismatch(mine, best[at : at + count]))
                parts.append(mine)
            elif count:
                parts.append(best[at : at + count])
            at += count
        mismatch = torch.cat(errors).mean() if errors else best.new_zeros(())
        return torch.cat(parts), mismatch, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def _share(self, wrong: Tensor, tiers: Tensor, gain: Tensor) -> Tensor:
        """How much each sample's distortion counts, (n,): the less the more is usual at its operating point."""
        at, now = (tiers, gain.cpu()), wrong.detach().cpu()
        for tier, g, w in zip(*at, now, strict=True):
            usual = self.usual[tier, g]
            usual += (_USUAL if usual > 0 else 1.0) * (w - usual)
        seen = self.usual[self.usual > 0]
        return (seen.mean() / self.usual[at]).to(wrong.device)

    def _distil_latents(self, images: Tensor) -> Tensor:
        """Mean mismatch of every cheap tier on every sample."""
        ensemble = self.student.ensemble
        with torch.no_grad():
            stem_map = self.student.stem(images)
            best = self._largest(stem_map, frozen=True)
        cheap = range(len(ensemble.tiers) - 1)
        return torch.stack([self._mismatch(ensemble(stem_map, tier), best).mean() for tier in cheap]).mean()

    def train_step(self) -> StepReport:
        """One optimiser step."""
        config = self.config
        # A training that ends by time passes through its stages as if it had done that share of its steps.
        stage, index = config.stage_at(max(self.step, int(self.progress * config.steps)))
        self._prepare(stage, index)
        rng = np.random.default_rng([config.seed, self.step])
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        self.student.train()
        images = self.photos.batch(rng.integers(0, len(self.photos), config.batch), self.crops, rng).to(self.device)
        before, images = self._with_pairs(images, stage, rng)
        images = images.contiguous(memory_format=torch.channels_last)
        if stage.latent_only:
            loss = self._distil_latents(images)
            self._update(loss)
            return self._told(float(loss.detach()), 0.0, float(loss.detach()))
        teacher, stem_map = self._teach(images)
        front = (stem_map, teacher[: self.base.cuts]) if self.shares_front else None
        latent, mismatch, tiers = self._latents(images, stage, rng, front)
        gain, kept = self._draw(len(images), rng)
        alone = len(latent) - (0 if before is None else len(before))
        kept[alone:] = 1
        restored, bits = self.student.quantiser(latent[:alone], gain[:alone], kept[:alone])
        if config.lost_slices > 0:
            restored = restored * arrived(restored, config.lost_slices, rng)
        flicker = latent.new_zeros(())
        if before is not None and config.video is not None:
            told = self._predicted(before, images[alone:], latent[alone:], gain[alone:], config.video)
            restored, flicker = torch.cat([restored, told.restored]), config.video.flicker * told.flicker
            bits = torch.cat([bits, config.video.bits * told.bits])
        wrong = staged_distortion(self._answer(restored), teacher, config.loss, self.base)
        counted = wrong * self._share(wrong, tiers, gain) if config.even else wrong
        loss = (counted + self.steering.weight(gain.cpu()).to(self.device) * bits).mean() + config.loss.latent * mismatch + flicker
        self._update(loss)
        if alone:
            self._steer(stage, gain, kept, bits, alone)
        return self._told(float(loss.detach()), float(wrong.detach().mean()), float(mismatch.detach()))

    def _update(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([p for g in self.groups.values() for p in g if p.grad is not None], self.config.clip_norm)
        self.optimiser.step()
        average_in(self.ema, self.student.state_dict(), self.step, decay=self.config.ema)

    def _with_pairs(self, images: Tensor, stage: Stage, rng: np.random.Generator) -> tuple[Tensor | None, Tensor]:
        """The pairs' earlier frames, and the batch with their later ones in the place of its last photos."""
        if self.pairs is None or self.config.video is None or stage.latent_only:
            return None, images
        largest = next(n for n in reversed(shares(stage.tiers, len(images), None)) if n)
        count = min(max(1, round(self.config.video.share * len(images))), largest)
        before, now = (t.to(self.device) for t in self.pairs.draw(count, rng))
        return before, torch.cat([images[: len(images) - count], now])

    def _predicted(self, before: Tensor, now: Tensor, latent: Tensor, gain: Tensor, video: VideoLearning) -> Predicted:
        with torch.no_grad():
            earlier = self.student.latent(before, len(self.student.ensemble.tiers) - 1)
        still = still_cells(before, now, self.config.std, (latent.shape[2], latent.shape[3]))
        return predict(self.student.quantiser, earlier.float(), latent, gain, still, video.price)

    def _steer(self, stage: Stage, gain: Tensor, kept: Tensor, bits: Tensor, alone: int) -> None:
        """Compares the largest shown tier's untruncated samples, those coded ``alone``, with the targets."""
        whole = kept.min(1).values > 0
        count = next(n for n in reversed(shares(stage.tiers, len(gain), None)) if n)
        largest = torch.zeros(len(gain), dtype=torch.bool, device=gain.device)
        largest[len(gain) - count :] = True
        largest[alone:] = False
        told = (whole & largest).cpu()
        if bool(told.any()):
            g, b = gain.cpu()[told], bits.detach().cpu()[told]
            self.steering.observe(g, b, self.student.quantiser)
            for t in set(g.tolist()):
                self.running_bytes[t] += 0.05 * (float(b[g == t].mean()) / 8 - self.running_bytes[t])

    def _told(self, loss: float, wrong: float, mismatch: float) -> StepReport:
        return StepReport(
            step=self.step + 1,
            steps=self.config.steps,
            progress=self.progress,
            loss=loss,
            distortion=wrong,
            latent=mismatch,
            tier_bytes=tuple(self.running_bytes),
        )


def shares(fractions: tuple[float, ...], n: int, rng: np.random.Generator | None) -> list[int]:
    """How many of ``n`` samples each tier gets: whole parts first, the rest drawn (or to the last tier without ``rng``)."""
    counts = [int(f * n + 1e-9) for f in fractions]
    rest = n - sum(counts)
    if rest:
        left = np.array([f * n - c for f, c in zip(fractions, counts, strict=True)])
        order = (
            np.argsort(-left, kind="stable") if rng is None else rng.choice(len(counts), rest, replace=False, p=left / left.sum())
        )
        for i in order[:rest]:
            counts[int(i)] += 1
    return counts


def parameter_groups(student: LearnedSplit) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by role.

    ``shared`` (decoder), ``new`` (cheaper encoders), ``bridge`` (the largest encoder's projection), ``quantiser``, ``own``
    (the base's own blocks in it), ``tail0``, ``tail1`` ….
    """
    ensemble = student.ensemble
    largest = ensemble.encoders[ensemble.tiers[-1].runs[0][0]]
    groups: dict[str, list[nn.Parameter]] = {
        "shared": list(student.decoder.parameters()),
        "new": [],
        "bridge": [],
        "quantiser": list(student.quantiser.parameters()),
        "own": [],
    }
    for encoder in ensemble.encoders:
        if encoder is largest and isinstance(encoder, OwnEncoder):
            groups["own"] += list(encoder.body.parameters())
            groups["bridge"] += list(encoder.project.parameters())
        else:
            groups["new"] += [p for name, p in encoder.named_parameters() if not name.startswith("trunk.")]
    for i, stage in enumerate(student.stages):
        groups[f"tail{i}"] = list(stage.parameters())
    return {name: params for name, params in groups.items() if params}
