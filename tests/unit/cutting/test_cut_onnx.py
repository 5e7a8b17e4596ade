"""An ONNX file is cut as ONNX: for every form that exporters write, the bundle answers like ONNX Runtime on the whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import pytest

from protos.messages import Classification, Detection
from splitters.bundle import Bundle, open_bundle
from splitters.cli import main
from splitters.codec import codec_from_spec
from splitters.commands.cut import read_photos
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import Frame, geometry, preprocess
from tests.fakes.onnx_models import NAMES, classifier, detector, quantised

FORMS: dict[str, dict[str, Any]] = {
    "opset 11": {"opset": 11}, "opset 13": {"opset": 13}, "opset 18": {"opset": 18}, "opset 22": {"opset": 22},
    "fp16": {"half": True}, "int8 QDQ": {"quantised": True}, "free batch": {"batch": "batch"}, "four at once": {"batch": 4},
    "Constant weights": {"constants": True},
    "bytes, channels last": {"bytes_last": True}, "top-k in the graph": {"done": "topk"}, "nms in the graph": {"done": "nms"},
    "external data": {"external": True}, "not square": {"size": 96},
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures of several shapes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for number, (width, height) in enumerate([(80, 60), (64, 64), (50, 90), (120, 70)]):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return folder


def cut(model: Path, out: Path, photos: Path, *more: str) -> int:
    return main(["cut", f"onnx:{model}", "--out", str(out), "--photos", str(photos), *more])


def served(bundle: Bundle, frames: list[Frame], *, together: bool) -> list[Any]:
    """Answers through the device's files, the codec's finest point and the server's tail."""
    head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    finest = max(bundle.points, key=lambda p: p.bits)
    received = []
    for frame in frames:
        latents = [t[0] for t in head.run(None, {"image": preprocess(frame, bundle.manifest.preprocess)})]
        received.append(codec.dequantise(codec.decode(codec.encode(codec.quantise(latents, finest.codec_point)))))
    tail = load_tail(bundle)
    sizes = [(f.shape[1], f.shape[0]) for f in frames]
    if together:
        return list(tail.run([np.stack(parts) for parts in zip(*received, strict=True)], sizes))
    return [tail.run([part[None] for part in parts], [size])[0] for parts, size in zip(received, sizes, strict=True)]


def whole(model: Path, frame: Frame, bundle: Bundle) -> list[tuple[int, float, list[float]]]:
    """The user's own file on a frame, decoded by other means than the product's: boxes above .25, before any suppression."""
    session = ort.InferenceSession(str(model))
    given = session.get_inputs()[0]
    image = preprocess(frame, bundle.manifest.preprocess)
    if given.type == "tensor(uint8)":
        image = np.rint(image).astype(np.uint8).transpose(0, 2, 3, 1)
    if given.type == "tensor(float16)":
        image = image.astype(np.float16)
    if given.shape[0] == 4:
        image = np.repeat(image, 4, axis=0)
    out = session.run(None, {given.name: image})[0].astype(np.float32)
    table = out if out.ndim == 2 else out[0]
    rows = []
    back = geometry(bundle.manifest.preprocess, frame.shape[1], frame.shape[0])
    for column in table if table.shape[1] == 6 else table.T:
        if table.shape[1] == 6:
            box, kind, score = column[:4], round(float(column[5])), float(column[4])
        else:
            x, y, w, h = column[:4]
            box, kind, score = (
                np.asarray([x - w / 2, y - h / 2, x + w / 2, y + h / 2]),
                int(column[4:].argmax()),
                float(column[4:].max()),
            )
        source = back.to_source(np.asarray([box], np.float32), frame.shape[1], frame.shape[0])[0]
        if score > 0.2:
            rows.append((kind, score, [float(v) for v in source]))
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_a_detector_of_any_form_is_served_without_a_further_flag(
    form: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector(tmp_path / "model.onnx", **FORMS[form])
    out = tmp_path / "bundle"
    assert cut(model, out, photos, "--json") == 0
    said = capsys.readouterr()
    report = json.loads(said.out.strip().splitlines()[-1])
    bundle = open_bundle(out)
    # Without halves of its own, a processor computes fp16 in fp32 throughout, and rounds only where the graph is cut.
    assert report["identical"] or (form == "fp16" and report["onnx_difference"] < 1e-3)
    assert report["free_batch"] is (form == "free batch")
    assert bundle.manifest.labels == NAMES
    assert bundle.manifest.licence == "of a test"
    assert "are read as" in said.err
    frames = read_photos(photos, 4)
    alone = served(bundle, frames, together=False)
    together = served(bundle, frames, together=True)
    found = 0
    for frame, answer, again in zip(frames, alone, together, strict=True):
        assert isinstance(answer, Detection)
        assert isinstance(again, Detection)
        wanted = whole(model, frame, bundle)
        for box in answer.boxes:
            assert any(
                kind == box.class_id and abs(score - box.score) <= 0.005 and np.abs(np.subtract(source, box.box_px)).max() <= 0.5
                for kind, score, source in wanted
            ), f"{box} is no box of the whole file"
        best = max((w for w in wanted if w[1] > 0.26), key=lambda w: w[1], default=None)
        if best is not None:
            assert answer.boxes, "the whole file finds something here"
            assert answer.boxes[0].score == pytest.approx(best[1], abs=0.005)
        assert [(b.class_id, round(b.score, 3)) for b in again.boxes] == [(b.class_id, round(b.score, 3)) for b in answer.boxes]
        found += len(answer.boxes)
    assert found, "a test that finds nothing shows nothing"
    tail = load_tail(bundle)
    assert tail.takes_images
    assert cv2.imread(str(tmp_path / "bundle.jpg")) is not None


def test_quantised_bytes_cross_as_they_are(tmp_path: Path, photos: Path) -> None:
    """Cut between QuantizeLinear and DequantizeLinear, 8 bits carry the tensor without any loss."""
    model = detector(tmp_path / "model.onnx", quantised=True)
    out = tmp_path / "bundle"
    node = next(n.name for n in __import__("onnx").load(model).graph.node if n.op_type == "QuantizeLinear")
    assert cut(model, out, photos, "--at", node, "--bits", "8") == 0
    bundle = open_bundle(out)
    head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    for frame in read_photos(photos, 4):
        latents = [t[0] for t in head.run(None, {"image": preprocess(frame, bundle.manifest.preprocess)})]
        assert np.array_equal(latents[0], np.rint(latents[0]))
        received = codec.dequantise(codec.decode(codec.encode(codec.quantise(latents, "0"))))
        assert all(np.array_equal(a, b) for a, b in zip(latents, received, strict=True))


def test_of_a_quantised_file_its_own_bytes_cross_and_come_through_exactly(tmp_path: Path, photos: Path) -> None:
    """Floats that cross are rounded behind the cut, where the codec's error can move them to the next step."""
    from splitters.cutting.onnx.cuts import Cuts
    from splitters.cutting.onnx.model import load_onnx_model

    model = quantised(detector(tmp_path / "float.onnx"), tmp_path / "model.onnx")
    assert cut(model, tmp_path / "bundle", photos, "--bits", "14", "12", "8", "4") == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert [p.bits for p in bundle.points] == [8, 4], "more than 8 bits say nothing more of bytes"
    head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
    tail = ort.InferenceSession(str(bundle.part_path(bundle.manifest.tail["path"])))
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    for frame in read_photos(photos, 4):
        latents = head.run(None, {"image": preprocess(frame, bundle.manifest.preprocess)})
        payload = codec.encode(codec.quantise([t[0] for t in latents], "0"))
        received = [r[None] for r in codec.dequantise(codec.decode(payload))]
        assert all(np.array_equal(a, b) for a, b in zip(latents, received, strict=True))
        names = [i.name for i in tail.get_inputs()]
        outputs = [tail.run(None, dict(zip(names, each, strict=True)))[0] for each in (latents, received)]
        assert np.array_equal(*outputs)
    # Where branches part, what one of them still needs crosses as bytes, too, and floats have no cut of their own.
    cuts = Cuts(load_onnx_model(model))
    several = [c for c in cuts.candidates() if len(c.crossing) > 1 and c.work < 0.95]
    assert several
    assert all(v.dtype.name == "UINT8" for c in several for v in cuts.crossing(c.position))
    assert cuts.find("/model.1/act/Relu_4_out_DequantizeLinear") == cuts.find("/model.1/act/Relu_4_out_QuantizeLinear")


@pytest.mark.parametrize(("softmax", "grey"), [(False, False), (True, False), (False, True)])
def test_a_classifier_is_read_from_its_shape_and_softmax_is_never_applied_twice(
    softmax: bool, grey: bool, tmp_path: Path, photos: Path
) -> None:
    model = classifier(tmp_path / "model.onnx", softmax=softmax, grey=grey)
    out = tmp_path / "bundle"
    assert cut(model, out, photos) == 0
    bundle = open_bundle(out)
    assert "batch" not in bundle.manifest.tail
    frames = read_photos(photos, 3)
    session = ort.InferenceSession(str(model))
    for frame, answer in zip(frames, served(bundle, frames, together=True), strict=True):
        image = preprocess(frame, bundle.manifest.preprocess)
        if grey:
            image = (image * np.asarray([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)).sum(axis=1, keepdims=True)
        raw = session.run(None, {"input": image})[0][0].astype(np.float64)
        shares = raw if softmax else np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
        assert isinstance(answer, Classification)
        assert answer.top[0].class_id == int(shares.argmax())
        assert answer.top[0].score == pytest.approx(float(shares.max()), abs=0.005)


def test_a_free_batch_that_mixes_pictures_is_run_frame_by_frame(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert cut(classifier(tmp_path / "model.onnx", body="mixer"), out, photos, "--at", "/stem/Relu") == 0
    assert "one by one" in capsys.readouterr().err
    bundle = open_bundle(out)
    assert bundle.manifest.tail["batch"] == 1
    frames = read_photos(photos, 3)
    assert served(bundle, frames, together=True) == served(bundle, frames, together=False)


def test_without_at_the_fewest_bytes_with_little_work_are_taken_and_named(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitters.cutting.onnx.cost import crossing_costs
    from splitters.cutting.onnx.cuts import Cuts
    from splitters.cutting.onnx.model import load_onnx_model

    path = detector(tmp_path / "model.onnx")
    assert cut(path, tmp_path / "bundle", photos, "--json") == 0
    said = capsys.readouterr().out
    named = json.loads(said.strip().splitlines()[-1])["at"]
    assert named in said.splitlines()[0]
    cuts = Cuts(load_onnx_model(path))
    chosen = cuts.find(named)
    assert chosen.work <= 0.35
    image = preprocess(read_photos(photos, 4)[0], open_bundle(tmp_path / "bundle").manifest.preprocess)
    rivals = [c for c in cuts.candidates() if c.work <= 0.35]
    costs = crossing_costs(cuts, rivals, {"image": image})
    assert costs[chosen.position].zstd_bytes == min(costs[c.position].zstd_bytes for c in rivals)


@pytest.mark.parametrize("at", ["/model.2/act/Relu", "model.2", "/model.2/", "model.2.act"])
def test_a_cut_is_named_by_node_module_or_tensor(at: str, tmp_path: Path, photos: Path) -> None:
    assert cut(detector(tmp_path / "model.onnx"), tmp_path / "bundle", photos, "--at", at) == 0
    assert open_bundle(tmp_path / "bundle").manifest.provenance["cut"] == "/model.2/act/Relu"


def test_size_is_honoured_where_the_file_leaves_it_open_and_refused_where_not(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    path = classifier(tmp_path / "open.onnx")
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    onnx.save(model, path)
    assert cut(path, tmp_path / "a", photos, "--size", "48x40") == 0
    assert open_bundle(tmp_path / "a").manifest.preprocess.size_px == (48, 40)
    assert cut(path, tmp_path / "b", photos) == 0
    assert "leaves its input's size open" in capsys.readouterr().err
    assert cut(detector(tmp_path / "fixed.onnx"), tmp_path / "c", photos, "--size", "128x128") == 2
    assert "fixed in the file" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("make", "arguments", "code", "said"),
    [
        (lambda p: classifier(p, body="unknown"), [], 11, "Transmogrify"),
        (lambda p: classifier(p, body="random"), [], 11, "random"),
        (lambda p: classifier(p, body="index"), ["--at", "/middle/ArgMax"], 11, "travel exactly"),
        (classifier, ["--at", "/stem/Relv"], 11, "/stem/Relu"),
        (classifier, ["--output", "yolox"], 2, "does not fit|needs 3 axes"),
        (classifier, ["--output", "tarot"], 2, "yolov8"),
        (lambda p: detector(p, metadata=False), ["--output", "detr"], 2, "output 1"),
        (detector, ["--labels", "labels.txt"], 2, "names 2 classes, the model's output has 3"),
        (lambda p: detector(p).write_bytes(b"no model") and p, [], 11, "no readable ONNX|no ONNX"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(
    make: Any, arguments: list[str], code: int, said: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    path = tmp_path / "model.onnx"
    make(path)
    arguments = [str(tmp_path / a) if a == "labels.txt" else a for a in arguments]
    assert cut(path, tmp_path / "bundle", photos, *arguments) == code
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if not line.startswith(("splitters: ", "cut: "))]
    assert len(lines) == 1
    assert re.search(said, lines[0]), lines[0]
    assert not (tmp_path / "bundle").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_weights_that_lie_elsewhere_are_missed_by_name(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = detector(tmp_path / "model.onnx", external=True)
    (tmp_path / "model.onnx.data").unlink()
    assert cut(path, tmp_path / "bundle", photos) == 11
    assert "file of their own" in capsys.readouterr().err


def test_profile_lists_the_good_cuts_of_the_users_own_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = detector(tmp_path / "model.onnx", done="nms")  # rows of its output differ from picture to picture
    assert main(["profile", f"onnx:{path}", "--budget-s", "0.5", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = json.loads(lines[-1])
    good = [r["name"] for r in table["rows"] if r["good"]]
    assert good
    assert len(good) < len(table["rows"])
    shown = [line.split()[1] for line in lines if line.startswith(" * ") and not line.startswith(" * good")]
    assert shown == good
    assert any("--all" in line for line in lines)
    assert main(["profile", f"onnx:{path}", "--budget-s", "0.1", "--all"]) == 0
    every = capsys.readouterr().out.splitlines()
    assert sum(r["name"] in " ".join(every) for r in table["rows"]) == len(table["rows"])
    assert all(r["head_ms"] > 0 and r["head_macs"] + r["tail_macs"] == table["total_macs"] for r in table["rows"])


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_graph_goes_to_a_file_and_never_to_the_terminal(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = f"onnx:{detector(tmp_path / 'model.onnx')}" if kind == "onnx" else "py:tests.fakes.any_models:detector"
    file = Path("model.onnx.graph.txt" if kind == "onnx" else "py-tests.fakes.any_models-detector.graph.txt")
    assert main(["profile", model, "--budget-s", "0.1"]) == 0
    assert not file.exists()
    plain = capfd.readouterr()
    assert main(["profile", model, "--budget-s", "0.1", "--verbose"]) == 0
    told = capfd.readouterr()
    graph = file.read_text().splitlines()
    assert sum("Conv" in line or "conv2d" in line for line in graph) >= 4
    assert f" graph: {file}, {len(graph)} lines" in told.out
    assert len(told.out.splitlines()) <= len(plain.out.splitlines()) + 1
    assert "Conv(" not in told.out + told.err
    assert "aten" not in told.out + told.err


def test_an_input_beside_the_picture_is_fed_its_size(tmp_path: Path, photos: Path) -> None:
    plain, sized = classifier(tmp_path / "plain.onnx"), classifier(tmp_path / "sized.onnx", body="sizes", batch=1)
    assert cut(plain, tmp_path / "a", photos) == cut(sized, tmp_path / "b", photos) == 0
    frames = read_photos(photos, 3)
    bundles = [open_bundle(tmp_path / name) for name in "ab"]
    first, second = (served(bundle, frames, together=False) for bundle in bundles)
    for a, b in zip(first, second, strict=True):
        assert [s.class_id for s in a.top] == [s.class_id for s in b.top]
        assert [s.score for s in a.top] == pytest.approx([s.score for s in b.top], abs=1e-3)


def test_ids_with_gaps_are_the_classes_ids(tmp_path: Path, photos: Path) -> None:
    """COCO's 80 categories are numbered 1 to 90: the third column of three classes need not be number 2."""
    (tmp_path / "labels.json").write_text(json.dumps({"1": "person", "3": "car", "90": "toothbrush"}))
    model = detector(tmp_path / "model.onnx")
    assert cut(model, tmp_path / "plain", photos) == 0
    assert cut(model, tmp_path / "named", photos, "--labels", str(tmp_path / "labels.json")) == 0
    frames = read_photos(photos, 4)
    plain, named = (served(open_bundle(tmp_path / n), frames, together=False) for n in ("plain", "named"))
    found = [(b.class_id, c.class_id) for a, b in zip(plain, named, strict=True) for b, c in zip(a.boxes, b.boxes, strict=True)]
    assert found
    assert all(other == (1, 3, 90)[one] for one, other in found)


def test_a_detector_that_finds_nothing_is_refused_unless_told_otherwise(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector(tmp_path / "model.onnx")
    assert cut(model, tmp_path / "bundle", photos, "--score-min", "1") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "finds nothing above 1.0 on 4 photographs" in said
    assert "--allow-nothing-found" in said
    assert not (tmp_path / "bundle").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert cut(model, tmp_path / "bundle", photos, "--score-min", "1", "--allow-nothing-found") == 0
    assert open_bundle(tmp_path / "bundle").manifest.postprocess["score_min"] == 1.0
