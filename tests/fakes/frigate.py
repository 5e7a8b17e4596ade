"""A stand-in for Frigate's zmq detector: it writes and reads the messages as that plugin's public source does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

TIMEOUT_MS = 200


class Detector:
    """REQ socket; gives up after 200 ms, and then begins again with a new socket, as Frigate does."""

    def __init__(self, endpoint: str, *, timeout_ms: int = TIMEOUT_MS) -> None:
        self._endpoint, self._timeout_ms = endpoint, timeout_ms
        self._context: zmq.Context[Any] = zmq.Context()
        self.timeouts = 0
        self._open()

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.REQ)
        for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):
            self._socket.setsockopt(option, self._timeout_ms)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._endpoint)

    def ask_for_model(self) -> dict[str, Any]:
        """The handshake of newer versions."""
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.send_multipart([json.dumps({"model_request": True, "model_name": "x.onnx"}).encode()])
        (answer,) = self._socket.recv_multipart()
        self._socket.setsockopt(zmq.RCVTIMEO, self._timeout_ms)
        said: dict[str, Any] = json.loads(answer)
        return said

    def detect(self, tensor: NDArray[Any]) -> NDArray[np.float32]:
        """(20, 6); zeros where no answer came in time."""
        header = {"shape": list(tensor.shape), "dtype": tensor.dtype.name, "model_type": "yologeneric"}
        return self.send([json.dumps(header).encode(), tensor.tobytes(order="C")])

    def send(self, parts: list[bytes]) -> NDArray[np.float32]:
        """Any request."""
        try:
            self._socket.send_multipart(parts)
            head, data = self._socket.recv_multipart()
        except zmq.Again:
            self.timeouts += 1
            self._socket.close(linger=0)
            self._open()
            return np.zeros((20, 6), np.float32)
        said = json.loads(head)
        return np.frombuffer(data, np.dtype(said["dtype"])).reshape(said["shape"])

    def close(self) -> None:
        """Ends it."""
        self._socket.close(linger=0)
        self._context.term()
