"""Graphs that loop for ever, want all memory, or read other files: tried in a child, refused, and the client goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client.device.choices import known_times
from edge_client.device.engine import Engine
from edge_client.device.proof import Limits, prove
from protos.errors import BundleError, ModelError
from splitters.bundle import Bundle, open_bundle, sha256_hex
from splitters.bundle.manifest import MANIFEST
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import client
from tests.fakes.server_running import running

IMAGE, LATENT = ["n", 3, 32, 32], ["n", 4, 8, 8]


def _model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int | str] | None = None) -> bytes:
    graph = helper.make_graph(
        nodes, "hostile", [helper.make_tensor_value_info("image", TensorProto.FLOAT, IMAGE)],
        [helper.make_tensor_value_info("latent_0", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def loop_for_ever() -> bytes:
    """2^62 trips."""
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["x", "x"], ["y"])], "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("x", TensorProto.FLOAT, None)],
        [scalar("go_on", TensorProto.BOOL, []), scalar("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    weights = [np.zeros((4, 3, 4, 4), np.float32), np.array(2**62, np.int64), np.array(True)]
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Loop", ["w1", "w2", "c"], ["latent_0"], body=body),
    ]
    return _model(nodes, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])


def loop_on_white() -> bytes:
    """Harmless on the test picture, for ever on a white one."""
    body_inputs = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, None)]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["x", "x"], ["y"])], "body",
        [helper.make_tensor_value_info(*value) for value in body_inputs],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    weights = [np.zeros((4, 3, 4, 4), np.float32), np.array(2**62, np.int64), np.array(0.99, np.float32)]
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "w2"], ["white"]),
        helper.make_node("Loop", ["w1", "white", "c"], ["latent_0"], body=body),
    ]
    return _model(nodes, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])


def want_all_memory() -> bytes:
    """A tensor of 40 GB, from a file of a few hundred bytes."""
    shape = numpy_helper.from_array(np.array([10_000, 1_000_000], np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])),
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Add", ["huge", "sum"], ["latent_0"]),
    ]
    return _model(nodes, [shape])


def huge_on_white() -> bytes:
    """A few kilobytes on the test picture, a tensor of 14 GB on a white one."""
    weights = [
        np.array(60_000, np.float32),
        np.array([1], np.int64),
        np.zeros((4, 3, 4, 4), np.float32),
        np.array(1.01, np.float32),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w2"], ["c"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=0),
        helper.make_node("Relu", ["mean"], ["light"]),
        helper.make_node("Mul", ["light", "w3"], ["lighter"]),
        helper.make_node("Floor", ["lighter"], ["white"]),
        helper.make_node("Mul", ["white", "w0"], ["side"]),
        helper.make_node("Cast", ["side"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "w1"], ["one"]),
        helper.make_node("Concat", ["one", "one"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["huge"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["c", "sum"], ["latent_0"]),
    ]
    return _model(nodes, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])


def weights_elsewhere(location: str) -> bytes:
    """Says that its weights are the bytes of another file."""
    weight = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[8], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Add", ["c", "sum"], ["latent_0"]),
    ]
    return _model(nodes, [weight])


def with_stem(bundle: Bundle, stem: bytes) -> Bundle:
    """The bundle with another stem, its manifest in order."""
    (bundle.path / "device" / "stem.onnx").write_bytes(stem)
    data = json.loads((bundle.path / MANIFEST).read_text())
    for part in data["parts"]:
        if part["path"] == "device/stem.onnx":
            part |= {"sha256": sha256_hex(stem), "bytes": len(stem)}
    (bundle.path / MANIFEST).write_text(json.dumps(data))
    return open_bundle(bundle.path, side="device")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "bundle")


def tried(bundle: Bundle, cache: Path, limits: Limits | None = None) -> object:
    return asyncio.run(prove(bundle, threads=1, cache=cache, limits=limits))


def test_a_good_bundle_is_tried_once_and_its_times_are_kept(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = tried(bundle, tmp_path / "times")
    assert known_times(bundle, threads=1, cache=tmp_path / "times") == times
    monkeypatch.setattr("sys.executable", "/nowhere")
    assert tried(bundle, tmp_path / "times") == times


def test_a_head_that_loops_for_ever_is_refused_in_time(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"within 1 s|1 s of the processor"):
        tried(with_stem(bundle, loop_for_ever()), tmp_path, Limits(time_s=1.0))
    assert not list(tmp_path.glob("*.json"))


def test_a_head_that_wants_all_memory_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BundleError):
        tried(with_stem(bundle, want_all_memory()), tmp_path)


@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "/etc/hostname"])
def test_a_graph_whose_weights_are_another_file_is_refused(tmp_path: Path, bundle: Bundle, location: str) -> None:
    for directory in (bundle.path / "device", bundle.path):
        (directory / "secret.bin").write_bytes(b"password")
    with pytest.raises(BundleError, match="another file"):
        tried(with_stem(bundle, weights_elsewhere(location)), tmp_path)


def test_a_try_can_be_abandoned(tmp_path: Path, bundle: Bundle) -> None:
    looping = with_stem(bundle, loop_for_ever())

    async def story() -> None:
        task = asyncio.create_task(prove(looping, threads=1, cache=tmp_path, limits=Limits(time_s=1000.0)))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun_s = time.monotonic()
    asyncio.run(story())
    assert time.monotonic() - begun_s < 60


def test_a_head_that_loops_on_just_one_frame_can_be_ended(tmp_path: Path, bundle: Bundle) -> None:
    trap = with_stem(bundle, loop_on_white())
    tried(trap, tmp_path)
    engine = Engine(trap, clock=time.monotonic_ns)
    threading.Timer(0.3, engine.abandon).start()
    with pytest.raises(ModelError, match="terminate"):
        engine.features(np.full((40, 40, 3), 255, np.uint8))


def test_a_head_that_wants_all_memory_on_just_one_frame_fails_on_that_frame(tmp_path: Path, bundle: Bundle) -> None:
    trap = with_stem(bundle, huge_on_white())
    tried(trap, tmp_path)
    engine = Engine(trap, clock=time.monotonic_ns)
    grey, white = np.full((40, 40, 3), 90, np.uint8), np.full((40, 40, 3), 255, np.uint8)
    expected = engine.features(grey).maps[0].copy()
    with pytest.raises(ModelError, match="memory"):
        engine.features(white)
    assert np.array_equal(engine.features(grey).maps[0], expected)  # and goes on with the next


async def test_a_client_whose_head_hangs_ends_at_the_second_interrupt(tmp_path: Path, bundle: Bundle) -> None:
    with_stem(bundle, loop_on_white())
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "white.png"), np.full((40, 40, 3), 255, np.uint8))
    async with running(bundle.path) as server:
        with client(tmp_path, "--camera", str(tmp_path / "photos"), "--server", server.address) as process:
            await asyncio.to_thread(_until_asleep_in_the_loop, process.process.pid)
            for _ in range(2):
                process.process.send_signal(signal.SIGINT)
                await asyncio.sleep(0.5)
            finished = await asyncio.to_thread(process.finish, timeout_s=300)
    assert finished.code == 130
    assert not finished.lines or finished.lines[0]["outcome"] == "dropped"


def _until_asleep_in_the_loop(pid: int) -> None:
    """Until a thread of the client has computed for a second: nothing but the loop does."""
    threads = Path(f"/proc/{pid}/task")
    until_s = time.monotonic() + 300
    while time.monotonic() < until_s:
        time.sleep(0.2)
        for stat in threads.glob("*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[11]) / os.sysconf("SC_CLK_TCK") > 1 and stat.parent.name != str(pid):
                    return
    raise AssertionError("the head was never reached")
