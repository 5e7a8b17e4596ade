"""The messages that Frigate's ``zmq`` detector exchanges, as its public source writes them (plugin ``zmq_ipc``).

A request is two parts, a JSON header ``{"shape": […], "dtype": "uint8"}`` and the tensor's bytes in C order. A reply is a header
and a float32 tensor (20, 6); a row is class, score, top, left, bottom, right, the last four as shares of the picture, and rows
without an object are zeros. Newer versions ask first whether the model is there (``model_request``), and may offer to send theirs.

Shape legend: N 1; H, W the model's input; C 3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import ProtocolError
from protos.messages import Detection
from protos.schema import read_json
from splitters.tasks.preprocess import Frame

ROWS: Final = 20
_COLUMNS: Final = 6
_AXES: Final = 4
_CHANNELS: Final = 3
_MAX_SIDE_PX: Final = 4096
_HEADER_BYTES: Final = 4096
_DTYPES: Final = ("uint8", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a request wants: a frame's detections, or a word about the model."""

    image: Frame | None = None
    about_model: bool = False


def read_request(parts: list[bytes]) -> Asked:
    """A request as a frame (H, W, 3), uint8, blue green red. The tensor's channels are red green blue, Frigate's default.

    Raises:
        ProtocolError: it is none.
    """
    if not parts:
        raise ProtocolError("an empty request")
    header = read_json(parts[0], dict, what="the request's header", error=ProtocolError, limit=_HEADER_BYTES)
    if header.get("model_request") or header.get("model_data"):
        return Asked(about_model=True)
    if len(parts) < 2:
        raise ProtocolError("a request without a tensor")
    return Asked(image=_frame(header.get("shape"), header.get("dtype"), parts[1]))


def _frame(shape: Any, dtype: Any, data: bytes) -> Frame:
    whole = isinstance(shape, list) and len(shape) == _AXES and all(type(n) is int and 0 < n <= _MAX_SIDE_PX for n in shape)
    if not whole or shape[0] != 1 or dtype not in _DTYPES:
        raise ProtocolError(f"a tensor of {str(dtype)[:20]!r} {str(shape)[:60]}; one picture of uint8 or float32 was expected")
    kind = np.dtype(str(dtype))
    if prod(shape) * kind.itemsize != len(data):
        raise ProtocolError(f"{len(data)} bytes are no {dtype} {shape}")
    tensor: NDArray[Any] = np.frombuffer(data, kind).reshape(shape)[0]
    if tensor.shape[2] != _CHANNELS:
        if tensor.shape[0] != _CHANNELS:
            raise ProtocolError(f"a tensor of {shape} has no three channels")
        tensor = tensor.transpose(1, 2, 0)
    if kind == np.float32:
        # input_dtype float is 0..1, float_denorm 0..255.
        top = float(tensor.max(initial=0.0))
        if not np.isfinite(tensor).all():
            raise ProtocolError("a tensor with values that are no numbers")
        tensor = np.clip(tensor * (255.0 if top <= 1.0 else 1.0), 0, 255).round().astype(np.uint8)
    return cv2.cvtColor(np.ascontiguousarray(tensor), cv2.COLOR_RGB2BGR).astype(np.uint8, copy=False)


def rows_of(answer: Detection | None, width_px: int, height_px: int) -> NDArray[np.float32]:
    """Detections as (20, 6), the surest first; all zeros where nothing is known."""
    rows = np.zeros((ROWS, _COLUMNS), np.float32)
    if answer is None:
        return rows
    for row, box in zip(rows, sorted(answer.boxes, key=lambda b: -b.score), strict=False):
        x1, y1, x2, y2 = box.box_px
        shares = np.clip([y1 / height_px, x1 / width_px, y2 / height_px, x2 / width_px], 0.0, 1.0)
        row[:] = [box.class_id, box.score, *shares]
    return rows


def reply(rows: NDArray[np.float32]) -> list[bytes]:
    """The two parts of a reply."""
    return [json.dumps({"shape": [ROWS, _COLUMNS], "dtype": "float32"}).encode(), rows.astype("<f4").tobytes()]


def model_reply() -> list[bytes]:
    """Whatever model Frigate has in mind: ours is there, and stays."""
    return [json.dumps({"model_available": True, "model_loaded": True, "model_saved": True}).encode()]
