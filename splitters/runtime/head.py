"""A bundle's head on ONNX Runtime: one stem graph, and one small graph for each encoder and width, all opened at start.

The device runs this, and so does everything that measures or fits a bundle: what is measured is what ships.

The stem's map is the largest tensor a device makes. It is written into a buffer that is used again and again, since a fresh
one costs page faults and a copy: up to a fifth of the cheapest encoder's time.

Shape legend: input (1, 3, h, w); the stem's outputs and every latent carry a batch axis of 1 until they are coded; a picture
is (h, w, 3) uint8 BGR of the model's input size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ModelError
from protos.schema import read_json
from splitters.bundle import Bundle
from splitters.bundle.operating_point import Quantiles
from splitters.codec import LatentCodec, codec_from_spec
from splitters.runtime.inputs import FrameInputs, Raw
from splitters.runtime.sessions import Floats, open_graph, open_session
from splitters.tasks.preprocess import Frame

if TYPE_CHECKING:
    import onnxruntime as ort


_WARM = 2


def open_codec(bundle: Bundle) -> LatentCodec:
    """The bundle's latent codec.

    Raises:
        BundleError: it cannot be read, or lacks a point that the operating points name.
    """
    path = bundle.manifest.codec
    codec = codec_from_spec(read_json(bundle.read_part(path), dict[str, Any], what=path), bundle.read_part)
    for point in bundle.points:
        if point.codec_point not in codec.point_ids:
            raise BundleError(f"operating point {point.id} names the codec point {point.codec_point!r}, which {path} does not have")
    return codec


def run_options() -> ort.RunOptions:
    """Options that runs of several graphs share, so that one flag ends whichever is under way."""
    import onnxruntime as ort

    return ort.RunOptions()


class Maps(list[Floats]):
    """A stem's outputs in borrowed buffers, which go back to their owner with this list.

    Args:
        arrays: the outputs.
        free: where the buffers go afterwards.
    """

    def __init__(self, arrays: list[Floats], free: list[list[Floats]]) -> None:
        super().__init__(arrays)
        self._arrays, self._free = arrays, free

    def __del__(self) -> None:
        self._free.append(self._arrays)


class BoundStem:
    """A graph whose outputs land in buffers that are used again once the caller has let go of them.

    Args:
        path: the ONNX file.
        threads: of ONNX Runtime.
        options: of every run.

    Raises:
        BundleError: the file is no model that ONNX Runtime can run.
    """

    def __init__(self, path: Path, *, threads: int = 1, options: ort.RunOptions | None = None) -> None:
        self._options = options
        self._session, self._path = open_session(path, threads=threads, bounded=True), path
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._binding = self._session.io_binding()
        self._free: list[list[Floats]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._sizes: list[tuple[int, ...]] = []

    def __call__(self, given: Sequence[NDArray[Any]]) -> Maps:
        """Outputs of the inputs, in their order; they stay as they are for as long as the returned list lives.

        Raises:
            ModelError: the run failed.
        """
        try:
            named = dict(zip(self._inputs, map(np.ascontiguousarray, given), strict=True))
            shapes = [array.shape for array in named.values()]
            if shapes != self._shapes:  # the first frame tells the outputs' shapes
                buffers = list(self._session.run(None, named, self._options))
                self._shapes, self._free, self._sizes = shapes, [], [b.shape for b in buffers]
                return Maps(buffers, self._free)
            buffers = self._free.pop() if self._free else [np.empty(size, np.float32) for size in self._sizes]
            for name, array in named.items():
                self._binding.bind_cpu_input(name, array)
            for name, buffer in zip(self._outputs, buffers, strict=True):
                self._binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise ModelError(f"{self._path.name} failed on its input: {error}") from error
        return Maps(buffers, self._free)


class Head:
    """The device's part of a bundle's model.

    Args:
        bundle: opened and verified.
        threads: of ONNX Runtime.
        options: of every run of a graph.

    Attributes:
        inputs: makes the stem's inputs of frames.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, options: ort.RunOptions | None = None) -> None:
        spec = bundle.manifest.head
        self.inputs = FrameInputs(bundle.manifest.inputs, bundle.manifest.preprocess)
        self._stem = BoundStem(bundle.part_path(spec.stem), threads=threads, options=options)
        opened = partial(open_graph, threads=threads, bounded=True, options=options)
        self._graphs = {name: opened(bundle.part_path(path)) for name, path in spec.graphs.items()}
        self._prefilter = opened(bundle.part_path(spec.prefilter)) if spec.prefilter else None
        for point in bundle.points:
            for name in point.graphs:
                if name not in self._graphs:
                    raise BundleError(f"operating point {point.id} needs the graph {name!r}, which the manifest does not list")

    def stem(self, given: Sequence[NDArray[Any]]) -> list[Floats]:
        """The stem's feature maps, shared by encoders and prefilter, of its inputs as ``inputs`` makes them."""
        return self._stem(given)

    def stem_of(self, picture: Frame, raw: Raw | None = None) -> list[Floats]:
        """The stem's feature maps of a frame; they stay as they are for as long as the returned list lives."""
        return self._stem(self.inputs(picture, raw))

    def prefilter_scores(self, features: list[Floats]) -> list[float]:
        """The prefilter's scores on the stem's first feature map, one a class; empty where the bundle has none."""
        return [float(v) for v in np.ravel(self._prefilter(features[:1])[0])] if self._prefilter else []

    def latents(self, features: list[Floats], graphs: Sequence[str]) -> tuple[Floats, ...]:
        """The sum of what the graphs make of the stem's maps, or the maps themselves; batch axis taken off."""
        if not graphs:
            return tuple(f[0].copy() for f in features)  # a latent outlives its frame's buffers
        totals: list[Any] = self._graphs[graphs[0]](features)
        for name in graphs[1:]:
            totals = [total + part for total, part in zip(totals, self._graphs[name](features), strict=True)]
        return tuple(t[0] for t in totals)

    def times_ms(self, picture: Frame, settings: Sequence[tuple[str, ...]], rounds: int = 40) -> dict[tuple[str, ...], Quantiles]:
        """Time of every set of graphs, stem included, measured in turns so that disturbances hit all alike."""
        taken: dict[tuple[str, ...], list[float]] = {s: [] for s in settings}
        given = self.inputs(picture, self.inputs.blank())
        for _ in range(rounds):
            for graphs in settings:
                start_ns = time.perf_counter_ns()
                self.latents(self.stem(given), graphs)
                taken[graphs].append((time.perf_counter_ns() - start_ns) / 1e6)
        return {s: Quantiles.of(ms[_WARM:]) for s, ms in taken.items()}
