"""What every exporter of a learned bottleneck writes: files of a run, settings of the bitrate knob, heads.

Shape legend: N batch, R settings of the knob, T gain tiers, C latent channels; images (N, 3, H, W), stem map (N, S, H0, W0).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, Tier
from splitters.bottleneck.learned import LearnedSplit
from splitters.bottleneck.narrow import narrow
from splitters.bottleneck.slimmable import at_width, frozen_copy
from splitters.bundle import BundleWriter
from splitters.bundle.manifest import Head
from splitters.bundle.operating_point import OperatingPoint
from splitters.codec.predicted.choice import DEFAULT_PRICE
from splitters.cutting.onnx_export import export_onnx

WEIGHTS_FILE, TABLES_FILE, POINTS_FILE, RECIPE_FILE = "learned.safetensors", "tables.bin", "operating_points.json", "recipe.json"
CHOICES_FILE = "choices.json"
TABLES_PART = "device/tables.bin"
# Trained in every case; of the tail, only the stages that were trained are stored.
TUNED = ("ensemble.", "quantiser.", "decoder.")


def tuned_state(student: LearnedSplit, *, published: Sequence[nn.Module] = (), everything: bool = False) -> dict[str, Tensor]:
    """What must be shipped beside the published weights (or ``everything``), half precision; whole numbers as they are.

    Args:
        student: trained.
        published: the uncut model's stages; those of the student's that equal them are not shipped.
        everything: keep it all.
    """
    state = student.state_dict()
    same = tuple(f"stages.{i}." for i, own in enumerate(published) if _equal(student.stages[i], own))
    parts = (*TUNED, *(f"stages.{i}." for i in range(len(student.stages) - 1)))
    kept = {k: v for k, v in state.items() if everything or (k.startswith(parts) and not k.startswith(same))}
    return {
        k: (v.clone() if k.startswith("quantiser.") or not v.is_floating_point() else v.half()).contiguous()
        for k, v in kept.items()
        if not k.endswith("num_batches_tracked")
    }


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k].to(v.device)) for k, v in mine.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One setting of the bitrate knob: gains between two trained tiers, and channels kept.

    Attributes:
        gain: 0 (finest) … T - 1 (coarsest); fractions lie between two trained tiers.
        channels: leading channels that are sent.
        single_layer: its frames travel in one layer, without the bytes that a base layer of its own would take.
    """

    gain: float
    channels: int
    single_layer: bool = False


def gains_at(student: LearnedSplit, rungs: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Gains and inverse gains (R, C), geometric between the trained tiers (continuous bitrate, Cui et al. 2021)."""
    rows = []
    for log in (student.quantiser.log_gain.detach(), student.quantiser.log_ungain.detach()):
        low = [min(int(r), len(log) - 1) for r in rungs]
        high = [min(i + 1, len(log) - 1) for i in low]
        share = torch.tensor([r - i for r, i in zip(rungs, low, strict=True)])[:, None]
        rows.append((log[low] * (1 - share) + log[high] * share).exp())
    return rows[0], rows[1]


def graph_name(index: int, width: float) -> str:
    """Name of one encoder's graph at one width."""
    return f"e{index}w{round(width * 100)}"


def tier_graphs(tier: Tier) -> tuple[str, ...]:
    """The graphs a tier runs and sums."""
    return tuple(graph_name(i, w) for i, w in tier.runs)


def prices_at(rungs: Sequence[Rung]) -> dict[str, float]:
    """What a bit of a predicted frame is worth to each rung's codec point, in squared quantiser steps.

    Twice the codec's default, but at the coarsest gain. Measured with YOLOX-nano on five clips: a finer tier at the higher price
    takes fewer bytes than a coarser one at the default, at equal detections; at the coarsest there is nothing left to leave out.
    """
    last = max(r.gain for r in rungs)
    return {f"r{i}": DEFAULT_PRICE * (1 + min(1.0, last - r.gain)) for i, r in enumerate(rungs)}


def operating_points(ensemble: EncoderEnsemble, rungs: Sequence[Rung]) -> list[OperatingPoint]:
    """One point for each tier and rung, not measured yet; the largest and finest first."""
    points: list[OperatingPoint] = []
    for tier in reversed(ensemble.tiers):
        for number, rung in enumerate(rungs):
            bits = max(0.5, 5.0 - 0.5 * rung.gain)
            points.append(
                OperatingPoint(
                    id=len(points), encoders=len(tier.runs), width=max(w for _, w in tier.runs), channels=rung.channels, bits=bits,
                    codec_point=f"r{number}", graphs=tier_graphs(tier),
                )
            )  # fmt: skip
    return points


def exportable(encoder: nn.Module, width: float) -> nn.Module:
    """An encoder at one width as plain layers; the own encoder's last two linear layers become one."""
    if not isinstance(encoder, OwnEncoder):
        with at_width(encoder, width):
            return frozen_copy(encoder).eval()
    twin = copy.deepcopy(encoder).eval()
    last: Any = twin.body[-1] if isinstance(twin.body, nn.Sequential) else None
    if not isinstance(getattr(last, "project", None), nn.Sequential) or getattr(last, "residual", True):
        return twin
    inner, outer = narrow(last.project[0], nn.Conv2d), twin.project
    inner_bias, outer_bias = narrow(inner.bias, nn.Parameter), narrow(outer.bias, nn.Parameter)
    merged = nn.Conv2d(inner.in_channels, outer.out_channels, 1)
    weight = outer.weight[:, :, 0, 0]
    merged.weight.data = (weight @ inner.weight[:, :, 0, 0])[:, :, None, None].detach().contiguous()
    narrow(merged.bias, nn.Parameter).data = (weight @ inner_bias + outer_bias).detach()
    last.project = nn.Sequential(merged)
    twin.project = nn.Identity()  # type: ignore[assignment]
    return twin


def write_heads(
    writer: BundleWriter, student: LearnedSplit, size_px: int, front: Callable[[nn.Module, nn.Module], nn.Module]
) -> Head:
    """Adds one graph for each encoder and width, each from the picture on; what the manifest calls stem hands the picture on.

    A stem of its own costs an encoder nothing where only one encoder runs on a frame: in one graph the runtime keeps its blocked
    layout, and the stem computes no channel that the encoder does not read.

    Args:
        writer: of the bundle.
        student: whose stem and encoders they are.
        size_px: side of the input, which is square.
        front: stem and exportable encoder to a module from image to latent.
    """
    image = torch.zeros(1, 3, size_px, size_px)
    export_onnx(nn.Identity(), [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["picture"])
    graphs = {}
    for tier in student.ensemble.tiers:
        for index, width in tier.runs:
            name = graph_name(index, width)
            if name not in graphs:
                graphs[name] = f"device/encoder_{name}.onnx"
                module = front(student.stem, exportable(student.ensemble.encoders[index], width))
                export_onnx(module, [image], writer.file(graphs[name], "device"), inputs=["picture"], outputs=["latent_0"])
    return Head(stem="device/stem.onnx", graphs=graphs)
