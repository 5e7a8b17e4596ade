"""What this machine has of what a tail is told to use."""

from __future__ import annotations

import os

from protos.errors import ConfigError


def check_cpus(cpus: tuple[int, ...]) -> None:
    """Whether a thread of this process may be pinned to these cores.

    Raises:
        ConfigError: it may not be.
    """
    if not cpus:
        return
    allowed = os.sched_getaffinity(0)
    if absent := sorted(set(cpus) - allowed):
        given = ",".join(map(str, absent))
        raise ConfigError(f"--tail-cpus: this process has no core {given}; it has {','.join(map(str, sorted(allowed)))}")


def check_threads(threads: int) -> None:
    """Whether that many threads are of use here; many more than cores keep each other, and everybody else, from running.

    Raises:
        ConfigError: they are not.
    """
    cores = os.cpu_count() or 1
    if threads > 4 * max(cores, 4):
        raise ConfigError(f"--tail-threads {threads}: this machine has {cores} cores; give at most {4 * max(cores, 4)}")


def check_device(device: str) -> None:
    """Whether torch can run on this device.

    Raises:
        ConfigError: it does not know it, or the machine lacks it.
    """
    if device == "cpu":
        return
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"--tail-device {device} needs torch, which is not installed") from error
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except Exception as error:  # torch raises whatever its build makes of an absent driver: AssertionError, RuntimeError, …
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--tail-device {device} cannot be used on this machine: {first}") from error
