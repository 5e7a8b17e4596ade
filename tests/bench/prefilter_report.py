"""What the prefilter is worth on what it never saw: COCO val photos, and the car-park video split by time.

``python -m tests.bench.prefilter_report --data $HEADTAIL_DATA [--weights FILE] [--figure docs/figures/prefilter.png]``

In the video the first half calibrates and the second half tests (`splitters calibrate` does the same). A passage holds a person,
bicycle or car when YOLOX-nano is confident of it at least once (--sure), and lasts while it sees anything of it; the figures
against its confident single frames stand beside. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_client.gates.interest import InterestGate, Promise, read_promise
from protos.messages import Box, Detection
from splitters.bundle import Bundle, open_bundle
from splitters.evaluation.gating.prefilter import Array, roc, roc_auc
from splitters.evaluation.gating.scene import UNSURE, Scene, examine, fit, interesting, read_video, watch
from splitters.evaluation.judging.detection import load_truth
from splitters.tasks.decoding.boxes import Pixels, read_rgb
from splitters.tasks.preprocess import preprocess
from splitters.zoo.defaults import ensure_exported
from splitters.zoo.detector.network import PREPROCESS
from splitters.zoo.efficientnet_lite0.network import load_efficientnet_lite0
from splitters.zoo.onnx_detectors import YoloxNano
from splitters.zoo.prefilter.network import WEIGHTS, InterestScore, columns_of, load_prefilter
from splitters.zoo.prefilter.promise import score_at_precision

Score = Callable[[Pixels], float]
Curves = dict[str, tuple[Array, np.ndarray]]


def scorer(weights: Path, interest: list[str]) -> Score:
    """A function from a BGR frame to the prefilter's score."""
    model, ids = load_prefilter(weights)
    stem, filt = load_efficientnet_lite0().stem, InterestScore(model, columns_of(interest, ids))

    @torch.inference_mode()
    def run(frame: Pixels) -> float:
        return float(filt(stem(torch.from_numpy(preprocess(frame, PREPROCESS))))[0, -1])

    return run


def coco(data: Path, score: Score, category_ids: list[int], side_min: float) -> tuple[Array, np.ndarray]:
    """Scores and truth of the COCO val photos; ``side_min`` is a box's least side as a share of the photo's longest."""
    truth = load_truth(data / "coco/val/instances.json")
    scores, positive = [], []
    for entry in truth.loadImgs(truth.getImgIds()):
        scores.append(score(np.ascontiguousarray(read_rgb(data / "coco/val/images" / entry["file_name"])[..., ::-1])))
        boxes = truth.loadAnns(truth.getAnnIds(imgIds=[entry["id"]], catIds=category_ids))
        least = side_min * max(entry["width"], entry["height"])
        positive.append(any(max(a["bbox"][2:]) >= least for a in boxes))
    return np.asarray(scores), np.asarray(positive)


def live(scene: Scene, promise: Promise, there: np.ndarray, answers: Array, loops: int = 40) -> dict[str, object]:
    """What the client's watch makes of the photos' threshold: the video over and over, one in a hundred stopped frames sent anyway.

    Recalls are those of the threshold it ends with: of the frames with something, and of those where the server's detector would
    have reported something, which is all that a probe can tell.

    Args:
        scene: the video.
        promise: in force at the start.
        there: whether a frame holds something, (F,).
        answers: score of the server's surest box of each class in every frame, (F, K).
        loops: how often the video is shown.
    """
    gate = InterestGate(promise)
    columns = list(promise.columns)
    first = None
    for index in range(loops * len(scene)):
        frame = index % len(scene)
        if gate.stops(index, gate.score(scene.scores[frame].tolist())):
            continue
        seen = [(scene.category_ids[k], answers[frame, k]) for k in columns if answers[frame, k] > 0]
        answer = Detection(boxes=tuple(Box(class_id=c, score=float(s), box_px=(0, 0, 1, 1)) for c, s in seen))
        if gate.learn(index, answer) and first is None:
            first = index
    sent = scene.scores[:, columns].max(axis=1) >= gate.threshold
    reported = answers[:, columns].max(axis=1) >= promise.sure
    return {
        "sure": promise.sure, "frames": loops * len(scene), "threshold_from": promise.threshold,
        "threshold_to": round(gate.threshold, 4),
        "loosened": gate.loosened, "first_after_frames": first, "recall": round(float(sent[there].mean()), 4),
        "recall_of_reported": round(float(sent[reported].mean()), 4) if reported.any() else None, "reported": int(reported.sum()),
        "stopped": round(float((~sent).mean()), 4),
    }  # fmt: skip


def car_park(data: Path, bundle: Bundle, recall: float, sures: list[float]) -> tuple[dict[str, object], Curves]:
    """Calibrated on the first half of the video, tested on the second, for several confidences of the teacher."""
    frames, fps = read_video(data / "video/person-bicycle-car-detection.mp4")
    teacher = YoloxNano(data / "weights/yolox_nano_416.onnx", score_min=UNSURE)
    scene = watch(bundle, frames, fps, lambda f: teacher(np.ascontiguousarray(f[..., ::-1])), sure=sures[0])
    columns, half = columns_of(["person", "bicycle", "car"], scene.category_ids), len(scene) // 2
    promise = read_promise(bundle)
    assert promise is not None
    report: dict[str, object] = {"frames": len(scene), "sure_of_detector_on_photos": promise.sure}
    scores, there = interesting(scene, columns, sures[0])
    on_this_scene = score_at_precision(*scene.own[:2]) or promise.sure
    report["live"] = {
        **{f"own detector, {s:.2f}": live(scene, replace(promise, sure=s), there, scene.answered) for s in (0.5, on_this_scene)},
        "YOLOX-nano at the server, 0.40": live(scene, replace(promise, sure=0.4), there, scene.confidence),
    }
    for sure in sures:
        fitted = fit(scene, columns, recall, sure=sure, until=half)
        photos = replace(fitted, asked=replace(fitted.asked, threshold=promise.threshold, recall_promised=promise.recall))
        report[f"sure_{sure:g}"] = {
            "calibration": {**fitted.asked.to_json(), "positive_frames": fitted.frames_positive, "sure_of_detector": fitted.sure},
            "test": examine(scene, columns, fitted, sure=sure),
            "test_with_the_photos_threshold": examine(scene, columns, photos, sure=sure),
        }  # fmt: skip
    certain = scene.confidence[half:][:, columns].max(axis=1) >= sures[0]
    curves: Curves = {
        "car park, second half, passages": (scores[half:], there[half:]),
        "car park, second half, the teacher's sure frames": (scores[half:], certain),
    }
    return report, curves


def draw_curves(curves: dict[str, tuple[Array, NDArray[np.bool_]]], path: Path) -> None:
    """ROC and precision–recall of several sets, side by side, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True)
    for name, (scores, positive) in curves.items():
        false_share, recall, precision = roc(scores, positive)
        label = f"{name} (AUC {roc_auc(scores, positive):.3f})"
        left.step(np.append(0, false_share), np.append(0, recall), where="post", label=label)
        right.step(recall, precision, where="post", label=f"{name} ({positive.mean():.0%} positive)")
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    left.set(xlabel="empty frames sent", ylabel="recall", title="ROC", xlim=(0, 1), ylim=(0, 1.01))
    right.set(xlabel="recall", ylabel="precision", title="Precision and recall", xlim=(0, 1), ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is left else "lower left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--bundle", default="detector", help="whose prefilter watches the car park (default: %(default)s)")
    parser.add_argument(
        "--sure", type=float, nargs="+", default=[0.4, 0.3, 0.5], help="YOLOX-nano's confidence that begins a passage"
    )
    parser.add_argument("--figure", type=Path, help="write ROC and PR curves there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(args.data)
    person = coco(data, scorer(args.weights, ["person"]), [1], 0.05)
    everything = coco(data, scorer(args.weights, ["person"]), [1], 0.0)
    bundle = open_bundle(Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle))
    park, curves = car_park(data, bundle, args.recall, args.sure)
    report = {
        "coco_val_person": {"photos": len(person[0]), "positive": int(person[1].sum()), "roc_auc": round(roc_auc(*person), 4),
                            "roc_auc_any_size": round(roc_auc(*everything), 4)},
        "car_park": park,
    }  # fmt: skip
    if args.figure:
        draw_curves({"COCO val, person": person, **curves}, args.figure)
    print(json.dumps({"bench": "prefilter_report", **report}))


if __name__ == "__main__":
    main()
