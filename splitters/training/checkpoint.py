"""Checkpoints of a training run as safetensors: weights, averaged weights, optimiser moments, lambdas, step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from protos.errors import ConfigError

NAME = "checkpoint.safetensors"


class _Steering(Protocol):
    log_lambda: torch.Tensor


class Resumable(Protocol):
    """A training run that a checkpoint is made of: the student, its running average, the optimiser, the steering and the step."""

    ema: dict[str, torch.Tensor]
    running_bytes: list[float]
    step: int
    out: Path
    device: torch.device

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
    tensors["lambda"] = trainer.steering.log_lambda
    about = {"step": str(trainer.step), "running_bytes": json.dumps(trainer.running_bytes)}
    trainer.out.mkdir(parents=True, exist_ok=True)
    partial = trainer.out / f"{NAME}.partial"
    save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, partial, metadata=about)
    partial.replace(trainer.out / NAME)


def load_checkpoint(trainer: Resumable) -> int:
    """Restores a trainer from its run directory; returns the steps done.

    Raises:
        ConfigError: the checkpoint is of a differently shaped model.
    """
    with safe_open(trainer.out / NAME, "pt") as opened:
        about = opened.metadata()
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
    model = {k[6:]: v for k, v in tensors.items() if k.startswith("model/")}
    try:
        trainer.student.load_state_dict(model)
    except RuntimeError as error:
        raise ConfigError(f"{trainer.out / NAME} is of another recipe: choose another --out ({error})") from error
    trainer.ema = {k[4:]: v.to(trainer.device) for k, v in tensors.items() if k.startswith("ema/")}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for k, v in tensors.items():
        if k.startswith("adam/"):
            _, i, name = k.split("/")
            state.setdefault(int(i), {})[name] = v
    trainer.optimiser.load_state_dict({"state": state, "param_groups": trainer.optimiser.state_dict()["param_groups"]})
    trainer.steering.log_lambda = tensors["lambda"]
    trainer.running_bytes = json.loads(about["running_bytes"])
    return int(about["step"])
