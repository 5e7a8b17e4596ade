"""``splitters train detector``: our small detector itself, taught at every position by YOLOX-nano and PicoDet-S together."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protos.errors import ConfigError

if TYPE_CHECKING:
    from splitters.training.detector.data import Example

log = logging.getLogger(__name__)


def add_detector(parser: argparse.ArgumentParser) -> None:
    """The options that the recipe ``detector`` has beside the common ones."""
    group = parser.add_argument_group("recipe detector", "the small detector itself, from its shipped weights or --start FILE")
    group.add_argument(
        "--pack", type=Path, metavar="FILE",
        help="train from this one file of at most 55 MiB; where there is none yet it is made from the photos of --data first",
    )  # fmt: skip
    group.add_argument("--teachers", type=Path, metavar="DIR", help="folder with the teachers' ONNX files (default: DATA/weights)")


def train_detector(args: argparse.Namespace) -> int:
    """Trains or goes on; a signal saves and stops. Leaves ``detector.safetensors`` in ``--out``."""
    import torch

    from splitters.training.detector.loop import DetectorRecipe, train_on
    from splitters.zoo.detector.network import WEIGHTS

    seconds = args.seconds if args.seconds is not None else 5400.0
    if not 1 <= seconds <= 30 * 86_400:
        raise ConfigError(f"--seconds must be 1 to {30 * 86_400}, got {seconds:g}")
    teachers = args.teachers or args.data / "weights"
    for name in ("yolox_nano_416.onnx", "picodet_s_416_coco.onnx"):
        if not (teachers / name).is_file():
            raise ConfigError(
                f"the teacher {name} is not in {teachers}: `splitters fetch` has such files, --teachers DIR names a folder"
            )
    torch.set_num_threads(args.threads or 1)
    recipe = DetectorRecipe(
        minutes=seconds / 60, start=str(args.start or WEIGHTS), dense=True, two_teachers=True, hold_out=True, frozen_until=0.0,
        bfloat16=torch.ops.mkldnn._is_mkldnn_bf16_supported(), batch=args.batch or 8, seed=args.seed,  # noqa: SLF001 - torch's only word on it
    )  # fmt: skip
    stopped: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(s, lambda number, _: stopped.append(number)) for s in signals]
    try:
        done = train_on(
            recipe,
            lambda: _pictures(args.data, args.pack),
            args.out,
            weights=teachers,
            stop=lambda: bool(stopped),
            steps=args.steps,
        )
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
    print(f"{args.out}: {done} steps; the averaged weights are {args.out / 'detector.safetensors'}")
    if args.json:
        print(json.dumps({"out": str(args.out), "steps": done, "complete": not stopped}))
    return 128 + stopped[0] if stopped else 0


def _pictures(data: Path, pack: Path | None) -> Sequence[Example]:
    """The training pictures, without those that are kept to judge by: from the pack where there is one."""
    from splitters.training.detector.data import every_photo, examples_of, without_held_out
    from splitters.training.detector.pack import read_pack, write_pack

    if pack is None:
        return examples_of(without_held_out(every_photo(data)))
    if not pack.exists():
        quality = write_pack(without_held_out(every_photo(data)), pack)
        log.info("%s: %.1f MiB, JPEG quality %d", pack, pack.stat().st_size / 2**20, quality)
    return read_pack(pack)
