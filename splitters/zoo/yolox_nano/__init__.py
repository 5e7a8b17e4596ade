"""YOLOX-nano (Ge et al. 2021, arXiv 2107.08430) with a learned bottleneck of our own; the base weights are fetched."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
