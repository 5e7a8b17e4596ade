"""The detector's bundle: what the device and the server compute from it is what the whole detector says."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from protos.messages import Detection
from splitters.bundle import Bundle
from splitters.codec import codec_from_spec
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import preprocess
from splitters.zoo.detector.export_plain import SCORE_MIN, export_plain
from splitters.zoo.detector.network import WEIGHTS, decode, load_detector
from splitters.zoo.prefilter.export import HELD_OUT, INTEREST, prefilter_promise
from splitters.zoo.prefilter.network import CATEGORY_IDS

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="no detector weights in this tree")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_plain(tmp_path_factory.mktemp("detector") / "bundle")


def picture() -> np.ndarray:
    """A street of rectangles: the detector need not be right about it, only consistent."""
    rng = np.random.default_rng(0)
    frame = cv2.resize(rng.integers(60, 200, (12, 16, 3), dtype=np.uint8), (480, 360), interpolation=cv2.INTER_CUBIC)
    for x in (40, 200, 330):
        cv2.rectangle(frame, (x, 120), (x + 60, 320), (20, 30, 200), -1)
        cv2.circle(frame, (x + 30, 100), 25, (150, 170, 220), -1)
    return frame.astype(np.uint8)


def run_head(bundle: Bundle, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stem map and latent as the device computes them."""
    import onnxruntime as ort

    stem = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)), providers=["CPUExecutionProvider"])
    blocks = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.graphs["blocks"])), providers=["CPUExecutionProvider"])
    stem_map = stem.run(None, {"image": preprocess(frame, bundle.manifest.preprocess)})[0]
    return stem_map, blocks.run(None, {"stem": stem_map})[0]


def test_head_and_tail_through_onnx_are_the_whole(bundle: Bundle) -> None:
    frame = picture()
    stem_map, latent = run_head(bundle, frame)
    assert stem_map.shape == (1, 32, 160, 160)
    assert latent.shape[1:] == bundle.manifest.latent_shape[0]
    tail = load_tail(bundle)
    (answer,) = tail.run([latent], [(480, 360)])
    (offloaded,) = tail.run_images([_input(bundle, frame)], [(480, 360)])
    with torch.no_grad():
        whole = decode(load_detector()(torch.from_numpy(preprocess(frame, bundle.manifest.preprocess))), score_min=SCORE_MIN)[0]
    for found in (answer, offloaded):
        assert isinstance(found, Detection)
        assert [b.score for b in found.boxes] == pytest.approx(whole.scores.tolist(), abs=2e-3)
        assert [b.class_id for b in found.boxes] == whole.class_ids.tolist()


def _input(bundle: Bundle, frame: np.ndarray) -> np.ndarray:
    from splitters.tasks.preprocess import input_image

    return input_image(frame, bundle.manifest.preprocess)


def test_codec_keeps_the_latent(bundle: Bundle) -> None:
    _, latent = run_head(bundle, picture())
    codec = codec_from_spec(json.loads(bundle.read_part("device/codec.json")), bundle.read_part)
    sizes, errors = [], []
    for point in codec.point_ids:
        layers = codec.encode(codec.quantise([latent[0]], point))
        (restored,) = codec.dequantise(codec.decode(layers))
        sizes.append(sum(map(len, layers)))
        errors.append(float(np.abs(restored - latent[0]).mean() / np.abs(latent).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 0.05


def test_local_model_answers_alike_at_its_own_size(bundle: Bundle) -> None:
    import onnxruntime as ort

    spec = bundle.manifest.local
    assert spec is not None
    image = preprocess(picture(), spec.preprocess)
    session = ort.InferenceSession(str(bundle.part_path(spec.path)), providers=["CPUExecutionProvider"])
    boxes, scores = session.run(None, {"image": image})
    with torch.no_grad():
        raw = load_detector()(torch.from_numpy(image))
    from splitters.zoo.detector.network import dense

    expected, logits = dense(raw)
    assert np.abs(scores - logits.sigmoid().numpy()).max() < 1e-3
    assert np.abs(boxes - expected.numpy()).max() < 0.5


@pytest.mark.skipif(not HELD_OUT.exists(), reason="no prefilter calibration in this tree")
def test_the_bundle_carries_a_calibrated_prefilter(bundle: Bundle) -> None:
    import onnxruntime as ort

    stem_map, _ = run_head(bundle, picture())
    path = bundle.manifest.head.prefilter
    assert path is not None
    scores = ort.InferenceSession(str(bundle.part_path(path)), providers=["CPUExecutionProvider"]).run(None, {"stem": stem_map})[0]
    promise = json.loads(bundle.read_part("device/prefilter.json"))
    columns = [promise["category_ids"].index(c) for c in (1, 2, 3)]
    assert promise["interest"] == list(INTEREST)
    assert scores.shape == (1, len(promise["category_ids"]) + 1)
    assert scores[0, -1] == pytest.approx(scores[0, columns].max())
    assert 0 < promise["threshold"] < 1
    assert promise["recall_promised"] >= promise["recall_asked"] or not promise["kept"]
    wider = prefilter_promise(["person", "cat", "dog"], CATEGORY_IDS, 0.9)
    assert wider["units"] > 100
