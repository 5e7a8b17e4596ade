"""What a model returns is tried with its postprocess on photographs before a bundle is written or a training starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from protos.errors import ConfigError, CutError, ModelError, SourceError
from splitters.commands.common.serving_arguments import add_serving_arguments, described
from splitters.commands.cut import read_photos
from splitters.cutting.answers import check_answers
from splitters.cutting.onnx_check import check_conversion
from splitters.cutting.sources import ModelSource, load_source
from splitters.tasks.preprocess import Frame, preprocess

SIDE = 64
CELLS = 64 + 16 + 4


def pictures(count: int = 4) -> list[Frame]:
    rng = np.random.default_rng(0)
    return [cv2.resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (90, 70)).astype(np.uint8) for _ in range(count)]


class Model(nn.Module):
    """A few features of the picture, made to an output by ``ending``."""

    def __init__(self, ending: Callable[[Tensor], Any], features: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, features, 8, 8)
        self.ending = ending

    def forward(self, x: Tensor) -> Any:
        return self.ending(self.body(x) * 4)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def source(model: nn.Module, **changes: Any) -> ModelSource:
    values: dict[str, Any] = {"name": "own", "example": torch.zeros(1, 3, SIDE, SIDE), "preprocess": None, "weights": "none"}
    return ModelSource(model=model.eval(), **(values | changes))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serving_arguments(parser)
    return parser.parse_args(words)


def grid(x: Tensor) -> Tensor:
    """YOLOX's table of 3 classes, sigmoids applied."""
    rows = x.mean((2, 3))[:, None, :8].expand(-1, CELLS, -1)
    return torch.cat([rows[..., :4], rows[..., 4:].sigmoid()], 2)


def boxes(x: Tensor) -> tuple[Tensor, Tensor]:
    corner = x.mean((2, 3))[:, :2].abs().reshape(-1, 1, 2).expand(-1, 6, -1) * 3
    return torch.cat([corner, corner + 9], 2), x.mean((2, 3))[:, None, :3].sigmoid().expand(-1, 6, -1)


REFUSED: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "a map": ("softmax", lambda x: x, r"one tensor \(N, classes\); for one picture the model returns \(1, 10, 8, 8\)"),
    "four axes": ("softmax", lambda x: pooled(x)[..., None, None], r"returns \(1, 10, 1, 1\)"),
    "two outputs": ("softmax", lambda x: (pooled(x), pooled(x)), r"returns \(1, 10\), \(1, 10\)"),
    "probabilities": ("softmax", lambda x: pooled(x).softmax(1), "softmax would be applied twice"),
    "one logit": ("softmax", lambda x: pooled(x)[:, :1], r"the model returns one, \(1, 1\)"),
    "no batch": ("softmax", lambda x: pooled(x)[0], "a first axis of 1, the batch"),
    "not finite": ("softmax", lambda x: pooled(x) / 0, "not finite"),
    "logits for a grid": ("yolox", pooled, rf"\(N, {CELLS}, 5 \+ classes\) at an input of 64x64.*returns \(1, 10\)"),
    "another grid": ("yolox", lambda x: grid(x)[:, :-1], rf"returns \(1, {CELLS - 1}, 8\)"),
    "a grid before its sigmoid": ("yolox", lambda x: grid(x) * 9, "after their sigmoid"),
    "two grids": ("yolox", lambda x: (grid(x), grid(x)), r"returns \(1, 84, 8\), \(1, 84, 8\)"),
    "scores first": ("boxes", lambda x: boxes(x)[::-1], r"boxes \(N, P, 4\) and scores.*returns \(1, 6, 3\), \(1, 6, 4\)"),
    "boxes alone": ("boxes", lambda x: boxes(x)[0], r"returns \(1, 6, 4\)"),
    "logits for scores": ("boxes", lambda x: (boxes(x)[0], boxes(x)[1] * 5 - 1), r"scores of 0\.\.1"),
    "fractions": ("boxes", lambda x: (boxes(x)[0] / 64, boxes(x)[1]), "fractions"),
    "centres": ("boxes", lambda x: (torch.tensor([30.0, 40, 5, 6]).expand(len(x), 6, 4), boxes(x)[1]), "corners"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_postprocess_would_misread_is_refused_with_the_shapes_seen(name: str) -> None:
    output, ending, told = REFUSED[name]
    with pytest.raises(CutError, match=told):
        described(source(Model(ending)), arguments("--output", output), pictures())


@pytest.mark.parametrize(("output", "ending", "classes"), [("softmax", pooled, 10), ("yolox", grid, 3), ("boxes", boxes, 3)])
def test_classes_without_names_are_numbers_and_assumptions_are_told(
    output: str, ending: Callable[[Tensor], Any], classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = described(source(Model(ending)), arguments("--output", output), pictures())
    assert told.labels == {i: str(i) for i in range(classes)}
    said = capsys.readouterr().err
    assert "nothing says how own wants its pictures" in said
    assert "ImageNet's mean (0.485, 0.456, 0.406)" in said
    if output != "softmax":
        assert told.preprocess.resize == "letterbox", "a detector sees the whole picture"
        assert told.postprocess["class_ids"] == [0, 1, 2]


def test_labels_fit_the_classes_or_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    model = source(Model(grid))
    file.write_text(json.dumps({"3": "cat", "7": "dog", "9": "cow"}))
    told = described(model, arguments("--output", "yolox", "--labels", str(file)), pictures())
    assert told.labels == {3: "cat", 7: "dog", 9: "cow"}
    assert told.postprocess["class_ids"] == [3, 7, 9]
    file.write_text(json.dumps(["cat", "dog", "cow"]))
    assert described(model, arguments("--output", "yolox", "--labels", str(file)), pictures()).labels[2] == "cow"
    for wrong in (["cat", "dog"], ["a", "b", "c", "d"]):
        file.write_text(json.dumps(wrong))
        with pytest.raises(CutError, match=rf"3 classes apart, and there are {len(wrong)} class ids.*\(1, 84, 8\)"):
            described(model, arguments("--output", "yolox", "--labels", str(file)), pictures())
        with pytest.raises(CutError, match=rf"10 classes apart and there are {len(wrong)} labels.*\(1, 10\).*ids 0 to 9"):
            described(source(Model(pooled)), arguments("--labels", str(file)), pictures())
    for bad in ({"x": "cat"}, {"0": 3}, [1, 2, 3], {}, 7):
        file.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=r"labels\.json must hold"):
            described(model, arguments("--output", "yolox", "--labels", str(file)), pictures())
    with pytest.raises(CutError, match="3 classes apart, and there are 80 class ids"):
        described(model, arguments("--output", "yolox", "--labels", "coco"), pictures())


def test_a_preprocess_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    for bad in (
        {"resize": "stretch", "size_px": [64, "x"]},
        {"resize": "stretch", "size_px": [64, 64], "colour": 1},
        {"resize": 3},
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises((ConfigError, SourceError), match=r"p\.json"):
            described(source(Model(pooled)), arguments("--preprocess", str(file)), pictures())


@pytest.mark.parametrize(
    "example",
    [torch.zeros(1, 1, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 32), torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
     torch.zeros(1, 4, 3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.float16)],
    ids=lambda e: f"{tuple(e.shape)}",
)  # fmt: skip
def test_a_model_that_takes_no_colour_pictures_is_told_what_it_would_get(example: Tensor) -> None:
    kind = str(example.dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"own takes {kind} of shape .*float32 \(N, 3, height, width\)"):
        described(source(Model(pooled), example=example), arguments(), pictures())


def test_a_bundle_written_from_python_is_tried_too() -> None:
    model = Model(pooled).eval()
    spec = described(source(model), arguments(), pictures()).preprocess
    check_answers(model, pictures(), preprocess=spec, postprocess={"kind": "softmax"}, labels={})
    with pytest.raises(CutError, match="10 classes apart and there are 1 labels"):
        check_answers(model, pictures(), preprocess=spec, postprocess={"kind": "softmax"}, labels={0: "zero"})


def write_onnx(path: Path, middle: list[Any], inits: dict[str, np.ndarray], *, kind: int = TensorProto.FLOAT) -> Path:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(0, 0.2, (8, 3, 3, 3)).astype("f"), "f": rng.normal(0, 0.3, (8, 10)).astype("f"), **inits}
    nodes = [
        helper.make_node("Cast", ["x"], ["xf"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["xf", "w"], ["c"], pads=[1] * 4, strides=[2, 2], name="conv1"),
        helper.make_node("Relu", ["c"], ["r"], name="relu1"), *middle,
        helper.make_node("GlobalAveragePool", ["m"], ["g"]), helper.make_node("Flatten", ["g"], ["v"], axis=1),
        helper.make_node("MatMul", ["v", "f"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(a, k) for k, a in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def resized(**how: str) -> list[Any]:
    sharper = helper.make_node("Clip", ["u", "low", "high"], ["m"])  # a mean alone would not see where samples lie
    return [helper.make_node("Resize", ["r", "", "sc"], ["u"], **how), sharper]


SCALES = {
    "sc": np.array([1, 1, 1.5, 1.5], "f"), "low": np.array(0.3, "f"), "high": np.array(0.6, "f"),
}  # fmt: skip


def test_a_conversion_that_computes_something_else_is_refused_with_the_converters_warning(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", resized(mode="linear", coordinate_transformation_mode="asymmetric"), SCALES)
    with pytest.raises(
        ModelError, match=r"m\.onnx cannot be trained or profiled: in torch its output 'y' differs.*the converter warned"
    ):
        load_source(f"onnx:{path}")


def test_a_right_conversion_is_checked_again_on_the_photographs(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", resized(mode="linear", coordinate_transformation_mode="half_pixel"), SCALES)
    found = load_source(f"onnx:{path}")
    assert found.check is not None
    told = described(found, arguments(), pictures())
    inputs = [preprocess(p, told.preprocess) for p in pictures()]
    assert found.check(inputs) < 1e-4
    # A file that answers otherwise for photographs alone, as a threshold far from the made-up inputs would.
    wrong = Model(pooled).eval()
    with pytest.raises(ModelError, match=r"'y' differs from what ONNX Runtime computes by"):
        check_conversion(path, wrong, inputs)


def test_a_constant_output_may_differ_by_rounding_only(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["r", "zero"], ["m"])]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"zero": np.array(0, "f")})
    module = load_source(f"onnx:{path}").module()
    inputs = [np.random.default_rng(1).random((1, 3, SIDE, SIDE), dtype="f")]
    assert ort.InferenceSession(str(path)).run(None, {"x": inputs[0]})[0].std() == 0

    class Off(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return module(x) + self.by

    check_conversion(path, Off(1e-8), inputs)
    with pytest.raises(ModelError, match="differs"):
        check_conversion(path, Off(1e-5), inputs)


def test_a_conversion_is_judged_alike_however_many_cores_there_are(tmp_path: Path) -> None:
    """On several threads torch takes other convolutions, which round otherwise: a published detector was refused for that."""
    path = write_onnx(tmp_path / "m.onnx", [helper.make_node("Identity", ["r"], ["m"])], {})
    module = load_source(f"onnx:{path}").module()
    threads: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            threads.append(torch.get_num_threads())
            return module(x)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_conversion(path, Watched(), [np.zeros((1, 3, SIDE, SIDE), "f")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1]


def test_an_onnx_file_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "m.onnx", [helper.make_node("Identity", ["r"], ["m"])], {}, kind=TensorProto.UINT8)
    with pytest.raises(ModelError, match="takes uint8 as 'x'; only float32 pictures"):
        load_source(f"onnx:{path}")


def test_unreadable_photographs_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, picture in enumerate(pictures(5)):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), picture)
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").rename(tmp_path / "named_otherwise")
    (tmp_path / "._1.jpg").write_bytes(b"\0\5\26\7Mac OS X" + bytes(4000))
    (tmp_path / "cut_off.jpg").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "notes.txt").write_text("not a photograph")
    assert len(read_photos(tmp_path, 100)) == 5
    assert "2 of 7 photographs could not be read" in capsys.readouterr().err
    assert "._1.jpg" in caplog.text
    assert "cut_off.jpg" in caplog.text
    assert len(read_photos(tmp_path, 4)) == 4, "others take the place of those that cannot be read"
    for file in tmp_path.glob("[1-9].jpg"):
        file.unlink()
    (tmp_path / "named_otherwise").unlink()
    with pytest.raises(SourceError, match="holds no photographs that can be read"):
        read_photos(tmp_path, 4)
