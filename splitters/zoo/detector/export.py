"""Our detector with its learned bottleneck as a bundle.

The device gets stem, encoders, prefilter and a local model, the server the tail and the whole network.

Shape legend: N batch; images (N, 3, 320, 320); stem map (N, 32, 160, 160); latent (N, 64, 20, 20); P positions, C = 80 classes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from splitters.bottleneck.learned import LearnedSplit
from splitters.bundle import Bundle, BundleWriter, Measure
from splitters.bundle.manifest import Head
from splitters.bundle.operating_point import load_points
from splitters.codec import learned_spec
from splitters.cutting.onnx_export import export_onnx, write_server
from splitters.exporting.learned import (
    CHOICES_FILE,
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
)
from splitters.zoo.detector.export_plain import CUT_BLOCK, SCORE_MIN, WholeDetector, common_fields, scored, shown_from, write_local
from splitters.zoo.detector.network import INPUT_SIZE_PX, WEIGHTS, load_detector
from splitters.zoo.detector.split import C_LATENT, LATENT_STRIDE, load_learned_detector
from splitters.zoo.detector.staged import joined
from splitters.zoo.efficientnet_lite0.export import read_choices
from splitters.zoo.prefilter.export import write_prefilter

FOLDER = WEIGHTS.parent / "learned"
LATENT_SHAPE = (C_LATENT, INPUT_SIZE_PX // LATENT_STRIDE, INPUT_SIZE_PX // LATENT_STRIDE)


class LearnedDetectorTail(nn.Module):
    """The server's part.

    Args:
        student: whose decoder and stages it takes.
    """

    def __init__(self, student: LearnedSplit) -> None:
        super().__init__()
        self.decoder, self.stages = student.decoder, student.stages

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Maps the restored latent to boxes (N, P, 4) xyxy in input pixels and scores (N, P, C)."""
        x: tuple[Tensor, ...] = self.decoder(latent)
        for stage in self.stages:
            x = stage(*x)
        return scored(joined(x))


def write_heads(writer: BundleWriter, student: LearnedSplit) -> Head:
    """Adds the stem, the prefilter on its map, and one graph for each encoder and width."""
    image = torch.zeros(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX)
    with torch.no_grad():
        stem_map = student.stem(image)
    export_onnx(student.stem, [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["stem_map"])
    graphs: dict[str, str] = {}
    for index, width in dict.fromkeys(run for tier in student.ensemble.tiers for run in tier.runs):
        name = graph_name(index, width)
        graphs[name] = f"device/encoder_{name}.onnx"
        module = exportable(student.ensemble.encoders[index], width)
        export_onnx(module, [stem_map], writer.file(graphs[name], "device"), inputs=["stem_map"], outputs=["latent_0"])
    return Head(
        stem="device/stem.onnx",
        graphs=graphs,
        prefilter=write_prefilter(writer, input_px=INPUT_SIZE_PX, detector=WEIGHTS, score_min=SCORE_MIN),
    )


def export_learned(out: Path, folder: Path = FOLDER, detector: Path = WEIGHTS, measure: Measure | None = None) -> Bundle:
    """Writes the bundle.

    Args:
        out: its directory.
        folder: with the bottleneck's weights, tables, recipe and, where there are any, measured operating points.
        detector: the weights it was trained around.
        measure: measures the operating points where the folder holds none.
    """
    network = load_detector(detector)
    _, student = load_learned_detector(folder / WEIGHTS_FILE, INPUT_SIZE_PX, network)
    recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    rungs = [Rung(gain=r["gain"], channels=r["channels"]) for r in recipe["rungs"]]
    levels = list(dict.fromkeys(r.gain for r in rungs))
    gains, ungains = gains_at(student, levels)
    measured = folder / POINTS_FILE
    points = load_points(measured.read_text(encoding="utf-8")) if measured.exists() else operating_points(student.ensemble, rungs)
    fields = common_fields()
    codec = learned_spec(
        shape=LATENT_SHAPE, gains=gains.numpy(), ungains=ungains.numpy(),
        points={f"r{i}": (levels.index(r.gain), r.channels) for i, r in enumerate(rungs)}, tables_path=TABLES_PART,
    )  # fmt: skip
    with BundleWriter(out) as writer:
        head = write_heads(writer, student)
        write_local(writer, network)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add(TABLES_PART, (folder / TABLES_FILE).read_bytes(), "device")
        tail = write_server(
            writer, LearnedDetectorTail(student).eval(), torch.zeros(1, *LATENT_SHAPE), WholeDetector(network).eval(),
            torch.zeros(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX), outputs=["boxes", "scores"],
        )  # fmt: skip
        return writer.finish(
            points=points, measure=None if measured.exists() else measure, name="detector", head=head, latent_shape=(LATENT_SHAPE,),
            tail=tail,
            **(fields | read_choices(folder / CHOICES_FILE, fields["local"])), score_min=shown_from(detector), provenance={
                "base": "EfficientNet-Lite0 backbone, light pyramid, trained here; see splitters/zoo/detector/weights/recipe.json",
                "cut": f"backbone.blocks.{CUT_BLOCK}", "bottleneck": recipe,
            },
        )  # fmt: skip
