"""Where a model to cut comes from: ``timm:name``, ``torchvision:name``, ``onnx:path``, ``py:module:factory`` or a ``.pt2``.

Shape legend: examples are (1, C, H, W).
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protos.errors import ConfigError, MissingDependencyError, ModelError, first_line
from splitters.bundle.manifest import Preprocess
from splitters.tasks.labels.imagenet import imagenet_labels

FORMS = "timm:NAME, torchvision:NAME, onnx:PATH, py:MODULE:FACTORY or a .pt2 file"
_INTERPOLATION = {"bilinear": "bilinear", "bicubic": "bicubic", "random": "bicubic"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found, with what is known of it.

    Attributes:
        name: short, fit for a bundle's name.
        model: in evaluation mode; a module or, of a ``.pt2``, an exported program.
        example: an input of the right shape (zeros).
        inputs: a factory's own example, where it is no float32 picture: a tensor, a tuple, or a dict of keyword arguments.
        preprocess: how a picture becomes that input; None where the source does not say.
        labels: class id → name; empty where unknown.
        weights: what its weights are, in words.
        check: compares the model with what it was converted from, on inputs with a batch of one, and raises ModelError where
            they differ; None where nothing was converted.
    """

    name: str
    model: nn.Module | torch.export.ExportedProgram
    example: Tensor
    preprocess: Preprocess | None
    labels: Mapping[int, str] = field(default_factory=dict)
    weights: str
    inputs: Any = None
    check: Callable[[Sequence[NDArray[np.float32]]], float] | None = None

    def module(self) -> nn.Module:
        """The model as a module that runs."""
        return self.model.module() if isinstance(self.model, torch.export.ExportedProgram) else self.model

    def check_takes_pictures(self) -> None:
        """Refuses a model whose input is not what headtail feeds it.

        Raises:
            ModelError: the example is no (N, 3, height, width) of float32.
        """
        shape, kind = tuple(self.example.shape), str(self.example.dtype).removeprefix("torch.")
        if len(shape) != 4 or shape[1] != 3 or self.example.dtype != torch.float32:
            raise ModelError(
                f"{self.name} takes {kind} of shape {shape}; headtail feeds a model colour pictures as float32 (N, 3, height, "
                "width): wrap it in a module that takes those and makes of them what it needs"
            )


def load_source(text: str, *, weights: str = "random", size_px: tuple[int, int] | None = None) -> ModelSource:
    """Finds the model called ``text``.

    Args:
        text: ``timm:name``, ``torchvision:name``, ``onnx:path``, ``py:module:factory`` or a path ending in ``.pt2``.
        weights: for timm and torchvision: ``random``, ``hub`` (fetched, where the machine can reach it) or the path of a
            safetensors file; for ``py:`` a safetensors file, else what the factory gives.
        size_px: (height, width) of the input, where the source's own is not wanted.

    Raises:
        ConfigError: the form is unknown, or the model's name is.
        MissingDependencyError: a package is not installed.
        ModelError: it was found but cannot be loaded.
    """
    kind, _, rest = text.partition(":")
    loaders: dict[str, Callable[[str, str, tuple[int, int] | None], ModelSource]] = {
        "timm": _timm, "torchvision": _torchvision, "onnx": _onnx, "py": _python,
    }  # fmt: skip
    if text.endswith(".pt2"):
        return _pt2(Path(text.removeprefix("pt2:")))
    if kind not in loaders or not rest:
        raise ConfigError(f"{text!r} names no model; write {FORMS}")
    return loaders[kind](rest, weights, size_px)


def _fill(model: nn.Module, weights: str) -> str:
    """Loads a safetensors file into the model, if one is given; says what the weights are."""
    if weights in {"random", "hub"}:
        return weights
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(weights), strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"the weights {weights} do not fit the model or cannot be read: {first_line(error)}") from error
    return Path(weights).name


def _example(size_px: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.zeros(1, channels, *size_px)


def _timm(name: str, weights: str, size_px: tuple[int, int] | None) -> ModelSource:
    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    try:
        import timm
        import timm.data
    except ModuleNotFoundError as error:
        raise MissingDependencyError("timm is not installed; install the extra: pip install 'headtail[zoo]'") from error
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise ConfigError(f"timm has no model {name!r}" + (f"; it has {close}" if close else ""))
    model: nn.Module = _fetch(lambda: timm.create_model(name, pretrained=weights == "hub"), f"timm:{name}", weights)
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined, no-untyped-call]
    size = size_px or tuple(config["input_size"][1:])
    labels = imagenet_labels() if getattr(model, "num_classes", 0) == 1000 else {}
    return ModelSource(
        name=name, model=model.eval(), example=_example(size, config["input_size"][0]), weights=_fill(model, weights),
        preprocess=_timm_preprocess(config, size), labels=labels,
    )  # fmt: skip


def _timm_preprocess(config: Mapping[str, Any], size_px: tuple[int, int]) -> Preprocess | None:
    """The evaluation transform that timm makes of a configuration; None for models that take no colour pictures."""
    if config["input_size"][0] != 3:
        return None
    height, width = (math.floor(side / (config.get("crop_pct") or 0.875)) for side in size_px)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    mode = config.get("crop_mode") or "center"
    how: dict[str, Any] = {"resize": "cover", "box_px": (height, width), "pad": 0}
    if mode == "squash":
        how["resize"] = "stretch"
    elif mode == "border":
        how |= {"resize": "letterbox", "anchor": "centre", "pad": tuple(round(255 * m) for m in mean)}
    elif height == width:
        how = {"resize": "shortest", "resize_px": height, "pad": 0}
    interpolation = _INTERPOLATION.get(config["interpolation"], "bicubic")
    return Preprocess(size_px=size_px, interpolation=interpolation, resampler="pillow", mean=mean, std=std, **how)  # type: ignore[arg-type]


def _torchvision(name: str, weights: str, size_px: tuple[int, int] | None) -> ModelSource:
    from splitters.cutting import torchvision_compat

    torchvision_compat.activate()
    from torchvision import models

    if name not in models.list_models():
        raise ConfigError(f"torchvision has no model {name!r}; python -c 'import torchvision' and models.list_models() list them")
    known = list(models.get_model_weights(name))
    best = models.get_model_weights(name).DEFAULT if known else None
    accepts = inspect.signature(models.get_model_builder(name)).parameters
    # A backbone's own weights would be fetched even with weights=None.
    keywords = {"weights_backbone": None} if weights != "hub" and "weights_backbone" in accepts else {}
    model: nn.Module = _fetch(
        lambda: models.get_model(name, weights=best if weights == "hub" else None, **keywords), f"torchvision:{name}", weights
    )
    recipe: Any = best.transforms() if best is not None else None
    labels = dict(enumerate(best.meta.get("categories", ()))) if best is not None else {}
    spec, size = None, size_px or (224, 224)
    if hasattr(recipe, "crop_size"):
        size = size_px or (recipe.crop_size[0],) * 2
        short = round(recipe.resize_size[0] * max(size) / recipe.crop_size[0])
        spec = Preprocess(
            resize="shortest", size_px=size, resize_px=max(*size, short), resampler="pillow", pad=0,
            interpolation=_INTERPOLATION.get(recipe.interpolation.value, "bilinear"),  # type: ignore[arg-type]
            mean=tuple(recipe.mean), std=tuple(recipe.std),
        )  # fmt: skip
    return ModelSource(
        name=name, model=model.eval(), example=_example(size), weights=_fill(model, weights), preprocess=spec, labels=labels
    )


def _fetch(create: Callable[[], nn.Module], name: str, weights: str) -> nn.Module:
    try:
        return create()
    except Exception as error:
        if weights == "hub":
            raise ModelError(
                f"the weights of {name} cannot be fetched ({type(error).__name__}: {first_line(error, 120)}); give "
                "--weights FILE.safetensors, or --weights random to look at costs alone"
            ) from error
        raise ModelError(f"{name} cannot be built: {type(error).__name__}: {first_line(error)}") from error


def _onnx(path: str, weights: str, size_px: tuple[int, int] | None) -> ModelSource:
    del weights, size_px  # an ONNX file brings its own
    from splitters.cutting.onnx_check import check_conversion
    from splitters.cutting.onnx_source import load_onnx

    found = load_onnx(Path(path))

    def check(pictures: Sequence[NDArray[np.float32]]) -> float:
        return check_conversion(Path(path), found.module, pictures, said=found.said)

    return ModelSource(
        name=Path(path).stem, model=found.module, example=found.example, preprocess=None, weights=Path(path).name, check=check
    )


def _python(text: str, weights: str, size_px: tuple[int, int] | None) -> ModelSource:
    module_name, _, factory_name = text.rpartition(":")
    if not module_name:
        raise ConfigError(f"py:{text} must be py:MODULE:FACTORY, for example py:mypackage.models:build")
    if os.getcwd() not in sys.path:  # noqa: PTH109  (sys.path holds strings)
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        factory: Any = importlib.import_module(module_name)
        for part in factory_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"py:{text} cannot be found: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported; some end with sys.exit
        raise ModelError(f"importing {module_name} raised {type(error).__name__}: {first_line(error)}") from error
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{factory_name}() of {module_name} raised {type(error).__name__}: {first_line(error)}") from error
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{factory_name}() must return an nn.Module, or one with an example input; got {type(model).__name__}")
    what = _fill(model, weights) if weights not in {"random", "hub"} else "the factory's"
    inputs = None
    if example is not None and not (
        isinstance(example, Tensor) and example.ndim == 4 and example.shape[1] in (1, 3) and example.dtype == torch.float32
    ):
        inputs = example
    if not isinstance(example, Tensor):
        example = _example(size_px or (224, 224))
    elif size_px is not None and example.ndim == 4:
        example = example.new_zeros((*example.shape[:2], *size_px))
    return ModelSource(name=factory_name, model=model.eval(), example=example, inputs=inputs, preprocess=None, weights=what)


def _pt2(path: Path) -> ModelSource:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} is no exported program this torch reads: {first_line(error)}") from error
    inputs = program.example_inputs
    if inputs is None or not inputs[0] or not isinstance(inputs[0][0], Tensor):
        raise ModelError(f"{path} holds no example input; export it again with torch.export.save")
    return ModelSource(name=path.stem, model=program, example=inputs[0][0].detach(), preprocess=None, weights=path.name)
