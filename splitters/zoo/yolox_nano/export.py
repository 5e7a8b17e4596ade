"""YOLOX-nano as a bundle: the published weights, cut, with the encoder, decoder and tables that were trained here."""

from __future__ import annotations

from pathlib import Path

from splitters.bundle import Bundle
from splitters.exporting.learned_any import export_run
from splitters.zoo.fetch import fetch
from splitters.zoo.published import find
from splitters.zoo.yolox_nano import WEIGHTS

NAME = "yolox-nano"


def export_yolox_nano(out: Path) -> Bundle:
    """Writes the bundle; fetches the base weights where they are not here.

    Raises:
        UnreachableError: the weights are neither here nor to be had.
    """
    return export_run(WEIGHTS, out, model=f"onnx:{fetch(find(NAME))}", name=NAME)
