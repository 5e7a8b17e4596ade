"""A bundle run whole in one process: head, codec and tail, with nothing between them but the payload.

Shape legend: frames are (H, W, 3) uint8 BGR, as OpenCV reads them; latents are float32 without a batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protos.errors import ConfigError
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.bundle.operating_point import OperatingPoint, best_point
from splitters.runtime.head import Head, open_codec
from splitters.runtime.inputs import Raw
from splitters.runtime.sessions import Floats
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import BLANK, Frame, input_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """What became of one frame.

    Attributes:
        answer: the task's: a `Classification` with ``top``, a `Detection` with ``boxes``, …
        payloads: what would have travelled, a layer each, the base layer first.
        point: the operating point.
    """

    answer: Answer
    payloads: tuple[bytes, ...]
    point: OperatingPoint

    @property
    def payload_bytes(self) -> int:
        """Of all layers, headers included."""
        return sum(map(len, self.payloads))


class BundleModel:
    """A bundle's head, codec and tail: a frame in, the task's answer and its payload out.

    Every frame is a key frame: nothing is predicted from an earlier one.

    Args:
        bundle: opened and verified.
        device: torch's, for tails that are torch.

    Raises:
        BundleError: head, codec or tail cannot be opened.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu") -> None:
        self.bundle = bundle
        self._head = Head(bundle)
        self._codec = open_codec(bundle)
        self._tail = load_tail(bundle, device=device)

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """Every operating point, with its measured bytes, accuracy and head time."""
        return tuple(self.bundle.points)

    def __call__(self, frame: Frame | None = None, *, raw: Raw | None = None, point: int | None = None) -> Inference:
        """Answers a frame from what its payload says.

        Args:
            frame: (H, W, 3) uint8 BGR of any size; None: the model takes no picture.
            raw: arrays for the inputs that take none, by their names.
            point: the operating point's id; None: the most accurate one.

        Raises:
            ConfigError: the frame is no such array.
            BundleError: there is no such point.
        """
        chosen = best_point(self.points) if point is None else self.bundle.point(point)
        payloads = self.encode(frame, raw=raw, point=chosen.id)
        height, width = self._frame(frame).shape[:2]
        return Inference(answer=self.decode(payloads, (width, height)), payloads=payloads, point=chosen)

    def _frame(self, frame: Frame | None) -> Frame:
        return BLANK if frame is None and not self._head.inputs.pictures else _checked(frame)

    def latents(self, frame: Frame | None = None, *, raw: Raw | None = None, point: int | None = None) -> tuple[Floats, ...]:
        """What the head makes of a frame, before it is quantised."""
        chosen = best_point(self.points) if point is None else self.bundle.point(point)
        picture = input_image(self._frame(frame), self.bundle.manifest.preprocess)
        return self._head.latents(self._head.stem_of(picture, raw), chosen.graphs)

    def encode(self, frame: Frame | None = None, *, raw: Raw | None = None, point: int | None = None) -> tuple[bytes, ...]:
        """The device's half: a frame's payload, a layer each."""
        chosen = best_point(self.points) if point is None else self.bundle.point(point)
        return self._codec.compress(self.latents(frame, raw=raw, point=chosen.id), chosen.codec_point).payloads

    def decode(self, payloads: Sequence[bytes], size_px: tuple[int, int]) -> Answer:
        """The server's half: the answer that a payload, or its first layers alone, gives.

        Args:
            payloads: layers, the base layer first.
            size_px: (width, height) of the frame.

        Raises:
            PayloadError: the base layer is damaged.
        """
        latents = self._codec.dequantise(self._codec.decode(payloads))
        return self._tail.run([tensor[None] for tensor in latents], [size_px])[0]

    def whole(self, frame: Frame) -> Answer:
        """The uncut model's answer, for comparison.

        Raises:
            ConfigError: the bundle holds no whole model.
        """
        picture = input_image(_checked(frame), self.bundle.manifest.preprocess)
        return self._tail.run_images([picture], [(frame.shape[1], frame.shape[0])])[0]


def _checked(frame: Frame | None) -> Frame:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        got = f"{frame.dtype} of shape {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ConfigError(f"a frame is an array of uint8 of shape (height, width, 3), blue first; got {got}")
    return frame
