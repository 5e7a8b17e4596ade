"""Trains the detector on one processor core within a fixed time.

``python -m splitters.training.detector.loop --data DIR --out runs/detector --minutes 90``

The backbone's early blocks stay as ImageNet left them, so they run forward only, in ONNX Runtime; everything later trains.
The learning rate follows the time spent, so a run ends when it was told to, however busy the machine is; started again with the
same ``--out``, it continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from splitters.runtime.sessions import open_session
from splitters.tasks.decoding.boxes import Pixels
from splitters.training.detector.augment import Sampler
from splitters.training.detector.data import Example, build_examples, held_out
from splitters.training.detector.loss import detection_loss, pad_boxes
from splitters.training.detector.picodet import PicoDetTeacher, mean_of
from splitters.training.detector.teacher import Dense, DenseTeacher
from splitters.training.fast import speed_up
from splitters.training.pictures.photos import normalise
from splitters.training.schedule import average_in, rise_and_fall, use_one_core
from splitters.zoo.detector.network import INPUT_SIZE_PX, TAPS, Backbone, Detector, load_detector
from splitters.zoo.efficientnet_lite0.network import INPUT_MEAN, INPUT_STD, load_efficientnet_lite0

log = logging.getLogger(__name__)
# Scarce photos with COCO's full ground truth come often, narrow sources seldom.
SOURCE_WEIGHTS = {
    "coco/train": 5.0, "photos/coco_extra": 4.0, "photos/indoor": 2.0, "photos/street": 0.7, "photos/camvid": 0.5,
    "photos/bsds": 1.0, "imagenette160/train": 0.35, "video/vtest.avi": 0.5, "photos/diverse": 0.35,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorRecipe:
    """Everything that shapes a run.

    Attributes:
        minutes: wall-clock time of the whole run.
        batch: pictures a step.
        first_trained_block: backbone blocks before it stay frozen.
        frozen_until: share of the run in which the whole backbone stays frozen.
        small_until: share of the run at ``small_px``; then the detector's own input size.
        mosaic_until: share of the run with mosaics.
        small_px: the first part's input size.
        rate: learning rate of pyramid and predictor; the backbone learns at ``backbone_factor`` of it.
        backbone_factor: see ``rate``.
        weight_decay: AdamW's.
        ema: decay of the averaged weights, reached gradually.
        seed: of all chance.
        start: weights to begin with; ImageNet's when empty.
        dense: whether the teacher also looks at every augmented picture and teaches each position, see ``teacher``.
        two_teachers: whether PicoDet-S does so together with YOLOX-nano, see ``picodet``; only with ``dense``.
        bfloat16: whether the trained part runs in bfloat16 where that is fast (parameters and losses stay float32).
        hold_out: whether the photos of ``data.held_out`` are left out.
    """

    minutes: float = 90.0
    batch: int = 8
    first_trained_block: int = 5
    frozen_until: float = 0.1
    small_until: float = 0.88
    mosaic_until: float = 0.88
    small_px: int = 256
    rate: float = 1e-3
    backbone_factor: float = 0.2
    weight_decay: float = 0.02
    ema: float = 0.999
    seed: int = 5
    start: str = ""
    dense: bool = False
    two_teachers: bool = False
    bfloat16: bool = False
    hold_out: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first_trained_block <= TAPS[0] + 1 or self.minutes <= 0:
            raise ValueError(f"first_trained_block must be in 1..{TAPS[0] + 1} and minutes positive")


class _Early(nn.Module):
    def __init__(self, backbone: Backbone, blocks: int) -> None:
        super().__init__()
        self.stem, self.blocks = backbone.stem, backbone.blocks[:blocks]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.stem(x))
        return y


def freeze_to_onnx(module: nn.Module, path: Path, outputs: int) -> ort.InferenceSession:
    """A frozen part of the network as a one-thread ONNX Runtime session: several times faster than eager torch."""
    names = [f"y{i}" for i in range(outputs)]
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("x", *names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (torch.zeros(2, 3, 256, 256),), str(path), dynamo=False, input_names=["x"], output_names=names,
            dynamic_axes=axes,
        )  # fmt: skip
    return open_session(path)


class Trainer:
    """One run: model, averaged model, optimiser, clock.

    Args:
        recipe: the run's settings.
        out: run directory, for checkpoints and the log.
        teacher: for ``recipe.dense``.
    """

    def __init__(self, recipe: DetectorRecipe, out: Path, teacher: Callable[[Pixels], Dense] | None = None) -> None:
        self.recipe, self.out, self._teacher = recipe, out, teacher
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.model = load_detector(Path(recipe.start)) if recipe.start else Detector(Backbone(load_efficientnet_lite0()))
        self._early = freeze_to_onnx(_Early(self.model.backbone, recipe.first_trained_block), out / "early.onnx", 1)
        self._whole = freeze_to_onnx(self.model.backbone, out / "backbone.onnx", len(TAPS))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        speed_up(self.model)
        late = [p for block in list(self.model.backbone.blocks)[recipe.first_trained_block :] for p in block.parameters()]
        new = [*self.model.neck.named_parameters(), *self.model.predictor.named_parameters()]
        for parameter in self.model.backbone.parameters():
            parameter.requires_grad_(False)
        for parameter in late:
            parameter.requires_grad_(True)
        decayed, bare = _split(p for _, p in new), late
        groups = [
            {"params": decayed[0], "weight_decay": recipe.weight_decay, "factor": 1.0},
            {"params": decayed[1], "weight_decay": 0.0, "factor": 1.0},
            {"params": bare, "weight_decay": 0.0, "factor": recipe.backbone_factor},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99))
        self.average = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.step_count, self.spent_s = 0, 0.0
        self._resume()

    @property
    def progress(self) -> float:
        """Share of the run's time that is spent, 0..1."""
        return min(1.0, self.spent_s / (60 * self.recipe.minutes))

    def step(self, images: Pixels, truth: Tensor) -> tuple[float, float]:
        """One optimiser step on (N, S, S, 3) pictures; class and box loss."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate * group["factor"] * rise_and_fall(self.step_count, 200, self.progress, floor=0.02)
        x = normalise(images, INPUT_MEAN, INPUT_STD).numpy()
        frozen = self.progress < self.recipe.frozen_until
        known = [torch.from_numpy(y).contiguous(memory_format=torch.channels_last)
                 for y in (self._whole if frozen else self._early).run(None, {"x": x})]  # fmt: skip
        first = self.recipe.first_trained_block
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            taps = known if frozen else self.model.backbone.after(known[0], first, known if first > TAPS[0] else ())
            raw = self.model.from_taps(taps)
        losses = detection_loss([level.float() for level in raw], truth, self._teacher(images) if self._teacher else None)
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], 10.0)
        self.optimiser.step()
        self.step_count += 1
        average_in(self.average, self.model.state_dict(), self.step_count, decay=self.recipe.ema, slow=20)
        return losses.classes, losses.boxes

    def save(self) -> None:
        """Writes the averaged weights and all that a restart needs, each file at once or not at all."""
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, state in self.optimiser.state.items():
            tensors |= {f"optimiser.{names[id(parameter)]}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
        meta = {"step_count": str(self.step_count), "spent_s": str(self.spent_s)}
        _write(self.out / "checkpoint.safetensors", tensors, meta)
        _write(self.out / "detector.safetensors", {k: _half(v) for k, v in self.average.items()}, meta)

    def _resume(self) -> None:
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        tensors = load_file(path)
        with safe_open(path, "pt") as opened:
            meta = opened.metadata()
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
        for name, parameter in self.model.named_parameters():
            prefix = f"optimiser.{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                self.optimiser.state[parameter] = state
        self.step_count, self.spent_s = int(meta["step_count"]), float(meta["spent_s"])
        log.info("going on at step %d, %.0f s", self.step_count, self.spent_s)


def _split(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    both: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        both[parameter.ndim <= 1].append(parameter)
    return both


def _half(value: Tensor) -> Tensor:
    return value.half().contiguous() if value.dtype.is_floating_point else value.contiguous()


def _write(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, meta)
    temporary.replace(path)


def dense_teacher(recipe: DetectorRecipe, weights: Path) -> Callable[[Pixels], Dense] | None:
    """What teaches every position: YOLOX-nano, or it and PicoDet-S together; None without ``recipe.dense``."""
    if not recipe.dense:
        return None
    yolox = DenseTeacher(weights / "yolox_nano_416.onnx")
    if not recipe.two_teachers:
        return yolox
    picodet = PicoDetTeacher(weights / "picodet_s_416_coco.onnx")
    return lambda images: mean_of([yolox(images), picodet(images)])


def train(recipe: DetectorRecipe, data: Path, out: Path, *, cache: Path) -> None:
    """Runs (or goes on with) a training on the photos of ``data`` with the teacher's boxes, see ``train_on``."""

    def load() -> Sequence[Example]:
        examples = build_examples(data, cache, longest_px=INPUT_SIZE_PX)
        if not recipe.hold_out:
            return examples
        return [example for example, out_of_it in zip(examples, held_out(examples), strict=True) if not out_of_it]

    train_on(recipe, load, out, weights=data / "weights")


def train_on(
    recipe: DetectorRecipe, load: Callable[[], Sequence[Example]], out: Path, *, weights: Path,
    stop: Callable[[], bool] = lambda: False, steps: int | None = None,
) -> int:  # fmt: skip
    """Runs (or goes on with) a training; leaves ``detector.safetensors`` (fp16, averaged) and ``recipe.json`` in ``out``.

    Reading the photos counts as time spent, so the run ends when its recipe says.

    Args:
        recipe: its settings.
        load: reads the training pictures.
        out: run directory.
        weights: folder with the teachers.
        stop: asked before every step; the checkpoint then says how far the run is.
        steps: end after this many of this call, however much time is left.

    Returns:
        Steps done, of all calls together.
    """
    begun = time.monotonic()
    trainer = Trainer(recipe, out, dense_teacher(recipe, weights))
    (out / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "source_weights": SOURCE_WEIGHTS}, indent=2) + "\n")
    examples = load()
    log.info("%d pictures, %d boxes", len(examples), sum(len(e.boxes) for e in examples))
    sampler = Sampler(examples, SOURCE_WEIGHTS, np.random.default_rng(recipe.seed + trainer.step_count))
    trainer.spent_s += time.monotonic() - begun
    saved_s, last = trainer.spent_s, trainer.step_count + steps if steps is not None else None
    sums = np.zeros(3)
    while trainer.progress < 1 and trainer.step_count != last and not stop():
        before = time.monotonic()
        size_px = recipe.small_px if trainer.progress < recipe.small_until else INPUT_SIZE_PX
        share = 0.6 if trainer.progress < recipe.mosaic_until else 0.0
        images, boxes = sampler.batch(recipe.batch, size_px, share)
        sums += [*trainer.step(images, pad_boxes(boxes)), 1]
        trainer.spent_s += time.monotonic() - before
        if trainer.step_count % 50 == 0:
            mean = sums / sums[2]
            log.info("step %d, %.3f of the time: classes %.3f, boxes %.3f", trainer.step_count, trainer.progress, mean[0], mean[1])
            sums[:] = 0
        if trainer.spent_s - saved_s > 240:
            saved_s = trainer.spent_s
            trainer.save()
    trainer.save()
    return trainer.step_count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/, weights/ and the rest")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an interrupted run there goes on")
    parser.add_argument("--minutes", type=float, default=DetectorRecipe().minutes, help="wall-clock length of the run")
    parser.add_argument("--frozen-until", type=float, default=DetectorRecipe().frozen_until, help="share with the backbone frozen")
    parser.add_argument("--seed", type=int, default=DetectorRecipe().seed)
    parser.add_argument("--small-until", type=float, default=DetectorRecipe().small_until, help="share at the smaller input size")
    parser.add_argument("--start", default="", help="detector weights to begin with; ImageNet's backbone by default")
    parser.add_argument("--dense", action="store_true", help="the teacher teaches every position of every augmented picture")
    parser.add_argument("--two-teachers", action="store_true", help="PicoDet-S too, with --dense")
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors with bfloat16 arithmetic")
    parser.add_argument("--hold-out", action="store_true", help="leave out the photos that are kept for tests")
    parser.add_argument("--teacher-cache", type=Path, help="where the teacher's boxes are kept; OUT/teacher.npz by default")
    args = parser.parse_args()
    use_one_core()
    recipe = DetectorRecipe(
        minutes=args.minutes, frozen_until=args.frozen_until, small_until=args.small_until, seed=args.seed,
        mosaic_until=max(args.small_until, 0.88), start=args.start, dense=args.dense, bfloat16=args.bfloat16,
        hold_out=args.hold_out, two_teachers=args.two_teachers,
    )  # fmt: skip
    train(recipe, args.data, args.out, cache=args.teacher_cache or args.out / "teacher.npz")


if __name__ == "__main__":
    main()
