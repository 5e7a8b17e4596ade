"""A trained bottleneck around any model, as a bundle: ONNX on both sides, the learned codec between them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from protos.errors import BundleError
from splitters.bottleneck.crossing import Gather
from splitters.bottleneck.learned import LearnedSplit
from splitters.bottleneck.learned_any import AnyCutConfig, FusedEncoder, TappedTail, build_any
from splitters.bottleneck.narrow import narrow
from splitters.bundle import Bundle, BundleWriter, Measure
from splitters.bundle.manifest import Head, parse_preprocess
from splitters.bundle.operating_point import load_points
from splitters.codec import learned_spec
from splitters.cutting.onnx_export import export_onnx, write_server
from splitters.cutting.sources import ModelSource, load_source
from splitters.exporting.learned import (
    POINTS_FILE,
    RECIPE_FILE,
    TABLES_FILE,
    TABLES_PART,
    WEIGHTS_FILE,
    Rung,
    exportable,
    gains_at,
    graph_name,
    operating_points,
    prices_at,
)


def _untapped(tail: TappedTail) -> fx.GraphModule:
    """The tail without the taps that only training reads."""
    graph = copy.deepcopy(tail.tapped.graph)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (output.args[0][1],)
    graph.eliminate_dead_code()
    return fx.GraphModule(tail.tapped, graph)


class _ServerPart(nn.Module):
    """Decoder and tail."""

    def __init__(self, student: LearnedSplit) -> None:
        super().__init__()
        (stage,) = student.stages
        stage = narrow(stage, TappedTail)
        self.decoder, self.tail = student.decoder, _untapped(stage)

    def forward(self, latent: Tensor) -> Any:
        """Maps the restored latent to what the model returns, floating-point tensors only."""
        outputs = self.tail(*self.decoder(latent))
        return tuple(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point())


def load_run(run: Path, model: str = "") -> tuple[ModelSource, LearnedSplit, dict[str, Any]]:
    """A finished run: its source model, the trained student and the recipe.

    Args:
        run: what `splitters train any` wrote.
        model: where the source model lies now; empty: where the recipe says.

    Raises:
        BundleError: the folder holds no finished run of this release.
    """
    try:
        recipe = json.loads((run / RECIPE_FILE).read_text(encoding="utf-8"))
        config = recipe["config"]
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["cut"].items()}
        cut = AnyCutConfig(**fields)
        size = (config["size_px"], config["size_px"])
        source = load_source(model or config["model"], weights=config["weights"], size_px=size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{run} holds no finished training: {error}; run splitters train to its end") from error
    example = torch.zeros(2, 3, *size)
    _, student = build_any(narrow(source.model, nn.Module), example, cut, None)
    load_weights(student, run)
    return source, student.eval(), recipe


def load_weights(student: LearnedSplit, run: Path) -> None:
    """Gives a student the trained weights of a run, in single precision.

    Raises:
        BundleError: the folder holds none, or those of another model, cut or latent.
    """
    try:
        state = load_file(run / WEIGHTS_FILE)
        missing, unknown = student.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False
        )
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{run} holds no finished training: {error}; run splitters train to its end") from error
    except RuntimeError as error:  # tensors of other sizes
        raise BundleError(f"{run / WEIGHTS_FILE} is of another bottleneck: {str(error).splitlines()[-1].strip()}") from error
    lost = [k for k in missing if not k.endswith("num_batches_tracked")]
    if lost or unknown:
        raise BundleError(f"{run / WEIGHTS_FILE} does not fit its recipe: missing {lost[:3]}, unknown {list(unknown)[:3]}")


def device_stem(student: LearnedSplit) -> nn.Module:
    """What runs before every encoder, and gives one map.

    Where the largest encoder has nothing of its own but the projection, its fusing of several tensors belongs here.
    """
    own = student.ensemble.encoders[-1]
    if isinstance(own, FusedEncoder) and isinstance(own.body, nn.Identity):
        return _FusedStem(student.stem, own.gather)
    return student.stem


def device_encoder(encoder: nn.Module, width: float) -> nn.Module:
    """An encoder at one width, from the map that ``device_stem`` gives to the latent."""
    if isinstance(encoder, FusedEncoder) and isinstance(encoder.body, nn.Identity):
        return encoder.project
    return exportable(encoder, width)


class _FusedStem(nn.Module):
    """A head whose crossing tensors leave as one map."""

    def __init__(self, stem: nn.Module, gather: Gather) -> None:
        super().__init__()
        self.stem, self.gather = stem, gather

    def forward(self, image: Tensor) -> Tensor:
        """Maps images to the fused map (N, F, h, w)."""
        crossed = self.stem(image)
        fused: Tensor = self.gather(*(crossed if isinstance(crossed, tuple) else (crossed,)))
        return fused


def export_run(run: Path, out: Path, *, measure: Measure | None = None, model: str = "", name: str = "") -> Bundle:
    """Writes the bundle of a finished run.

    Args:
        run: what `splitters train any` wrote.
        out: the bundle's directory.
        measure: measures the operating points where the run holds none.
        model: where the source model lies now; empty: where the recipe says.
        name: the bundle's; empty: the source model's.
    """
    source, student, recipe = load_run(run, model)
    config = recipe["config"]
    size = config["size_px"]
    image = torch.zeros(1, 3, size, size)
    stem = device_stem(student)
    with torch.no_grad():
        stem_map = stem(image)
        latent = student.latent(image, 0)
    rungs = [Rung(gain=r["gain"], channels=r["channels"]) for r in recipe["rungs"]]
    gains, ungains = gains_at(student, [r.gain for r in rungs])
    shape = tuple(latent.shape[1:])
    codec = learned_spec(
        shape=(shape[0], shape[1], shape[2]), gains=gains.numpy(), ungains=ungains.numpy(),
        points={f"r{i}": (i, r.channels) for i, r in enumerate(rungs)}, tables_path=TABLES_PART, prices=prices_at(rungs),
    )  # fmt: skip
    measured = run / POINTS_FILE
    points = load_points(measured.read_text(encoding="utf-8")) if measured.exists() else operating_points(student.ensemble, rungs)
    with BundleWriter(out) as writer:
        export_onnx(stem, [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["stem_map"])
        graphs = {}
        for index, width in dict.fromkeys(run for tier in student.ensemble.tiers for run in tier.runs):
            graph = graph_name(index, width)
            graphs[graph] = f"device/encoder_{graph}.onnx"
            module = device_encoder(student.ensemble.encoders[index], width)
            export_onnx(module, [stem_map], writer.file(graphs[graph], "device"), inputs=["stem_map"], outputs=["latent_0"])
        server = _ServerPart(student).eval()
        outputs = [f"output_{i}" for i, _ in enumerate(server(latent))]
        tail = write_server(writer, server, latent, narrow(source.model, nn.Module), image, outputs=outputs)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add(TABLES_PART, (run / TABLES_FILE).read_bytes(), "device")
        return writer.finish(
            points=points, measure=None if measured.exists() else measure, latent_shape=(shape,), codec="device/codec.json",
            head=Head(stem="device/stem.onnx", graphs=graphs), **_ends(name or source.name, recipe),
            tail=tail,
        )  # fmt: skip


def _ends(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's fields that say what a model is, what it takes and how its output is read.

    Raises:
        BundleError: the recipe holds no such fields.
    """
    told = recipe["config"].get("serving")
    if not told:
        raise BundleError("the run's recipe does not say how its model is served; train it again with this release")
    terms = "the training photographs' terms apply to the bottleneck"
    return {
        "name": name, "task": told["task"], "preprocess": parse_preprocess(told["preprocess"]),
        "postprocess": told["postprocess"], "labels": {int(k): str(v) for k, v in told["labels"].items()},
        "score_min": recipe.get("score_min"),
        "licence": f"{told.get('licence', 'that of the model')}; {terms}", "provenance": dict(recipe),
    }  # fmt: skip
