"""What this machine has of what a tail is told to use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from protos.errors import ConfigError
from splitters.runtime.sessions import has_cuda


def check_cpus(cpus: tuple[int, ...]) -> None:
    """Whether a thread of this process may be pinned to these cores.

    Raises:
        ConfigError: it may not be.
    """
    if not cpus:
        return
    # What the process is pinned to now is not all that it may use; a thread of its own tries, where that does no harm.
    with ThreadPoolExecutor(1) as thread:
        absent = thread.submit(_absent, cpus).result()
    if absent:
        given, has = (",".join(map(str, sorted(each))) for each in (absent, os.sched_getaffinity(0)))
        raise ConfigError(f"--tail-cpus: this process has no core {given}; it has {has}")


def _absent(cpus: tuple[int, ...]) -> set[int]:
    """The cores that the calling thread cannot be pinned to; to the others it is from now on."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return set(cpus)
    return set(cpus) - os.sched_getaffinity(0)


def check_threads(threads: int) -> None:
    """Whether that many threads are of use here; many more than cores keep each other, and everybody else, from running.

    Raises:
        ConfigError: they are not.
    """
    cores = os.cpu_count() or 1
    if threads > 4 * max(cores, 4):
        raise ConfigError(f"--tail-threads {threads}: this machine has {cores} cores; give at most {4 * max(cores, 4)}")


def check_device(device: str) -> None:
    """Whether tails can run on this device: ONNX Runtime's or torch's.

    Raises:
        ConfigError: neither knows it, or the machine lacks it.
    """
    if device == "cpu" or (device.startswith("cuda") and has_cuda()):
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
