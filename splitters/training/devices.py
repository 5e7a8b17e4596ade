"""The torch device that a person named, checked before work begins."""

from __future__ import annotations

import torch

from protos.errors import ConfigError


def chosen_device(name: str, option: str) -> torch.device:
    """A device that this machine has.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` ….
        option: what the person wrote it behind, for the error.

    Raises:
        ConfigError: torch does not know it, or cannot use it here.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ConfigError(f"{option} {name} computes nothing; use cpu, cuda or cuda:N")
        torch.zeros(1, device=device).add_(1).cpu()
    except ConfigError:
        raise
    except Exception as error:  # torch raises whatever its build makes of an absent driver: AssertionError, RuntimeError, …
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"{option} {name} cannot be used on this machine: {first}; use cpu, or cuda where there is a GPU"
        ) from error
    return device
