"""Image codecs' results on disk, so that a bundle can be evaluated again without running the whole ladder."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow

from protos.messages import Answer, Box, Classification, ClassScore, Detection, Tensors
from splitters.bundle import Bundle
from splitters.evaluation.image_codecs import OPTIONS, Setting
from splitters.evaluation.measure import Measured, Photos


def describe(setting: Setting) -> dict[str, object]:
    """All that decides what an image codec makes of a picture."""
    return {**asdict(setting), "options": dict(OPTIONS[setting.codec]), "pillow": pillow}


def photos_key(bundle: Bundle, photos: Photos, what: Mapping[str, object]) -> str:
    """A name for one result: photos, whole model and its postprocess, and what was done to the photos."""
    digest = hashlib.sha256(photos.pictures.tobytes())
    digest.update(repr((photos.sizes_px, photos.content)).encode())
    digest.update(json.dumps(dict(bundle.manifest.postprocess), sort_keys=True).encode())
    tail = bundle.manifest.tail
    # The whole model's own weights decide, not the bottleneck's.
    for path in tail.get("weights", [tail.get("whole", tail.get("path"))]):
        digest.update(bundle.manifest.part(path).sha256.encode())
    digest.update(json.dumps(dict(what), sort_keys=True).encode())
    return digest.hexdigest()[:24]


def store(folder: Path, key: str, measured: Measured) -> None:
    """Writes one result."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"sizes": measured.sizes.tolist(), "answers": [_plain(a) for a in measured.answers]}
    (folder / f"{key}.json").write_text(json.dumps(data), encoding="utf-8")


def load(folder: Path, key: str) -> Measured | None:
    """Reads one result, None where it is not there."""
    path = folder / f"{key}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return Measured(sizes=np.array(data["sizes"]), answers=[_answer(a) for a in data["answers"]])


def _plain(answer: Answer) -> dict[str, object]:
    if not isinstance(answer, Tensors):
        return asdict(answer)
    arrays = {n: [a.dtype.name, a.shape, b64encode(a.tobytes()).decode()] for n, a in answer.arrays.items()}
    return {"task": answer.task, "arrays": arrays}


def _answer(data: dict[str, Any]) -> Answer:
    if "top" in data:
        return Classification(top=tuple(ClassScore(**c) for c in data["top"]))
    if "boxes" in data:
        return Detection(boxes=tuple(Box(**{**b, "box_px": tuple(b["box_px"])}) for b in data["boxes"]))
    arrays = {n: np.frombuffer(b64decode(text), dtype).reshape(shape) for n, (dtype, shape, text) in data["arrays"].items()}
    return Tensors(task=data["task"], arrays=arrays)
