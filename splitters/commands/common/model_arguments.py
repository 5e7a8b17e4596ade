"""What ``profile`` and ``cut`` share: the model's arguments, and a photograph to measure on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, SourceError
from splitters.bundle.manifest import Preprocess
from splitters.runtime.inputs import ARRAY_SUFFIXES, read_arrays
from splitters.runtime.pictures import read_picture
from splitters.tasks.preprocess import Frame, input_image

if TYPE_CHECKING:
    from splitters.cutting.onnx.inputs import Role
    from splitters.cutting.sources import ModelSource

JPEG_QUALITY = 90


def add_model_arguments(parser: argparse.ArgumentParser, *, weights: str, also: str = "") -> None:
    """MODEL, --weights and --size; ``also``: what else MODEL may be."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{also}timm:NAME, torchvision:NAME, onnx:PATH, py:MODULE:FACTORY or a .pt2 file"
    )
    parser.add_argument(
        "--weights", default=weights, metavar="random|hub|FILE",
        help="hub: fetched by timm or torchvision where this machine can reach it; FILE: safetensors (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--size", metavar="HxW", help="input size in pixels, where the model's own is not wanted")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--input and --example, of ONNX models that take other things than one picture."""
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=ROLE",
        help="ONNX: what an input takes: picture, previous (the picture before), clip (the last pictures), or raw (an array that "
        "comes with each frame); default: what its shape says. Once for each input",
    )  # fmt: skip
    parser.add_argument(
        "--example", type=Path, metavar="FILE|DIR",
        help="ONNX: values of raw inputs to cut with, by their names: .npz files, or .npy where there is one such input",
    )  # fmt: skip


def input_roles(args: argparse.Namespace) -> dict[str, Role]:
    """What --input says.

    Raises:
        ConfigError: it is no NAME=ROLE.
    """
    from splitters.cutting.onnx.inputs import ROLES

    found: dict[str, Role] = {}
    for text in args.input:
        name, _, role = str(text).rpartition("=")
        known = next((r for r in ROLES if r == role), None)
        if not name or known is None:
            raise ConfigError(f"--input must be NAME=ROLE with a role of {', '.join(ROLES)}, got {text!r}")
        found[name] = known
    return found


def read_examples(path: Path | None) -> list[dict[str, NDArray[Any]]]:
    """What --example holds, a frame each.

    Raises:
        SourceError: nothing of it can be read.
    """
    if path is None:
        return []
    files = sorted(f for f in path.iterdir() if f.suffix in ARRAY_SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"{path} holds no .npz or .npy files")
    return [read_arrays(f) for f in files]


def load_model(args: argparse.Namespace) -> ModelSource:
    """The model the arguments name.

    Raises:
        ConfigError: --size is no HxW.
    """
    from splitters.cutting.sources import load_source

    return load_source(args.model, weights=args.weights, size_px=model_size(args))


def model_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """(height, width) of --size; None where it is not given.

    Raises:
        ConfigError: it is no HxW.
    """
    if not args.size:
        return None
    height, _, width = str(args.size).partition("x")
    if not (height.isdecimal() and width.isdecimal() and 8 <= int(height) <= 8192 and 8 <= int(width) <= 8192):
        raise ConfigError(f"--size must be HxW in pixels, for example 224x224, 8..8192 each, got {args.size!r}")
    return (int(height), int(width))


def default_preprocess(source: ModelSource) -> Preprocess:
    """The source's own preprocessing, or ImageNet's mean and deviation at the example's size."""
    if source.preprocess is not None:
        return source.preprocess
    height, width = source.example.shape[-2:]
    return Preprocess(
        resize="shortest", size_px=(height, width), resize_px=max(round(min(height, width) * 8 / 7), height, width),
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip


def assume(source: ModelSource, spec: Preprocess) -> None:
    """Tells how pictures are prepared where the source does not say it."""
    scaled = {"letterbox": "fitted into", "shortest": f"scaled to a short side of {spec.resize_px} px and cropped to"}
    told = f"{scaled.get(spec.resize, 'scaled to')} {spec.size_px[0]}x{spec.size_px[1]} px"
    print(
        f"note: nothing says how {source.name} wants its pictures: they are {told}, with ImageNet's mean {spec.mean} and deviation "
        f"{spec.std}. If it was trained otherwise its answers will be wrong: give --preprocess FILE.json",
        file=sys.stderr,
    )


def sample_picture(path: Path | None, source: ModelSource) -> tuple[Frame, Preprocess, str, int]:
    """A photograph, the preprocessing, where the photograph is from, and its bytes as a JPEG at the model's size.

    Raises:
        SourceError: the file is no picture, or there is none and scikit-image, which ships one, is absent.
    """
    spec = default_preprocess(source)
    if source.preprocess is None:
        assume(source, spec)
    picture, where, jpeg_bytes = sample_of(path, spec)
    return picture, spec, where, jpeg_bytes


def sample_of(path: Path | None, spec: Preprocess) -> tuple[Frame, str, int]:
    """A photograph, where it is from, and its bytes as a JPEG once it is the model's input; see `sample_picture`."""
    if path is not None:
        picture, where = read_picture(path), str(path)
    else:
        try:
            from skimage import data
        except ModuleNotFoundError as error:
            raise SourceError("a photograph is needed to measure compressed bytes: give --image FILE") from error
        astronaut: Callable[[], Frame] = data.astronaut
        picture, where = np.ascontiguousarray(astronaut()[..., ::-1]), "scikit-image's astronaut (NASA, public domain)"
    _, jpeg = cv2.imencode(".jpg", input_image(picture, spec), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return picture, where, int(jpeg.size)
