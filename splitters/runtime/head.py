"""A bundle's head and its codec, for what runs head and tail in one process: measuring, research.

Shape legend: pictures are (h, w, 3) uint8 BGR of the model's input size; latents are float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from splitters.bundle import Bundle
from splitters.codec import LatentCodec, codec_from_spec
from splitters.runtime.inputs import FrameInputs, Raw
from splitters.runtime.sessions import Floats, open_graph
from splitters.tasks.preprocess import Frame


def open_codec(bundle: Bundle) -> LatentCodec:
    """The bundle's latent codec."""
    return codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)


class Head:
    """The device's graphs on one processor core."""

    def __init__(self, bundle: Bundle) -> None:
        head = bundle.manifest.head
        self._inputs = FrameInputs(bundle.manifest.inputs, bundle.manifest.preprocess)
        self._stem = open_graph(bundle.part_path(head.stem))
        self._graphs = {name: open_graph(bundle.part_path(path)) for name, path in head.graphs.items()}

    def stem(self, picture: Frame, raw: Raw | None = None) -> list[Floats]:
        """The stem's outputs, batch of one, of a picture of the input's size and the arrays that came with it."""
        return self._stem(self._inputs(picture, raw))

    def latents(self, stem_map: Sequence[Floats], graphs: Sequence[str]) -> list[Floats]:
        """The stem's outputs, or the graphs' sum, batch of one."""
        if not graphs:
            return list(stem_map)
        shares = [self._graphs[g](stem_map[:1]) for g in graphs]
        return [np.sum(parts, axis=0, dtype=np.float32) for parts in zip(*shares, strict=True)]
