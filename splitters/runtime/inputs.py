"""What a head is given for each frame: the picture, the one before it, a clip, and arrays that came with the frame.

Shape legend: pictures are (h, w, 3) uint8 BGR of the model's input size; T frames of a clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from splitters.bundle.manifest import Input, Preprocess
from splitters.tasks.preprocess import Frame, normalise

ARRAY_SUFFIXES = (".npy", ".npz")
MAX_ARRAY_BYTES = 1 << 30

Array = NDArray[Any]
Raw = Mapping[str, Array]
ONLY = ""  # the name of an array that came without one: of a model with a single raw input, that


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a ``.npz`` by their names, or the one of a ``.npy`` by none; nothing is unpickled.

    Raises:
        SourceError: it cannot be read, or holds no arrays of numbers.
    """
    try:
        if path.stat().st_size > MAX_ARRAY_BYTES:
            raise SourceError(f"{path} has more than {MAX_ARRAY_BYTES} bytes")
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {ONLY: found}
        with found:
            if sum(info.file_size for info in found.zip.infolist()) > MAX_ARRAY_BYTES:
                raise SourceError(f"{path} has more than {MAX_ARRAY_BYTES} bytes")
            return {name: found[name] for name in found.files}
    except SourceError:
        raise
    except Exception as error:  # what NumPy and zipfile raise on files that hold something else
        raise SourceError(f"{path} holds no arrays that can be read: {error}") from error


class FrameInputs:
    """Makes the head's inputs, frame by frame in their order; it remembers the frames that a clip needs.

    Args:
        inputs: of the manifest; empty: one picture.
        preprocess: how a picture becomes an input.
    """

    def __init__(self, inputs: Sequence[Input], preprocess: Preprocess) -> None:
        self._inputs, self._spec = tuple(inputs), preprocess
        self._raw = tuple(i for i in self._inputs if i.source == "raw")
        kept = [i.shape[1] for i in self._inputs if i.source == "clip"] + [2 for i in self._inputs if i.source == "previous"]
        self._last: deque[Array] = deque(maxlen=max(kept, default=1))

    @property
    def pictures(self) -> bool:
        """Whether a frame's picture is looked at."""
        return len(self._raw) < len(self._inputs) or not self._inputs

    @property
    def raw(self) -> tuple[str, ...]:
        """The names of the arrays that must come with a frame."""
        return tuple(i.name for i in self._raw)

    def blank(self) -> dict[str, Array]:
        """Arrays of the right shape, to try the head with."""
        return {i.name: np.zeros(i.shape, i.dtype) for i in self._raw}

    def forget(self) -> None:
        """The next frame is the first one."""
        self._last.clear()

    def check(self, raw: Raw | None) -> None:
        """Refuses arrays that are not the model's.

        Raises:
            SourceError: one is absent, unknown, or of another shape or kind.
        """
        for each in self._raw:
            self._given(each, raw)
        if unknown := [n for n in raw or () if n not in self.raw and n != ONLY]:
            raise SourceError(f"the model has no raw input {unknown[0]!r}; it has {', '.join(self.raw) or 'none'}")
        if not self._raw and raw:
            raise SourceError("the model takes pictures alone, and the frame brings arrays")

    def __call__(self, picture: Frame, raw: Raw | None = None) -> list[Array]:
        """The head's inputs, in order.

        Raises:
            SourceError: an array that the model needs did not come with the frame, or does not fit.
        """
        if not self._inputs:
            return [normalise(picture, self._spec)]
        if self.pictures:
            self._last.append(normalise(picture, self._spec))
        return [self._one(each, raw) for each in self._inputs]

    def _one(self, each: Input, raw: Raw | None) -> Array:
        if each.source == "raw":
            return self._given(each, raw)
        if each.source == "picture":
            return self._last[-1]
        if each.source == "previous":
            return self._last[max(0, len(self._last) - 2)]
        frames = list(self._last)[-each.shape[1] :]
        frames = [frames[0]] * (each.shape[1] - len(frames)) + frames
        return np.stack(frames, axis=1)

    def _given(self, each: Input, raw: Raw | None) -> Array:
        given = (raw or {}).get(each.name)
        if given is None and len(self._raw) == 1:
            given = (raw or {}).get(ONLY)
        if given is None:
            raise SourceError(
                f"the model needs an array {each.name!r} of {each.dtype} {each.shape} with each frame: a program gives it with "
                "raw=, a .npy or .npz file holds it"
            )
        array = np.asarray(given)
        if array.shape == each.shape[1:]:
            array = array[None]
        if array.shape != each.shape or not np.can_cast(array.dtype, each.dtype, "same_kind"):
            raise SourceError(f"{each.name!r} must be {each.dtype} {each.shape}, the frame brings {array.dtype} {array.shape}")
        return np.ascontiguousarray(array, each.dtype)
