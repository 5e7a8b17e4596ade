"""Writes the default bundles: the name a person gives to `--model` → a verified directory."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from protos.errors import BundleError, ConfigError, SourceError, StorageError, UnknownModelError
from splitters.bundle import Bundle, Measure, exported_path, open_bundle, sha256_file
from splitters.bundle.draft import alone
from splitters.registry import Registry
from splitters.zoo.efficientnet_lite0 import WEIGHTS
from splitters.zoo.published import published

log = logging.getLogger(__name__)

PLAIN = "efficientnet-lite0-plain"
DETECTOR_PLAIN = "detector-plain"
PLAIN_CODEC = WEIGHTS / "plain.json"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def _efficientnet_lite0_plain(out: Path) -> Bundle:
    from splitters.zoo.efficientnet_lite0.export_plain import export_plain

    return export_plain(out, json.loads(PLAIN_CODEC.read_text(encoding="utf-8")))


def _detector_plain(out: Path) -> Bundle:
    from splitters.zoo.detector.export_plain import export_plain

    return export_plain(out)


def _detector(out: Path) -> Bundle:
    from splitters.exporting.learned import WEIGHTS_FILE
    from splitters.zoo.detector.export import FOLDER, export_learned

    return export_learned(out) if (FOLDER / WEIGHTS_FILE).is_file() else _detector_plain(out)


def _efficientnet_lite0(out: Path) -> Bundle:
    from splitters.exporting.learned import WEIGHTS_FILE
    from splitters.zoo.efficientnet_lite0.export import export_learned

    return export_learned(out, WEIGHTS) if (WEIGHTS / WEIGHTS_FILE).is_file() else _efficientnet_lite0_plain(out)


def _run(run: Path, out: Path, measure: Measure) -> Bundle:
    """The bundle of a directory that `splitters train` wrote."""
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    if recipe["config"]["model"] == "detector":
        from splitters.zoo.detector.export import export_learned as export_detector

        return export_detector(out, run, Path(recipe["plan"]["detector"]), measure)
    if recipe["config"]["cut"] is None:
        from splitters.zoo.efficientnet_lite0.export import export_learned

        return export_learned(out, run, measure)
    from splitters.exporting.learned_any import export_run

    return export_run(run, out, measure=measure)


EXPORTERS: Registry[Callable[[Path], Bundle]] = Registry(
    "headtail.backbones",
    "default model",
    {
        "efficientnet-lite0": "splitters.zoo.defaults:_efficientnet_lite0",
        PLAIN: "splitters.zoo.defaults:_efficientnet_lite0_plain",
        "detector": "splitters.zoo.defaults:_detector",
        DETECTOR_PLAIN: "splitters.zoo.defaults:_detector_plain",
        "yolox-nano": "splitters.zoo.yolox_nano.export:export_yolox_nano",
    },
    error=UnknownModelError,
)
"""By the name that ``--model`` takes: writes the model's bundle to a directory that does not exist yet."""


def _by_address(name: str) -> Callable[[Path], Bundle]:
    def write(out: Path) -> Bundle:
        from splitters.zoo.by_address import export_published

        return export_published(name, out)

    return write


for _name, _file in published().items():
    if _file.serve is not None:
        EXPORTERS.register(_name)(_by_address(_name))


def recalibrate(what: str, photos: Path, *, count: int = 200, seed: int = 0) -> None:
    """Measures the plain codec's scales again, on ``count`` photos drawn from ``photos`` with ``seed``, and writes them.

    Raises:
        ConfigError: ``what`` has no plain latent.
        SourceError: there is no readable photo.
    """
    import cv2

    from splitters.tasks.preprocess import preprocess as to_input
    from splitters.zoo.detector import export_plain as detector
    from splitters.zoo.detector.network import PREPROCESS
    from splitters.zoo.efficientnet_lite0 import export_plain as efficientnet

    plain = {
        PLAIN: (efficientnet.calibrate, efficientnet.preprocess(), PLAIN_CODEC),
        DETECTOR_PLAIN: (detector.calibrate, PREPROCESS, detector.PLAIN_CODEC),
    }
    served = [name for name, file in published().items() if file.serve is not None]
    if what not in (*plain, *served):
        raise ConfigError(f"only {', '.join((*plain, *served))} have a plain latent to calibrate, not {what!r}")
    files = sorted(f for f in photos.rglob("*") if f.suffix.lower() in PHOTO_SUFFIXES)
    random.Random(seed).shuffle(files)  # noqa: S311 - a reproducible draw, no secret
    frames = [frame.astype(np.uint8, copy=False) for f in files[:count] if (frame := cv2.imread(str(f))) is not None]
    if not frames:
        raise SourceError(f"{photos} holds no readable photo")
    if what in served:
        from splitters.zoo.by_address import prepare

        prepare(what, frames)
        return
    calibrate, preprocess, path = plain[what]
    inputs = [to_input(frame, preprocess) for frame in frames]
    path.write_text(json.dumps(calibrate(iter(inputs))), encoding="utf-8")


def export(what: str, out: Path, measure: Measure | None = None) -> Bundle:
    """Writes the bundle ``what`` to ``out``; a default's, where ``--model NAME`` looks, as `ensure_exported` would.

    Args:
        what: a default's name, or the directory of a finished training.
        out: the bundle's directory.
        measure: measures the operating points of a training's bundle; a default's were measured when it was made.

    Raises:
        UnknownModelError: no default has that name.
        BundleError: a directory that holds no finished training.
        StorageError: ``out`` cannot be written.
    """
    if (Path(what) / "recipe.json").is_file():
        if measure is None:
            raise ConfigError(f"{what} is a training: its bundle's operating points have to be measured (`splitters export` does)")
        return _run(Path(what), out, measure)
    if what not in EXPORTERS and Path(what).is_dir():
        raise BundleError(f"{what} holds no finished training: `splitters train` with the same settings goes on to its last step")
    if what not in EXPORTERS:
        raise UnknownModelError(f"{what!r} is no default model; there are {', '.join(EXPORTERS)}, or give a bundle's directory")
    log.info("exporting %s to %s", what, out)
    bundle = EXPORTERS.get(what)(out)
    if out == exported_path(what):
        # Without it the next `--model NAME` would take the bundle for an old one; a server's image is built so, and read-only.
        _stamp(out).write_text(_source_sha256(), encoding="utf-8")
    return bundle


def ensure_exported(name: str) -> Path:
    """Where the default bundle ``name`` lies; exported now if it is absent, unreadable, or made by other code or weights.

    Processes that need it at the same time take turns, and the first makes it for all.

    Raises:
        UnknownModelError: no default has that name.
        StorageError: it cannot be written there.
    """
    path = exported_path(name)
    if not _why_export(name, path):
        return path
    if name not in EXPORTERS:
        export(name, path)  # raises: there is no such default
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f".{name}.lock")):
            if why := _why_export(name, path):  # no other process has made it meanwhile
                log.info("%s", why)
                export(name, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; default bundles go to $HEADTAIL_CACHE") from error
    return path


def _why_export(name: str, path: Path) -> str:
    """Why the default has to be exported now; empty: it lies there, sound and up to date."""
    stamp = _stamp(path)
    try:
        if not path.exists():
            return f"{name} is made for the first time; later starts find it in {path}"
        if open_bundle(path) and stamp.is_file() and stamp.read_text(encoding="utf-8") == _source_sha256():
            return ""
    except BundleError as error:
        return f"{error.message}; it is exported again"
    return f"{path} was exported by other code or weights; it is exported again"


def find(name_or_path: str | Path) -> Bundle:
    """A bundle, opened and verified: of a directory, or a default by its name.

    Raises:
        UnknownModelError: neither a directory nor a default's name.
        BundleError: the directory holds no sound bundle.
    """
    path = Path(name_or_path)
    return open_bundle(path if path.is_dir() else ensure_exported(str(name_or_path)))


def _stamp(path: Path) -> Path:
    """Beside an exported bundle: what it was made of."""
    return path.with_name(f"{path.name}.source")


def _source_sha256() -> str:
    """Changes with whatever a default bundle is made of: weights, models, codec, exporter."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    files = [
        f for room in ("zoo", "bottleneck", "exporting", "cutting", "codec", "tasks", "bundle") for f in (root / room).rglob("*")
    ]
    for file in sorted(f for f in files if f.is_file() and "__pycache__" not in f.parts):
        digest.update(sha256_file(file).encode())
    return digest.hexdigest()
