"""From a trained learned split to its shipped weights, and from those to a bundle.

Shape legend: N batch, images (N, 3, 224, 224), stem map (N, 32, 112, 112), latent (N, 48, 14, 14).
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from protos.errors import BundleError
from splitters.bottleneck.learned import LearnedSplit
from splitters.bottleneck.narrow import narrow
from splitters.bundle import Bundle, BundleWriter, Measure
from splitters.bundle.manifest import LocalModel
from splitters.bundle.offload import offload_from_json
from splitters.bundle.operating_point import load_points
from splitters.codec import learned_spec
from splitters.cutting.onnx_export import write_server
from splitters.exporting.learned import (
    CHOICES_FILE,
    POINTS_FILE,
    RECIPE_FILE,
    TABLES_FILE,
    TABLES_PART,
    TUNED,
    WEIGHTS_FILE,
    Rung,
    gains_at,
    operating_points,
    write_heads,
)
from splitters.zoo.efficientnet_lite0.export_plain import common_fields, write_local
from splitters.zoo.efficientnet_lite0.network import DEFAULT_SIZE_PX, MBConv, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import Pick
from splitters.zoo.efficientnet_lite0.split import C_LATENT, OWN, SLIM, fuse_norms, skeleton, staged


def _hollow(block: MBConv, keep: int) -> None:
    """Gives a block ``keep`` expansion channels; its weights are to be loaded afterwards."""
    layers = [block.depthwise, block.project]
    if isinstance(block.expand, nn.Identity):
        block.expand = Pick(torch.arange(keep))
    else:
        layers.append(narrow(block.expand, nn.Sequential))
    for layer in layers:
        conv, norm = layer[0], layer[1]
        conv = narrow(conv, nn.Conv2d)
        norm = narrow(norm, nn.BatchNorm2d)
        if layer is block.project:
            conv.in_channels, conv.weight.data = keep, conv.weight.data[:, :keep].clone()
            continue
        conv.out_channels, conv.weight.data = keep, conv.weight.data[:keep].clone()
        if layer is block.depthwise:
            conv.in_channels = conv.groups = keep
        norm.num_features = keep
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data = getattr(norm, name).data[:keep].clone()


def blank_student(tiers: int) -> LearnedSplit:
    """The student's modules with the published weights where it has them, the rest to be loaded.

    Args:
        tiers: how many gain tiers.
    """
    model = load_efficientnet_lite0()
    bodies = []
    for kept in (*SLIM, OWN):
        blocks = narrow(copy.deepcopy(model.blocks[:6]), nn.Sequential)
        for index, keep in kept.items():
            _hollow(narrow(blocks[index], MBConv), keep)
        bodies.append(narrow(fuse_norms(blocks), nn.Sequential))
    return skeleton(bodies, staged(model), steps=(1.0,) * tiers)


def load_student(folder: Path) -> LearnedSplit:
    """The student from its shipped weights, float32, eval mode.

    Args:
        folder: with the weights.

    Raises:
        BundleError: the weights are absent or of another shape.
    """
    try:
        state = load_file(folder / WEIGHTS_FILE)
        student = blank_student(len(state["quantiser.log_gain"]))
        floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        missing, unexpected = student.load_state_dict(floats, strict=False)
    except (OSError, KeyError, RuntimeError) as error:
        raise BundleError(f"{folder} holds no usable weights of the learned bottleneck: {error}") from error
    lost = [k for k in missing if k.startswith(TUNED)]
    if lost or unexpected:
        raise BundleError(f"{folder / WEIGHTS_FILE} does not fit this release: missing {lost[:3]}, unknown {unexpected[:3]}")
    return student.eval()


def with_stem(stem: nn.Module, encoder: nn.Module) -> nn.Module:
    """Image to latent: the stem, without the channels that the encoder does not read, and the encoder."""
    own, blocks = copy.deepcopy(stem), narrow(encoder.body, nn.Sequential)
    first = narrow(blocks[0], MBConv)
    if isinstance(first.expand, Pick):
        conv, kept = narrow(narrow(own, nn.Sequential)[0], nn.Conv2d), first.expand.kept
        conv.out_channels, conv.weight.data = len(kept), conv.weight.data[kept].clone()
        bias = narrow(conv.bias, nn.Parameter)
        bias.data = bias.data[kept].clone()
        first.expand = nn.Identity()
    return nn.Sequential(own, encoder)


class LearnedTail(nn.Module):
    """The server's part.

    Args:
        student: whose decoder and stages it takes.
    """

    def __init__(self, student: LearnedSplit) -> None:
        super().__init__()
        self.decoder = student.decoder
        self.stages = student.stages

    def forward(self, latent: Tensor) -> Tensor:
        """Maps the restored latent (N, C, 14, 14) to logits (N, 1000)."""
        x = self.decoder(latent)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = x
        return logits


def read_choices(path: Path, local: LocalModel) -> dict[str, Any]:
    """What was measured of the base model's other choices, offload and ``local``; it does not depend on the bottleneck."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {"offloads": tuple(offload_from_json(o) for o in data["offloads"]), "local": replace(local, **data["local"])}


def export_learned(out: Path, weights: Path, measure: Measure | None = None) -> Bundle:
    """Writes the learned bundle.

    Args:
        out: its directory.
        weights: folder with the shipped weights, tables, recipe and, where there are any, measured operating points.
        measure: measures the operating points where the folder holds none.
    """
    student = load_student(weights)
    network = load_efficientnet_lite0()
    recipe = json.loads((weights / RECIPE_FILE).read_text(encoding="utf-8"))
    rungs = [Rung(**r) for r in recipe["rungs"]]
    levels = list(dict.fromkeys(r.gain for r in rungs))
    gains, ungains = gains_at(student, levels)
    measured = weights / POINTS_FILE
    points = load_points(measured.read_text(encoding="utf-8")) if measured.exists() else operating_points(student.ensemble, rungs)
    choices = read_choices(weights / CHOICES_FILE, common_fields()["local"])
    shape = (C_LATENT, DEFAULT_SIZE_PX // 16, DEFAULT_SIZE_PX // 16)
    codec = learned_spec(
        shape=shape, gains=gains.numpy(), ungains=ungains.numpy(),
        points={f"r{i}": (levels.index(r.gain), r.channels) for i, r in enumerate(rungs)}, tables_path=TABLES_PART,
        single_layer=[f"r{i}" for i, r in enumerate(rungs) if r.single_layer],
    )  # fmt: skip
    with BundleWriter(out) as writer:
        head = write_heads(writer, student, DEFAULT_SIZE_PX, with_stem)
        write_local(writer, network)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add(TABLES_PART, (weights / TABLES_FILE).read_bytes(), "device")
        tail = write_server(
            writer, LearnedTail(student).eval(), torch.zeros(1, *shape), network.eval(),
            torch.zeros(1, 3, DEFAULT_SIZE_PX, DEFAULT_SIZE_PX), outputs=["logits"],
        )  # fmt: skip
        return writer.finish(
            points=points, measure=None if measured.exists() else measure, name="efficientnet-lite0", head=head,
            latent_shape=(shape,), tail=tail,
            **(common_fields() | choices), provenance=recipe,
        )  # fmt: skip
