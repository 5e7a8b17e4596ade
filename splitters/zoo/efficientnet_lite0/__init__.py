"""EfficientNet-Lite0: the default classifier and its learned split."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
