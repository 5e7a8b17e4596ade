"""The head on ONNX Runtime: one stem graph, and one small graph for each encoder and width, all opened at start.

Shape legend: input (1, 3, h, w); the stem's outputs and every latent carry a batch axis of 1 until they are coded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.frames import Clock
from protos.errors import BundleError, ModelError
from splitters.bundle import Bundle
from splitters.operating_point import OperatingPoint

Floats = NDArray[np.float32]
Graph = Callable[[Sequence[Floats]], list[Floats]]


def open_graph(path: Path, *, threads: int = 1) -> Graph:
    """Opens an ONNX file as a function from its inputs, in order, to its outputs.

    Raises:
        BundleError: the file is no model that ONNX Runtime can run.
        ModelError: (the function) a run failed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # A spinning pool would take the core from the capture thread on small devices.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(f"{path} is no ONNX model that can be run: {error}") from error
    names = [i.name for i in session.get_inputs()]

    def run(arrays: Sequence[Floats]) -> list[Floats]:
        try:
            outputs: list[Floats] = session.run(None, dict(zip(names, arrays, strict=True)))
        except Exception as error:
            raise ModelError(f"{path.name} failed on its input: {error}") from error
        return outputs

    return run


class Head:
    """The device's part of a bundle's model.

    Args:
        bundle: opened and verified.
        clock: for the stages' times.
        threads: of ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, *, clock: Clock, threads: int = 1) -> None:
        spec = bundle.manifest.head
        self._clock = clock
        self._stem = open_graph(bundle.part_path(spec.stem), threads=threads)
        self._graphs = {name: open_graph(bundle.part_path(path), threads=threads) for name, path in spec.graphs.items()}
        self._prefilter = open_graph(bundle.part_path(spec.prefilter), threads=threads) if spec.prefilter else None
        for point in bundle.points:
            for name in point.graphs:
                if name not in self._graphs:
                    raise BundleError(f"operating point {point.id} needs the graph {name!r}, which the manifest does not list")

    def stem(self, image: Floats) -> list[Floats]:
        """The stem's feature maps, shared by encoders and prefilter. ``image``: (1, 3, h, w), normalised."""
        return self._stem([image])

    def prefilter_scores(self, features: list[Floats]) -> list[float]:
        """The prefilter's scores on the stem's first feature map, one a class; empty where the bundle has none."""
        return [float(v) for v in np.ravel(self._prefilter(features[:1])[0])] if self._prefilter else []

    def latents(self, features: list[Floats], point: OperatingPoint) -> tuple[Floats, ...]:
        """The latents of one operating point, batch axis taken off."""
        if not point.graphs:
            return tuple(f[0] for f in features)
        totals: list[Any] = self._graphs[point.graphs[0]](features)
        for name in point.graphs[1:]:
            totals = [total + part for total, part in zip(totals, self._graphs[name](features), strict=True)]
        return tuple(t[0] for t in totals)
