"""From a trained learned split to its shipped weights, and from those to a bundle.

Shape legend: N batch, images (N, 3, 224, 224), stem map (N, 32, 112, 112), latent (N, 48, 14, 14).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from protos.errors import BundleError
from splitters.bundle import Bundle, BundleWriter
from splitters.codec import learned_spec
from splitters.manifest import Head, LocalModel
from splitters.models.efficientnet_export import common_fields, write_local
from splitters.models.efficientnet_lite import DEFAULT_SIZE_PX, EfficientNetLite0, MBConv, load_efficientnet_lite0
from splitters.models.ensemble import EncoderEnsemble, OwnEncoder, Tier
from splitters.models.learned import LearnedSplit
from splitters.models.learned_efficientnet import C_LATENT, PRUNED, fuse_norms, skeleton, staged
from splitters.models.narrow import narrow
from splitters.models.slimmable import at_width, frozen_copy
from splitters.offload import offload_from_json
from splitters.onnx_export import export_onnx
from splitters.operating_point import OperatingPoint, load_points

WEIGHTS_FILE, TABLES_FILE, POINTS_FILE, RECIPE_FILE = "learned.safetensors", "tables.bin", "operating_points.json", "recipe.json"
CHOICES_FILE = "choices.json"
TABLES_PART = "device/tables.bin"
# The published stages of the tail are not stored again; only the first one is fine-tuned.
_TUNED = ("ensemble.", "quantiser.", "decoder.", "stages.0.")


def _hollow(block: MBConv, keep: int) -> None:
    """Gives a block ``keep`` expansion channels; its weights are to be loaded afterwards."""
    for layer in (narrow(block.expand, nn.Sequential), block.depthwise, block.project):
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


def blank_student(tiers: int, deep: tuple[int, int] = (0, 0)) -> LearnedSplit:
    """The student's modules with the published weights where it has them, the rest to be loaded.

    Args:
        tiers: how many gain tiers.
        deep: late residual blocks of the two small encoders.
    """
    model = load_efficientnet_lite0()
    blocks = narrow(copy.deepcopy(model.blocks[:6]), nn.Sequential)
    for index, keep in PRUNED.items():
        _hollow(narrow(blocks[index], MBConv), keep)
    fused = fuse_norms(blocks)
    fused = narrow(fused, nn.Sequential)
    return skeleton(fused, staged(model), steps=(1.0,) * tiers, deep=deep)


def tuned_state(student: LearnedSplit, *, everything: bool = False) -> dict[str, Tensor]:
    """What must be shipped beside the published weights (or ``everything``), half precision; whole numbers as they are."""
    state = student.state_dict()
    kept = {k: v for k, v in state.items() if (everything or k.startswith(_TUNED)) and not k.endswith("num_batches_tracked")}
    return {
        k: (v.clone() if k.startswith("quantiser.") or not v.is_floating_point() else v.half()).contiguous()
        for k, v in kept.items()
    }


def _deep(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many late residual blocks the small encoders of a state have."""
    first, second = (len({k.split(".")[4] for k in state if k.startswith(f"ensemble.encoders.{i}.deep.")}) for i in (0, 1))
    return first, second


def load_student(folder: Path, deep: tuple[int, int] | None = None) -> LearnedSplit:
    """The student from its shipped weights, float32, eval mode.

    Args:
        folder: with the weights.
        deep: give it at least so many late residual blocks, further ones being the identity.

    Raises:
        BundleError: the weights are absent or of another shape.
    """
    try:
        state = load_file(folder / WEIGHTS_FILE)
        found = _deep(state)
        first, second = (max(a, b) for a, b in zip(found, deep or found, strict=True))
        student = blank_student(len(state["quantiser.log_gain"]), (first, second))
        missing, unexpected = student.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except (OSError, KeyError, RuntimeError) as error:
        raise BundleError(f"{folder} holds no usable weights of the learned bottleneck: {error}") from error
    lost = [k for k in missing if k.startswith(_TUNED) and not k.endswith("num_batches_tracked") and ".deep." not in k]
    if lost or unexpected:
        raise BundleError(f"{folder / WEIGHTS_FILE} does not fit this release: missing {lost[:3]}, unknown {unexpected[:3]}")
    return student.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One setting of the bitrate knob: gains between two trained tiers, and channels kept.

    Attributes:
        gain: 0 (finest) … T - 1 (coarsest); fractions lie between two trained tiers.
        channels: leading channels that are sent.
        single_layer: its frames travel in one layer, without the bytes that a base layer of its own would take.
    """

    gain: float
    channels: int = C_LATENT
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


def operating_points(ensemble: EncoderEnsemble, rungs: Sequence[Rung]) -> list[OperatingPoint]:
    """One point for each tier and rung, not measured yet; the dearest and finest first."""
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
    last = twin.body[-1] if isinstance(twin.body, nn.Sequential) else None
    if not isinstance(last, MBConv) or last.residual:
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


def write_heads(writer: BundleWriter, student: LearnedSplit) -> Head:
    """Adds the stem and one graph for each encoder and width."""
    image = torch.zeros(1, 3, DEFAULT_SIZE_PX, DEFAULT_SIZE_PX)
    with torch.no_grad():
        stem_map = student.stem(image)
    export_onnx(student.stem, [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["stem_map"])
    graphs = {}
    for tier in student.ensemble.tiers:
        for index, width in tier.runs:
            name = graph_name(index, width)
            if name not in graphs:
                graphs[name] = f"device/encoder_{name}.onnx"
                module = exportable(student.ensemble.encoders[index], width)
                export_onnx(module, [stem_map], writer.file(graphs[name], "device"), inputs=["stem_map"], outputs=["latent_0"])
    return Head(stem="device/stem.onnx", graphs=graphs)


class LearnedTail(nn.Module):
    """The server's part: decoder, tail; and the base network for offloaded images.

    Args:
        student: whose decoder and stages it takes.
        network: the base network.
    """

    def __init__(self, student: LearnedSplit, network: EfficientNetLite0) -> None:
        super().__init__()
        self.decoder = student.decoder
        self.stages = student.stages
        self.network = network

    def forward(self, latent: Tensor) -> Tensor:
        """Maps the restored latent (N, C, 14, 14) to logits (N, 1000)."""
        x = self.decoder(latent)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = x
        return logits

    def whole(self, images: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, 1000), as published."""
        logits: Tensor = self.network(images)
        return logits


def build_learned_tail(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """``headtail:efficientnet-lite0-learned``, from a bundle's tensors."""
    network = EfficientNetLite0()
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    student = skeleton(narrow(copy.deepcopy(network.blocks[:6]), nn.Sequential), staged(network), steps=(1.0,) * int(spec["tiers"]))
    tail = LearnedTail(student, network.eval())
    tail.load_state_dict(dict(state))
    return tail


def read_choices(path: Path, local: LocalModel) -> dict[str, Any]:
    """What was measured of the base model's other choices, offload and ``local``; it does not depend on the bottleneck."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {"offloads": tuple(offload_from_json(o) for o in data["offloads"]), "local": replace(local, **data["local"])}


def export_learned(out: Path, weights: Path) -> Bundle:
    """Writes the learned bundle.

    Args:
        out: its directory.
        weights: folder with the shipped weights, tables, measured operating points and recipe.
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
    codec = learned_spec(
        shape=(C_LATENT, DEFAULT_SIZE_PX // 16, DEFAULT_SIZE_PX // 16), gains=gains.numpy(), ungains=ungains.numpy(),
        points={f"r{i}": (levels.index(r.gain), r.channels) for i, r in enumerate(rungs)}, tables_path=TABLES_PART,
        single_layer=[f"r{i}" for i, r in enumerate(rungs) if r.single_layer],
    )  # fmt: skip
    with BundleWriter(out) as writer:
        head = write_heads(writer, student)
        write_local(writer, network)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add(TABLES_PART, (weights / TABLES_FILE).read_bytes(), "device")
        learned = {f"decoder.{k}": v for k, v in student.decoder.state_dict().items()} | {
            f"stages.{k}": v for k, v in student.stages.state_dict().items()
        }
        save_file({k: v.contiguous().clone() for k, v in learned.items()}, writer.file("server/learned.safetensors", "server"))
        save_file(
            {f"network.{k}": v.contiguous().clone() for k, v in network.state_dict().items()},
            writer.file("server/network.safetensors", "server"),
        )
        return writer.finish(
            points=points, name="efficientnet-lite0", head=head,
            latent_shape=((C_LATENT, DEFAULT_SIZE_PX // 16, DEFAULT_SIZE_PX // 16),),
            tail={
                "kind": "torch", "factory": "headtail:efficientnet-lite0-learned", "tiers": len(student.quantiser.log_gain),
                "weights": ["server/learned.safetensors", "server/network.safetensors"],
                "base_weights": ["server/network.safetensors"],
            },
            **(common_fields() | choices), provenance=recipe,
        )  # fmt: skip
