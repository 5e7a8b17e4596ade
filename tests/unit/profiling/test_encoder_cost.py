"""What a head weighs, and what the whole model does alone at smaller inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitters.bundle import Bundle
from splitters.profiling.encoder_cost import encoder_costs
from splitters.zoo.defaults import find
from tests.fakes.detector_bundle import write_cell_detector


def test_the_macs_of_a_convolution_are_its_outputs_times_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_cell_detector(tmp_path / "bundle")
    weight = np.zeros((4, 3, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w", "b"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])],
        "one",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 32, 32])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(4, np.float32), "b")],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(data))
    monkeypatch.setattr(Bundle, "read_part", lambda _self, _part: data)
    (cost,) = encoder_costs(bundle)
    assert (cost.file_bytes, cost.parameters, cost.macs) == (len(data), 4 * 27 + 4, 32 * 32 * 4 * 27)
    assert cost.macs_per_px == pytest.approx(32 * 32 * 4 * 27 / 64**2)


def test_the_classifiers_dearest_encoder_does_a_third_of_the_model() -> None:
    costs = encoder_costs(find("efficientnet-lite0"))
    most = max(costs, key=lambda c: c.macs)
    assert 0.2 < most.macs / 385e6 < 0.4, "EfficientNet-Lite0 has 385 M"
    assert most.parameters < 200_000
    assert len({c.graphs for c in costs}) == len(costs) == 4
