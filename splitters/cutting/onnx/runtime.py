"""ONNX Runtime as the cutter uses it: one thread, quiet, and its failures as one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from protos.errors import BundleError, ModelError, first_line
from splitters.runtime.sessions import open_session

Arrays = dict[str, np.ndarray[Any, Any]]


class Session:
    """A model in ONNX Runtime.

    Args:
        model: the file, or its bytes.
        optimised: as it is served; else every operator as the file has it, which makes two runs comparable to the last bit.
        what: how errors call it.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """

    def __init__(self, model: Path | bytes, *, optimised: bool, what: str) -> None:
        self._what = what
        try:
            self._session = open_session(model, optimised=optimised, of_user=True)
        except BundleError as error:
            raise ModelError(f"ONNX Runtime {ort.__version__} cannot run {what}: {_reason(error.__cause__ or error)}") from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Every output.

        Raises:
            ModelError: the run failed.
        """
        try:
            found: list[np.ndarray[Any, Any]] = self._session.run(None, {n: arrays[n] for n in self.inputs})
        except Exception as error:
            raise ModelError(f"{self._what} fails when it is run: {_reason(error)}") from error
        return found


def _reason(error: BaseException) -> str:
    """Without ONNX Runtime's own prefix and source lines."""
    text = first_line(error, 600)
    for mark in (" : FAIL : ", " : INVALID_GRAPH : ", " : RUNTIME_EXCEPTION : ", " : NOT_IMPLEMENTED : ", " : INVALID_ARGUMENT : "):
        text = text.partition(mark)[2] or text
    return text[:300]
