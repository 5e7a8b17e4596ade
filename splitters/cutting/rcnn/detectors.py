"""torchvision's detectors, cut inside the backbone.

The device resizes, normalises and runs the backbone's early layers. The image sizes travel with the latent (the wire
carries the source frame's size; the resized one follows from it), and the server runs the rest of the backbone and the
detector's own code, unchanged: anchors, proposals, suppression, and boxes scaled back to source pixels.

Shape legend: photos are (3, H, W) float 0..1; N batch; sizes are (height, width) pixels unless they say otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from protos.errors import BundleError, CutError
from protos.messages import Answer, Detection
from splitters.bundle.manifest import Preprocess
from splitters.cutting import torchvision_compat
from splitters.cutting.checks import inference
from splitters.cutting.graph.split import Cutter, Split
from splitters.tasks.detection import detection
from splitters.tasks.preprocess import geometry

Size = tuple[int, int]
Found = list[dict[str, Tensor]]
PREFIX = "backbone."
# Whose outputs are "all tensors before suppression": dense heads, proposals, and what is predicted from regions.
BEFORE_NMS = ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor")


def is_detector(model: object) -> bool:
    """Whether the model is one of torchvision's detectors: a transform, a backbone, and heads on it."""
    return (
        isinstance(model, nn.Module)
        and type(getattr(model, "transform", None)).__name__ == "GeneralizedRCNNTransform"
        and isinstance(getattr(model, "backbone", None), nn.Module)
    )


def set_score_min(detector: Any, score_min: float) -> None:
    """Sets the score below which detections are not returned."""
    owner = detector.roi_heads if hasattr(detector, "roi_heads") else detector
    owner.score_thresh = score_min


class _Given(nn.Module):
    """Stands in for the backbone: returns features that were computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Any = None

    def forward(self, images: Tensor) -> Any:
        del images
        return self.features


class _GivenSizes(nn.Module):
    """Stands in for the transform: the images were resized before; only their sizes are known. Boxes are scaled back."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self._own = transform
        self.images: Any = None

    def forward(self, images: list[Tensor], targets: None = None) -> tuple[Any, None]:
        del images
        return self.images, targets

    def postprocess(self, result: Found, sizes: list[Size], originals: list[Size]) -> Found:
        """The transform's own: boxes, masks and keypoints to the source's pixels."""
        scaled: Found = self._own.postprocess(result, sizes, originals)  # type: ignore[operator]
        return scaled


class RcnnTail(nn.Module):
    """The rest of the backbone, and the detector's own code after it.

    Args:
        detector: taken over: its backbone and transform are replaced.
        backbone_tail: latents → what the backbone returns.
        input_size: (height, width) of the backbone's input, padding included.
    """

    def __init__(self, detector: nn.Module, backbone_tail: fx.GraphModule, input_size: Size) -> None:
        super().__init__()
        self.backbone_tail = backbone_tail
        self.detector = detector
        self._given, self._sizes = _Given(), _GivenSizes(detector.transform)  # type: ignore[arg-type]
        detector.backbone, detector.transform = self._given, self._sizes
        self._input_size = input_size
        self._lock = threading.Lock()

    def forward(self, latents: Sequence[Tensor], sizes: Sequence[Size], originals: Sequence[Size]) -> Found:
        """Detections in source pixels.

        Args:
            latents: batch first.
            sizes: of each resized image, without padding.
            originals: of each source image.
        """
        from torchvision.models.detection.image_list import ImageList

        empty = latents[0].new_empty(())
        with self._lock:
            self._given.features = self.backbone_tail(*latents)
            self._sizes.images = ImageList(empty.expand(len(sizes), 3, *self._input_size), list(sizes))
            found: Found = self.detector([empty.expand(3, *size) for size in originals])
            self._given.features = None
        return found


class ServedTail(nn.Module):
    """A detector's tail as a server runs it: latents and source sizes to answers.

    Args:
        tail: the torch half.
        preprocess: the bundle's; says how a source frame became the input.
    """

    def __init__(self, tail: RcnnTail, preprocess: Preprocess) -> None:
        super().__init__()
        self.tail = tail
        self._preprocess = preprocess

    def answers(self, latents: Sequence[NDArray[np.float32]], sizes_px: Sequence[tuple[int, int]]) -> list[Answer]:
        """One answer a frame; ``sizes_px`` are (width, height) of the source frames."""
        with torch.inference_mode():
            found = self.tail(
                [torch.from_numpy(np.ascontiguousarray(a)) for a in latents],
                [resized_size(self._preprocess, *size) for size in sizes_px],
                [(height, width) for width, height in sizes_px],
            )
        return [_answer(f) for f in found]


def resized_size(spec: Preprocess, width_px: int, height_px: int) -> Size:
    """(height, width) of a source frame within the model's input: all of it when stretched, less when letterboxed."""
    if spec.resize == "stretch":
        return spec.size_px
    scale = geometry(spec, width_px, height_px)
    return round(height_px * scale.scale_y), round(width_px * scale.scale_x)


def _answer(found: Mapping[str, Tensor]) -> Detection:
    order = found["scores"].argsort(descending=True, stable=True)
    boxes, scores, labels = (found[k][order].numpy() for k in ("boxes", "scores", "labels"))
    return detection(boxes.astype(np.float32), scores, labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorVerification:
    """What was compared with the uncut detector on real photographs.

    Attributes:
        boxes: how many detections were compared.
        worst_before_nms: largest difference of a tensor before suppression, over its standard deviation.
        worst_iou: smallest overlap of a box with its match.
        worst_score: largest difference of a score to its match's.
        backbone: what :meth:`splitters.cutting.graph.split.Split.verify` found for the backbone.
    """

    boxes: int
    worst_before_nms: float
    worst_iou: float
    worst_score: float
    backbone: Any


class DetectorSplit:
    """A detector cut after a module of its backbone, for photographs of one size.

    Args:
        detector: left as it is.
        at: a module of the backbone, with or without ``backbone.``.
        photos: (3, H, W) each, 0..1; their common padded size is what the halves are made for.

    Raises:
        CutError: the backbone has no such cut.
    """

    def __init__(self, detector: Any, at: str, photos: Sequence[Tensor]) -> None:
        self.detector = detector
        with inference(detector):
            images, _ = detector.transform(list(photos))
        self.input_size: Size = tuple(images.tensors.shape[-2:])
        self.cutter = Cutter(detector.backbone, images.tensors)
        self.backbone: Split = self.cutter.split(at.removeprefix(PREFIX))
        self.tail = RcnnTail(shell(detector), self.backbone.tail, self.input_size).eval()

    def head(self, photos: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Size]]:
        """The device's side in torch: latents, and the sizes that travel with them."""
        with inference(self.detector):
            images, _ = self.detector.transform(list(photos))
            return self.backbone.head(images.tensors), list(images.image_sizes)

    def __call__(self, photos: Sequence[Tensor]) -> Found:
        """Head, then tail."""
        latents, sizes = self.head(photos)
        with torch.no_grad():
            found: Found = self.tail(latents, sizes, [(p.shape[1], p.shape[2]) for p in photos])
        return found

    def verify(self, photos: Sequence[Tensor], *, tolerance: float = 1e-4) -> DetectorVerification:
        """Compares with the uncut detector: tensors before suppression, then boxes, labels and scores, matched by box.

        Raises:
            CutError: something differs: a tensor by more than ``tolerance``, a box (IoU below .999), label or score (1e-3).
        """
        with inference(self.detector):
            images, _ = self.detector.transform(list(photos))
            with _watch(self.detector) as wanted_before:
                wanted: Found = self.detector(list(photos))
        backbone = self.backbone.verify(images.tensors, tolerance=tolerance)
        with _watch(self.tail.detector) as got_before:
            got = self(photos)
        before = _compare(wanted_before, got_before)
        if not before <= tolerance:
            raise CutError(
                f"the detector cut at {self.backbone.at!r} is wrong: before suppression a tensor differs by {before:.3g}"
            )
        count, iou, score = 0, 1.0, 0.0
        for w, g in zip(wanted, got, strict=True):
            if len(w["boxes"]) != len(g["boxes"]):
                raise CutError(f"the cut detector finds {len(g['boxes'])} objects, the uncut one {len(w['boxes'])}")
            closest, distance = match(w, g)
            count, iou, score = count + len(w["boxes"]), min(iou, closest), max(score, distance)
        if iou < 0.999 or score > 1e-3:
            raise CutError(f"the cut detector's objects differ: overlap {iou:.4f}, scores {score:.2g}")
        return DetectorVerification(boxes=count, worst_before_nms=before, worst_iou=iou, worst_score=score, backbone=backbone)


def match(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, float]:
    """Pairs every wanted object with the best unpaired one of its label; the smallest overlap, the largest score difference."""
    from torchvision.ops import box_iou

    if not len(wanted["boxes"]):
        return 1.0, 0.0
    overlap = box_iou(wanted["boxes"].double(), got["boxes"].double()).nan_to_num(0.0)
    same = (wanted["boxes"][:, None] == got["boxes"][None]).all(dim=2)  # empty boxes have no overlap with themselves
    overlap[same] = 1.0
    overlap[wanted["labels"][:, None] != got["labels"][None]] = -1.0
    gap = (wanted["scores"][:, None] - got["scores"][None]).abs()
    worst_iou, worst_score = 1.0, 0.0
    for i in range(len(overlap)):
        j = int((overlap[i] - gap[i]).argmax())
        worst_iou, worst_score = min(worst_iou, float(overlap[i, j])), max(worst_score, float(gap[i, j]))
        overlap[:, j] = -2.0
    return worst_iou, worst_score


def shell(detector: nn.Module) -> nn.Module:
    """A copy of the detector that shares its modules, so that replacing two of them leaves the original whole."""
    import copy

    shell = copy.copy(detector)
    shell._modules = dict(detector._modules)  # noqa: SLF001  (a shallow copy of a module shares this very dict)
    return shell


@contextmanager
def _watch(detector: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collects what the modules before suppression return, in the order of :data:`BEFORE_NMS`."""
    modules = dict(detector.named_modules())
    seen: list[list[Tensor]] = [[] for _ in BEFORE_NMS]
    handles = []
    for number, name in enumerate(BEFORE_NMS):
        if name in modules:
            handles.append(modules[name].register_forward_hook(_collector(seen[number])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _collector(into: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def collect(_module: nn.Module, _arguments: Any, output: Any) -> None:
        into.extend(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor))  # noqa: SLF001

    return collect


def _compare(wanted: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> float:
    worst = 0.0
    for w_all, g_all in zip(wanted, got, strict=True):
        if [w.shape for w in w_all] != [g.shape for g in g_all]:
            raise CutError("the cut detector's tensors before suppression have other shapes than the uncut one's")
        for w, g in zip(w_all, g_all, strict=True):
            if w.numel():
                scale = float(w.double().std(correction=0)) or 1.0
                worst = max(worst, float((w.double() - g.double()).abs().amax()) / scale)
    return worst


def build_detector(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A torchvision detector without weights.

    Raises:
        BundleError: torchvision has none of that name, or it is no detector.
    """
    torchvision_compat.activate()
    from torchvision.models import get_model
    from torchvision.models.detection import __dict__ as known

    if name not in known:
        raise BundleError(f"torchvision has no detector {name!r}")
    detector: nn.Module = get_model(name, weights=None, weights_backbone=None, **dict(options or {}))
    if not is_detector(detector):
        raise BundleError(f"torchvision's {name} is no detector that is cut inside its backbone")
    return detector.eval()


def build_tail(name: str, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Builds the tail ``torchvision:name`` of a bundle: what the server's loader calls.

    Args:
        name: the detector's name in torchvision.
        spec: the manifest's ``tail``: ``at``, ``preprocess``, ``input_size``, ``options`` and ``score_min``.
        state: all of the detector's weights.

    Raises:
        BundleError: the weights do not fit, or the cut is gone.
    """
    detector: Any = build_detector(name, spec.get("options"))
    try:
        detector.load_state_dict(dict(state), strict=True)
        set_score_min(detector, float(spec["score_min"]))
        height, width = (int(s) for s in spec["input_size"])
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["preprocess"].items()}
        preprocess = Preprocess(**fields)
        split = Cutter(detector.backbone, torch.zeros(1, 3, height, width)).split(str(spec["at"]).removeprefix(PREFIX))
    except (RuntimeError, KeyError, TypeError, ValueError, CutError) as error:
        raise BundleError(f"the tail does not fit torchvision:{name}: {str(error).splitlines()[0]}") from error
    return ServedTail(RcnnTail(detector, split.tail, (height, width)), preprocess)
