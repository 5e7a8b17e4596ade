"""Frigate's messages, as its public source writes them; no sockets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_client.config import ClientConfig, read_config
from edge_client.frigate.protocol import model_reply, read_request, reply, rows_of
from protos.errors import ConfigError, ProtocolError
from protos.messages import Box, Detection


def request(tensor: np.ndarray[Any, Any], **header: Any) -> list[bytes]:
    said = {"shape": list(tensor.shape), "dtype": tensor.dtype.name, "model_type": "yologeneric", **header}
    return [json.dumps(said).encode(), tensor.tobytes(order="C")]


RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(1, 4, 6, 3)


@pytest.mark.parametrize(
    "tensor",
    [RGB, RGB.transpose(0, 3, 1, 2), RGB.astype(np.float32), RGB.astype(np.float32) / 255],
    ids=["nhwc", "nchw", "float_denorm", "float"],
)  # fmt: skip
def test_every_form_of_tensor_is_the_same_picture(tensor: np.ndarray[Any, Any]) -> None:
    image = read_request(request(np.ascontiguousarray(tensor))).image
    assert image is not None
    np.testing.assert_array_equal(image, RGB[0, :, :, ::-1])


@pytest.mark.parametrize(
    "parts",
    [
        [], [b""], [b"{"], [b"[]"], [b"{}"], [b"x" * 5000], request(RGB)[:1], request(RGB, shape=[1, 4, 6]),
        request(RGB, shape=[2, 2, 6, 3]), request(RGB, shape=[1, 4, 6, -3]), request(RGB, shape=[1, 4, 6, True]),
        request(RGB, shape="1463"), request(RGB, dtype="object"), request(RGB, dtype=["uint8"]), request(RGB, shape=[1, 3, 6, 4]),
        request(RGB, shape=[1, 72, 1, 1]), request(RGB, shape=[1, 10**9, 10**9, 3]),
        request(np.full((1, 2, 2, 3), np.nan, np.float32)),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(parts: list[bytes]) -> None:
    if parts == request(RGB, shape=[1, 3, 6, 4]):
        assert read_request(parts).image is not None  # three channels first: another reading of as many bytes
        return
    with pytest.raises(ProtocolError):
        read_request(parts)


def test_rows_are_class_score_top_left_bottom_right_and_the_surest_twenty() -> None:
    boxes = tuple(Box(class_id=i, score=i / 100, box_px=(10.0, 20.0, 30.0, 90.0)) for i in range(30))
    rows = rows_of(Detection(boxes=boxes), 100, 80)
    assert rows.shape == (20, 6)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[0], [29, 0.29, 0.25, 0.1, 1.0, 0.3], rtol=1e-6)
    assert list(rows[:, 0]) == list(range(29, 9, -1))


def test_a_reply_reads_as_frigate_reads_it() -> None:
    rows = rows_of(Detection(boxes=(Box(class_id=2, score=0.5, box_px=(0.0, 0.0, 5.0, 5.0)),)), 10, 10)
    header, data = reply(rows)
    said = json.loads(header)
    np.testing.assert_array_equal(np.frombuffer(data, np.dtype(said["dtype"])).reshape(said["shape"]), rows)
    assert not rows_of(None, 10, 10).any()
    assert json.loads(model_reply()[0])["model_available"]


@pytest.mark.parametrize("address", ["", "tcp://", "127.0.0.1:5555", "tcp://host", "http://host:1", "ipc://"])
def test_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="--frigate must be"):
        ClientConfig(camera="frigate", frigate=address)


def test_frigate_takes_no_camera() -> None:
    assert read_config(None, {"frigate": "tcp://127.0.0.1:5555"}).frigate == "tcp://127.0.0.1:5555"
    with pytest.raises(ConfigError, match="takes no --camera"):
        read_config(None, {"frigate": "tcp://127.0.0.1:5555", "camera": "0"})
