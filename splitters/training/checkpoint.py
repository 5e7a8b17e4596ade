"""Checkpoints of a training run as safetensors: weights, averaged weights, optimiser moments, lambdas, step.

A checkpoint also says which configuration and which photos it is of: a run goes on only with the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from protos.errors import ConfigError
from splitters.exporting.learned import WEIGHTS_FILE
from splitters.training.config import TrainConfig
from splitters.training.pictures.photos import PhotoCache

NAME = "checkpoint.safetensors"
_FREE = ("checkpoint_s", "seconds")  # how often to save changes no weight, and a run may be given more time
_SHOWN = 4


def describe_run(config: TrainConfig, photos: str) -> dict[str, Any]:
    """All that decides the weights, as plain JSON types.

    Args:
        config: of the training.
        photos: digest of the training photos.
    """
    fields = {k: v for k, v in asdict(config).items() if k not in _FREE}
    files = {}
    for name in (config.model, config.weights, config.start):
        path = Path(name.partition(":")[2] if name.startswith("onnx:") else name)
        path = path / WEIGHTS_FILE if path.is_dir() else path
        if name and path.is_file():
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    described: dict[str, Any] = json.loads(json.dumps({**fields, "photos": photos, "files": files}))
    return described


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{at}[{i}]")
    elif old != new:
        yield f"{at} is {_short(old)} there and {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Steering(Protocol):
    log_lambda: torch.Tensor


class Resumable(Protocol):
    """A training run that a checkpoint is made of: the student, its running average, optimiser, steering, steps and time."""

    ema: dict[str, torch.Tensor]
    running_bytes: list[float]
    usual: torch.Tensor
    step: int
    spent_s: float
    out: Path
    device: torch.device

    @property
    def config(self) -> TrainConfig:
        """What the recipe says."""
        ...

    @property
    def photos(self) -> PhotoCache:
        """What it is trained on."""
        ...

    @property
    def student(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """Of the student."""
        ...

    @property
    def steering(self) -> _Steering:
        """Of the bitrates."""
        ...


def save_checkpoint(trainer: Resumable) -> None:
    """Writes ``checkpoint.safetensors`` into the run directory, atomically."""
    tensors = {f"model/{k}": v.contiguous() for k, v in trainer.student.state_dict().items()}
    tensors |= {f"ema/{k}": v.contiguous() for k, v in trainer.ema.items()}
    for i, state in trainer.optimiser.state_dict()["state"].items():
        tensors |= {f"adam/{i}/{k}": v.contiguous() for k, v in state.items()}
    tensors |= {"lambda": trainer.steering.log_lambda, "usual": trainer.usual}
    about = {
        "step": str(trainer.step), "spent_s": str(trainer.spent_s), "running_bytes": json.dumps(trainer.running_bytes),
        "run": json.dumps(describe_run(trainer.config, trainer.photos.digest)),
    }  # fmt: skip
    trainer.out.mkdir(parents=True, exist_ok=True)
    partial = trainer.out / f"{NAME}.partial"
    try:
        save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, partial, metadata=about)
        partial.replace(trainer.out / NAME)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(trainer: Resumable) -> int:
    """Restores a trainer from its run directory; returns the steps done.

    Raises:
        ConfigError: the checkpoint is of another configuration, of other photos, of a differently shaped model, or unreadable.
    """
    file = trainer.out / NAME
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
        described = json.loads(about["run"])
        running_bytes, step = json.loads(about["running_bytes"]), int(about["step"])
        spent_s = float(about.get("spent_s", "0"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{file} is no checkpoint that this release can go on from: choose another --out") from error
    found = list(_differences(described, describe_run(trainer.config, trainer.photos.digest)))
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError(
            f"{trainer.out} holds a run with other settings: {'; '.join(found[:_SHOWN])}{more}. Give the same settings to go on "
            "with it, or choose another --out"
        )
    model = {k[6:]: v for k, v in tensors.items() if k.startswith("model/")}
    try:
        trainer.student.load_state_dict(model)
    except RuntimeError as error:
        raise ConfigError(f"{file} is of another recipe: choose another --out ({error})") from error
    trainer.ema = {k[4:]: v.to(trainer.device) for k, v in tensors.items() if k.startswith("ema/")}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for k, v in tensors.items():
        if k.startswith("adam/"):
            _, i, name = k.split("/")
            state.setdefault(int(i), {})[name] = v
    trainer.optimiser.load_state_dict({"state": state, "param_groups": trainer.optimiser.state_dict()["param_groups"]})
    trainer.steering.log_lambda = tensors["lambda"]
    trainer.usual = tensors.get("usual", trainer.usual)
    trainer.running_bytes = running_bytes
    trainer.spent_s = spent_s
    return step
