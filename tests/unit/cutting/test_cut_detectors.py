"""A torchvision detector cut inside its backbone: equal to the uncut one, in torch and as a served bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from protos.errors import BundleError, CutError
from protos.messages import Detection
from splitters.bundle import Bundle
from splitters.cutting.rcnn.bundle import detector_preprocess, write_detector_bundle
from splitters.cutting.rcnn.detectors import build_detector, build_tail, is_detector, resized_size
from splitters.cutting.sources import ModelSource
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import preprocess
from tests.bench.cut_detectors import build, read_photo
from tests.fakes.detector_split import DetectorSplit, match

NAME, AT = "ssdlite320_mobilenet_v3_large", "backbone.features.0.6.block.1"
SMALL = {"min_size": 160, "max_size": 224}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def detector() -> Any:
    return build(NAME, {})


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    pytest.importorskip("skimage", reason="scikit-image, whose photograph is used, is not installed")
    return read_photo(None)


@pytest.fixture(scope="module")
def bundle(detector: Any, photo: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    frame = frame_of(photo)
    source = ModelSource(name=NAME, model=detector, example=torch.zeros(1), preprocess=None, labels={1: "person"}, weights="random")
    out = tmp_path_factory.mktemp("detector") / "bundle"
    written = write_detector_bundle(
        source, AT, [frame, frame[:, ::-1].copy()], out, name="ssd", bits=[8], licence="x", score_min=0.0
    )
    assert written.onnx_difference < 1e-3
    return written.bundle


@pytest.fixture(scope="module")
def split(detector: Any, photo: torch.Tensor) -> DetectorSplit:
    return DetectorSplit(detector, AT, [photo, photo[:, :200, :150].contiguous()])


def frame_of(photo: torch.Tensor) -> Any:
    return np.ascontiguousarray((photo.permute(1, 2, 0).numpy()[..., ::-1] * 255).round().astype(np.uint8))


def test_a_cut_with_two_tensors_finds_the_same_objects(split: DetectorSplit, detector: Any, photo: torch.Tensor) -> None:
    found = split.verify([photo])
    assert found.boxes >= 20
    assert found.worst_before_nms <= 1e-4
    assert found.worst_iou >= 0.999
    assert found.worst_score <= 1e-3
    assert type(detector.backbone).__name__ != "_Given"  # the detector itself was left whole


def test_sources_of_several_sizes_share_a_batch(split: DetectorSplit, photo: torch.Tensor) -> None:
    assert split.verify([photo, photo[:, :200, :150].contiguous()]).boxes >= 40


def test_two_stages_with_regions_are_cut_too(photo: torch.Tensor) -> None:
    faster = build("fasterrcnn_mobilenet_v3_large_320_fpn", SMALL)
    found = DetectorSplit(faster, "body.6", [photo]).verify([photo])
    assert found.boxes >= 20
    assert found.worst_iou >= 0.999


def test_a_tail_that_is_wrong_is_refused(split: DetectorSplit, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build(NAME, {})
    with torch.no_grad():
        other.head.classification_head.module_list[0][1].weight.mul_(1.01)
    monkeypatch.setattr(split.tail.detector, "head", other.head)
    with pytest.raises(CutError, match="before suppression a tensor differs"):
        split.verify([photo])


def test_the_served_bundle_answers_in_source_pixels_like_the_uncut_detector(
    bundle: Bundle, detector: Any, photo: torch.Tensor
) -> None:
    frame = frame_of(photo)
    height, width = frame.shape[:2]
    spec = bundle.manifest.preprocess
    image = preprocess(frame, spec)
    head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
    (answer,) = load_tail(bundle).run(head.run(None, {"image": image}), [(width, height)])
    # The uncut detector on the same input: undone normalisation, and its own resize finds nothing left to do.
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    with torch.no_grad():
        wanted = detector([torch.from_numpy(image[0]) * std + mean])[0]
    scale = torch.tensor([width / spec.size_px[1], height / spec.size_px[0]] * 2)
    assert isinstance(answer, Detection)
    got = {
        "boxes": torch.tensor([b.box_px for b in answer.boxes]),
        "labels": torch.tensor([b.class_id for b in answer.boxes]),
        "scores": torch.tensor([b.score for b in answer.boxes]),
    }
    assert len(answer.boxes) == len(wanted["boxes"]) >= 20
    best = {k: v[:20] for k, v in {**wanted, "boxes": wanted["boxes"] * scale}.items()}
    overlap, gap = match(best, got)
    assert overlap > 0.99  # other kernels, so not .999: a box may move by some hundredths of a pixel
    assert gap < 1e-3


def test_a_tail_that_does_not_fit_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="does not fit torchvision:ssd300_vgg16"):
        build_tail("ssd300_vgg16", dict(bundle.manifest.tail) | {"options": {}}, {})
    with pytest.raises(BundleError, match="no detector 'resnet18'"):
        build_tail("resnet18", bundle.manifest.tail, {})


def test_open_sizes_are_letterboxed_and_the_resized_size_follows_from_the_source() -> None:
    faster: Any = build_detector("fasterrcnn_mobilenet_v3_large_320_fpn")
    assert is_detector(faster)
    spec = detector_preprocess(faster)
    assert (spec.resize, spec.size_px) == ("letterbox", (320, 448))
    assert resized_size(spec, 640, 480) == (320, 427)
    assert resized_size(spec, 480, 640) == (320, 240)
    ssd: Any = build_detector("ssd300_vgg16")
    assert resized_size(detector_preprocess(ssd), 640, 480) == (300, 300)


def test_other_models_are_no_detectors() -> None:
    assert not is_detector(torch.nn.Linear(1, 1))
    assert not is_detector("detector")


def test_tests_leave_no_bundle_behind(bundle: Bundle) -> None:
    assert [p.name for p in Path(bundle.path).parent.iterdir()] == ["bundle"]
