"""torchvision's detectors, cut inside the backbone.

The device resizes, normalises and runs the backbone's early layers. The image sizes travel with the latent (the wire
carries the source frame's size; the resized one follows from it), and the server runs the rest of the backbone and the
detector's own code, unchanged: anchors, proposals, suppression, and boxes scaled back to source pixels.

Shape legend: photos are (3, H, W) float 0..1; N batch; sizes are (height, width) pixels unless they say otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from protos.errors import BundleError, CutError
from protos.messages import Answer, Detection
from splitters.bundle.manifest import Preprocess
from splitters.cutting import torchvision_compat
from splitters.cutting.graph.split import Cutter
from splitters.tasks.detection import detection
from splitters.tasks.preprocess import geometry

Size = tuple[int, int]
Found = list[dict[str, Tensor]]
PREFIX = "backbone."


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


def shell(detector: nn.Module) -> nn.Module:
    """A copy of the detector that shares its modules, so that replacing two of them leaves the original whole."""
    import copy

    shell = copy.copy(detector)
    shell._modules = dict(detector._modules)  # noqa: SLF001  (a shallow copy of a module shares this very dict)
    return shell


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
