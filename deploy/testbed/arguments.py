"""Types of the command's arguments."""

from __future__ import annotations

import argparse
import math


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers above 0, separated by commas, each once."""
    values = tuple(dict.fromkeys(number(part) for part in text.split(",")))
    if any(value <= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: every number must be above 0")
    return values
