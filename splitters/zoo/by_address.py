"""Published files served by name: fetched, cut once as ONNX with plain quantised latents, and proved against the whole file.

The codec's scales and the operating points of files that could be measured are committed (``prepared/NAME``); those of others are
found at the first export, on the photographs that scikit-image ships.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from protos.errors import UnknownModelError
from splitters.bundle import Bundle
from splitters.bundle.operating_point import dump_points, load_points
from splitters.cutting.onnx.meaning import Asked, understood
from splitters.cutting.onnx.model import OnnxModel, load_onnx_model
from splitters.cutting.onnx.write import OnnxServing, Prepared, write_onnx_bundle, write_prepared
from splitters.runtime.pictures import shipped_pictures
from splitters.tasks.labels.coco_classes import NAME_OF
from splitters.tasks.labels.imagenet import imagenet_labels
from splitters.tasks.preprocess import Frame
from splitters.zoo.fetch import fetch
from splitters.zoo.published import Published, Serve, find, published

log = logging.getLogger(__name__)

BITS = (8, 6, 5, 4, 3)
PREPARED = Path(__file__).with_name("prepared")
_CODEC, _POINTS = "codec.json", "operating_points.json"
_LABELS: Mapping[str, Callable[[], Mapping[int, str]]] = {"coco": lambda: NAME_OF, "imagenet": imagenet_labels, "": dict}
_TOLD_EVERY_S = 5.0


def served_names() -> tuple[str, ...]:
    """Of every published file that its entry says how to serve."""
    return tuple(name for name, file in published().items() if file.serve is not None)


def export_published(name: str, out: Path) -> Bundle:
    """Writes the bundle; fetches the file where it is not here.

    Raises:
        UnknownModelError: no published file of that name is served so.
        UnreachableError: the file is neither here nor to be had.
        SourceError: its codec's scales are not known yet, and there are no photographs to find them on.
    """
    model, serving = _opened(name)
    folder = PREPARED / name
    if not folder.is_dir():
        return write_onnx_bundle(model, None, shipped_pictures(), serving, out).bundle
    spec = json.loads((folder / _CODEC).read_text(encoding="utf-8"))
    points = load_points((folder / _POINTS).read_text(encoding="utf-8"))
    known = Prepared(at=spec["at"], codec=spec["codec"], points=points, score_min=spec.get("score_min"))
    return write_prepared(model, known, serving, out)


def prepare(name: str, photos: Sequence[Frame]) -> None:
    """Finds the cut, the codec's scales and the operating points on photographs, and commits them to ``prepared``.

    Raises:
        UnknownModelError: no published file of that name is served so.
    """
    model, serving = _opened(name)
    with tempfile.TemporaryDirectory() as scratch:
        written = write_onnx_bundle(model, None, photos, serving, Path(scratch) / "bundle")
        codec = json.loads(written.bundle.read_part(written.bundle.manifest.codec))
    folder = PREPARED / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CODEC).write_text(json.dumps({"at": written.cut.name, "codec": codec}), encoding="utf-8")
    (folder / _POINTS).write_text(dump_points(written.bundle.points), encoding="utf-8")


def _opened(name: str) -> tuple[OnnxModel, OnnxServing]:
    """The file, ready to be cut, and its bundle's manifest."""
    file = find(name)
    if file.serve is None:
        raise UnknownModelError(f"nothing says how {name} is served; there are {', '.join(served_names())}")
    log.info("%s: %s, from %s", name, file.licence, file.address)
    model = load_onnx_model(fetch(file, progress=_told(file)))
    told = understood(model, _asked(file.serve), [_noise(model)], log.info)
    return model, OnnxServing(
        name=name, task=told.task, preprocess=told.preprocess, postprocess=told.postprocess, labels=told.labels, bits=BITS,
        licence=file.licence, may_find_nothing=True, provenance={"model": name, "weights": file.address},
    )  # fmt: skip


def _asked(serve: Serve) -> Asked:
    return Asked(output=serve.output, labels=_LABELS[serve.labels](), labels_from=serve.labels, preprocess=serve.preprocess)


def _noise(model: OnnxModel) -> Frame:
    """A picture to see the outputs' shapes with."""
    return np.random.default_rng(0).integers(0, 256, (*model.picture.size_px, 3), dtype=np.uint8)


def _told(file: Published) -> Callable[[int, int], None]:
    """Says in the log now and then how far a download is."""
    last_s = time.monotonic()

    def told(have: int, total: int) -> None:
        nonlocal last_s
        if have == total or time.monotonic() - last_s >= _TOLD_EVERY_S:
            last_s = time.monotonic()
            log.info("%s: %.1f of %.1f MB", file.name, have / 1e6, total / 1e6)

    return told
