"""What every training shares: a learning rate that rises and falls, weights averaged over the steps, and one core's settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor


def rise_and_fall(step: int, warmup_steps: int, progress: float, *, floor: float) -> float:
    """The factor of a learning rate: linear over the first steps, then half a cosine down to ``floor``.

    Args:
        step: how many steps are done.
        warmup_steps: of the rise.
        progress: share of the training that is done, 0..1; by steps or by time.
        floor: what is left at the end, 0..1.
    """
    return min(1.0, (step + 1) / warmup_steps) * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def average_in(average: Mapping[str, Tensor], state: Mapping[str, Tensor], step: int, *, decay: float, slow: int = 10) -> None:
    """Moves averaged weights towards the current ones, in place; counters are taken as they are.

    Args:
        average: by name, altered.
        state: a module's ``state_dict``.
        step: how many steps are done; the first ones count more.
        decay: what the average keeps of itself at a step, once many are done.
        slow: steps after which about half of that is reached.
    """
    keep = min(decay, (1 + step) / (slow + step))
    for name, value in state.items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - keep)
        else:
            average[name].copy_(value)


def use_one_core() -> None:
    """For a training of hours beside other work: one thread, and a log with the time."""
    import cv2

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
