"""What `splitters` does, for programs: split, profile, train, export, evaluate, load.

Each call does what the command of its name does and returns what that prints; none prints, asks or ends the process. What is
wrong with an argument, a model or a file is a `HeadtailError` (`protos.errors`). torch is imported by the call that needs it,
and not by ``import splitters``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from splitters.bundle import Bundle
    from splitters.cutting.graph.split import Split
    from splitters.evaluation.report import Report
    from splitters.profiling.table import Profile
    from splitters.runtime.whole import BundleModel
    from splitters.training.config import TrainConfig
    from splitters.training.loop import StepReport
    from splitters.training.run import Trained

__all__ = ["evaluate", "export", "load", "profile", "split", "train"]


def split(model: nn.Module | ExportedProgram | str, at: str, example_inputs: Any = None, *, weights: str = "hub") -> Split:
    """Cuts a model after ``at`` into a head for the device and a tail for the server.

        halves = splitters.split(model, at="layer2", example_inputs=torch.rand(1, 3, 224, 224))
        halves.verify(images)  # refuses a cut that is not the same function
        answer = halves.tail(*halves.head(images))

    Args:
        model: a module, an exported program, or a name: ``timm:NAME``, ``torchvision:NAME``, ``onnx:PATH``, ``py:MODULE:FACTORY``.
        at: the submodule, or graph node, after which to cut; `profile` lists them.
        example_inputs: a tensor or tuple of tensors, batch axis first; None: of a model by name, its own input.
        weights: of a model by name: ``hub``, ``random`` or a safetensors file.

    Raises:
        CutError: the model has no graph, or no cut of that name.
        ConfigError: the name names no model, or a module comes without example inputs.
    """
    from splitters.cutting.graph.split import split as cut

    found, example, _ = _found(model, example_inputs, weights)
    return cut(found, at, example)


def profile(
    model: nn.Module | ExportedProgram | str,
    example_inputs: Any = None,
    *,
    name: str = "",
    weights: str = "random",
    picture: Path | str | None = None,
    picture_bytes: int | None = None,
    budget_s: float = 20.0,
) -> Profile:
    """Measures what every cut of a model would cost, on this machine and one thread.

        table = splitters.profile("timm:mobilenetv3_large_100")
        print(table)
        table.best(bitrate_bps=5e6, rtt_ms=30, device_slowdown=8)

    Args:
        model: as for `split`.
        example_inputs: a real, preprocessed picture; None: of a model by name, ``picture`` as the model takes it.
        name: how the table calls the model.
        weights: of a model by name.
        picture: a photograph's file, for a model by name (default: scikit-image's astronaut).
        picture_bytes: what sending the picture would cost (default: of a model by name, its JPEG at quality 90).
        budget_s: time for the latency measurements; rows that do not fit are interpolated and say so.

    Raises:
        CutError: the model cannot be traced or has no cut.
        ConfigError: the name names no model, or a module comes without example inputs.
    """
    from splitters.profiling.measure import profile as measure

    if isinstance(model, str) and example_inputs is None:
        import torch

        from splitters.commands.common.model_arguments import default_preprocess, sample_of
        from splitters.cutting.sources import load_source
        from splitters.tasks.preprocess import preprocess

        source = load_source(model, weights=weights)
        source.check_takes_pictures()
        spec = default_preprocess(source)
        frame, _, jpeg_bytes = sample_of(Path(picture) if picture is not None else None, spec)
        found, example = source.model, torch.from_numpy(preprocess(frame, spec))
        called, picture_bytes = source.name, picture_bytes or jpeg_bytes
    else:
        found, example, called = _found(model, example_inputs, weights)
    return measure(found, example, name=name or called, picture_bytes=picture_bytes, budget_s=budget_s)


def _found(model: Any, example_inputs: Any, weights: str) -> tuple[Any, Any, str]:
    if not isinstance(model, str):
        if example_inputs is None:
            from protos.errors import ConfigError

            raise ConfigError("a module needs example_inputs: a tensor, or a tuple of tensors, with the batch axis first")
        return model, example_inputs, ""
    from splitters.cutting.sources import load_source

    source = load_source(model, weights=weights)
    return source.model, source.example if example_inputs is None else example_inputs, source.name


def train(
    recipe: str | TrainConfig,
    data: Path | str,
    out: Path | str,
    *,
    device: str = "cpu",
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Trained:
    """Trains a slimmable bottleneck from a folder of photographs; the same call goes on where the last one was stopped.

        run = splitters.train("any", "photos/", "run", model="timm:resnet18", at="layer2", steps=600)
        bundle = splitters.export("run", "my-bundle")

    Args:
        recipe: ``efficientnet-lite0``, ``any`` (with ``model`` and ``at``) or another that `splitters train` knows; or a whole
            configuration.
        data: the photographs; labels are not needed.
        out: the run's directory.
        device: ``cpu`` or ``cuda``.
        on_step: told of every step.
        stop: asked before every step; True saves and returns, with `Trained.complete` False.
        options: of `splitters train` by name, with _ for -: ``steps``, ``batch``, ``hold_out``, ``task``, ``output``, ``fit``, ….

    Raises:
        ConfigError: an option is unknown or out of range, or ``out`` holds a run with other settings.
        SourceError: there are no photographs.
    """
    from splitters.training.run import run_training

    fit = options.pop("fit", None)
    if isinstance(recipe, str):
        from splitters.commands.train import settings

        recipe = settings(recipe, Path(data), **options)
    return run_training(
        recipe, Path(data), Path(out), device=device, on_step=on_step, stop=stop, **({"fit": fit} if fit is not None else {})
    )


def export(what: str | Path, out: Path | str | None = None, *, photos: Path | str | None = None) -> Bundle:
    """Writes a default model's bundle, or a finished training's.

        bundle = splitters.export("detector", "my-bundle")
        print(bundle.sha256, [point.payload_bytes.p50 for point in bundle.points])

    Args:
        what: a default's name, or the directory of a finished training.
        out: the bundle's directory (default: where ``--model NAME`` looks).
        photos: a training's operating points are measured on these (default: on those it held out).

    Raises:
        UnknownModelError: no default has that name.
        BundleError: the directory holds no finished training.
    """
    from splitters.bundle import exported_path
    from splitters.commands.export import photos_for
    from splitters.runtime.table import measure_table
    from splitters.zoo.defaults import export as write

    def measure(bundle: Bundle) -> Any:
        return measure_table(bundle, photos_for(Path(what), Path(photos) if photos is not None else None))

    return write(str(what), Path(out) if out is not None else exported_path(Path(what).name), measure)


def evaluate(
    bundle: str | Path,
    images: Path | str,
    *,
    labels: Path | str | None = None,
    against: Sequence[str] = ("jpeg", "webp", "avif"),
    limit: int | None = None,
    draws: int = 1000,
    write: bool = False,
) -> Report:
    """Measures accuracy against real payload bytes at every operating point, beside image codecs feeding the same model.

        report = splitters.evaluate("detector", "val/", labels="instances.json")
        print(report.bd_rates["all tiers"]["jpeg"])

    Args:
        bundle: a bundle's directory, or a default's name.
        images: folder of photographs.
        labels: JSON of path to class, or a COCO instances.json; None: agreement with the whole model.
        against: image codecs to compare with; empty: none.
        limit: at most this many photographs, evenly spread.
        draws: of the bootstrap.
        write: whether the bundle's operating-point table is rewritten with what was measured.

    Raises:
        SourceError: there are no photographs.
        ConfigError: labels are at odds with model or photographs, or codecs were asked for and the bundle has no whole model.
    """
    from splitters.bundle import cache_dir
    from splitters.evaluation.run import EvaluateConfig, rewrite
    from splitters.evaluation.run import evaluate as measure
    from splitters.zoo.defaults import find

    config = EvaluateConfig(
        images=Path(images), labels=Path(labels) if labels is not None else None, against=tuple(against), limit=limit,
        cache=cache_dir() / "evaluations", draws=draws,
    )  # fmt: skip
    found = find(bundle)
    report = measure(found, config)
    if write:
        rewrite(found, report)
    return report


def load(bundle: str | Path, *, device: str = "cpu") -> BundleModel:
    """Opens a bundle to run it whole in this process: head, codec and tail.

        model = splitters.load("detector")
        done = model(frame)  # (height, width, 3) uint8, blue first, as OpenCV reads pictures
        print(done.answer, done.payload_bytes)

    Args:
        bundle: a bundle's directory, or a default's name.
        device: torch's, for tails that are torch.

    Raises:
        UnknownModelError: neither a directory nor a default's name.
        BundleError: the directory holds no sound bundle.
    """
    from splitters.runtime.whole import BundleModel
    from splitters.zoo.defaults import find

    return BundleModel(find(bundle), device=device)
