"""What a head is given for photographs, and for values of inputs that take none: made as the device makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitters.bundle.manifest import Input, Preprocess
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.model import OnnxModel
from splitters.runtime.inputs import FrameInputs
from splitters.tasks.preprocess import Frame, input_image

_NOISE = 4  # frames where nothing is given


def feeds_of(model: OnnxModel, photos: Sequence[Frame], spec: Preprocess, examples: Sequence[Feed] = ()) -> list[Feed]:
    """A head's inputs, a frame each.

    Args:
        model: ready to be cut.
        photos: frames as OpenCV reads them, one after the other.
        spec: how they become inputs.
        examples: values of inputs that take no picture, used again and again; empty: the model's own sample, moved about.
    """
    inputs: tuple[Input, ...] = model.manifest_inputs()
    makes = FrameInputs(inputs, spec)
    raw = makes.raw
    count = len(photos) if makes.pictures else len(examples) or _NOISE
    found: list[Feed] = []
    for number in range(count):
        given = examples[number % len(examples)] if examples else {n: np.roll(a, number) for n, a in model.samples().items()}
        picture = input_image(photos[number % len(photos)], spec)
        made = makes(picture, {n: given[n] for n in raw})
        found.append(dict(zip(model.inputs, made, strict=True)))
    return found
