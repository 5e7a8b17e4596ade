"""ImageNet's 1,000 class names, in the usual order."""

from __future__ import annotations

from pathlib import Path


def imagenet_labels() -> dict[int, str]:
    """The class names, by index."""
    path = Path(__file__).parent / "imagenet_labels.txt"
    return dict(enumerate(path.read_text(encoding="utf-8").split("\n")[:1000]))
