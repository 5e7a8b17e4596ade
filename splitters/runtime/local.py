"""A bundle's local model: the whole model, smaller than the server's, that the device carries for when no server answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from protos.errors import ModelError
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.bundle.manifest import LocalModel
from splitters.runtime.sessions import open_graph
from splitters.tasks.base import open_task
from splitters.tasks.preprocess import Frame, input_image, normalise

if TYPE_CHECKING:
    import onnxruntime as ort


class Local:
    """The local model, opened.

    Args:
        bundle: opened and verified.
        spec: its manifest's entry.
        clock: nanoseconds, for the time an answer takes.
        threads: of ONNX Runtime.
        options: of every run.
    """

    def __init__(
        self, bundle: Bundle, spec: LocalModel, *, clock: Callable[[], int], threads: int, options: ort.RunOptions | None
    ) -> None:
        self._preprocess = spec.preprocess
        self._graph = open_graph(bundle.part_path(spec.path), threads=threads, bounded=True, options=options)
        self._task = open_task(bundle.manifest, local=True)
        self._clock = clock

    def prepare(self, frame: Frame) -> Frame:
        """The picture to keep while a frame is in flight: a few tens of kilobytes instead of the whole frame."""
        return input_image(frame, self._preprocess)

    def answer(self, image: Frame, size_px: tuple[int, int]) -> tuple[Answer, float]:
        """Answers a prepared picture; ``size_px`` is the source frame's (width, height). Also the milliseconds it took.

        Raises:
            ModelError: the run failed, or its outputs are not what the manifest says.
        """
        start_ns = self._clock()
        outputs = self._graph([normalise(image, self._preprocess)])
        try:
            answer = self._task.decode(outputs, [size_px])[0]
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise ModelError(f"the local model's outputs are not what the manifest says: {error}") from error
        return answer, (self._clock() - start_ns) / 1e6

    def __call__(self, frame: Frame) -> Answer:
        """Answers a BGR frame of any size."""
        return self.answer(self.prepare(frame), (frame.shape[1], frame.shape[0]))[0]


def open_local(
    bundle: Bundle, *, clock: Callable[[], int] = time.monotonic_ns, threads: int = 1, options: ort.RunOptions | None = None
) -> Local | None:
    """The bundle's local model; None where it has none.

    Raises:
        BundleError: it cannot be opened.
    """
    spec = bundle.manifest.local
    return None if spec is None else Local(bundle, spec, clock=clock, threads=threads, options=options)
