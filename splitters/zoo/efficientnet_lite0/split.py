"""EfficientNet-Lite0 in pieces, and its learned split: the default model's builder.

Cut after block 5 (80 x H/16 x W/16). Stem: the base's first convolution (32 x H/2 x W/2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from splitters.bottleneck.bottleneck import Decoder, GainQuantiser
from splitters.bottleneck.crossing import Crossing, Gather
from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.bottleneck.narrow import narrow
from splitters.bottleneck.sensitivity import output_metric, sensitive_start
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import prune_blocks

CUT_BLOCK = 5
C_CUT = 80
C_LATENT = 48
# Expansion channels kept in the device's own blocks; of block 0, which has no expansion, channels of the stem's map. ONNX Runtime
# computes sixteen channels at a time, so that fewer than a multiple of them cost as much.
OWN = {1: 64, 2: 112, 3: 128, 4: 192, 5: 224}
SLIM = (
    {0: 16, 1: 16, 2: 16, 3: 32, 4: 32, 5: 48},
    {0: 16, 1: 32, 2: 32, 3: 48, 4: 64, 5: 96},
    {1: 48, 2: 48, 3: 48, 4: 64, 5: 112},
)
TIERS = tuple(Tier(name=name, runs=((i, 1.0),)) for i, name in enumerate(("s", "m", "l", "own")))
_METRIC_PHOTOS = 48


def fuse_norms(module: nn.Module) -> nn.Module:
    """A copy in eval mode with every convolution + batch norm pair of a ``Sequential`` made one convolution."""
    fused = copy.deepcopy(module).eval()
    for layer in fused.modules():
        if isinstance(layer, nn.Sequential) and len(layer) > 1:
            conv, norm = layer[0], layer[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                layer[0] = fuse_conv_bn_eval(conv, norm)
                layer[1] = nn.Identity()
    return fused


def staged(model: EfficientNetLite0) -> StagedModel:
    """The base model in pieces, matched after blocks 10 and 15 and at the logits; norms fused."""
    base = fuse_norms(model)
    base = narrow(base, EfficientNetLite0)
    return StagedModel(
        stem=base.stem,
        body=base.blocks[: CUT_BLOCK + 1],
        stages=(
            base.blocks[CUT_BLOCK + 1 : 11],
            base.blocks[11:16],
            nn.Sequential(base.features, base.pool, nn.Flatten(1), base.classifier),
        ),
    )


def skeleton(bodies: Sequence[nn.Sequential], base: StagedModel, steps: tuple[float, ...]) -> LearnedSplit:
    """The student's modules around its encoders' already pruned blocks, the own ones last; the bottleneck is untrained."""
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble([OwnEncoder(body, C_CUT, C_LATENT) for body in bodies], TIERS),
        GainQuantiser(C_LATENT, steps),
        Decoder(C_LATENT, C_CUT),
        copy.deepcopy(base.stages),
    )


def build_learned_efficientnet(sample: Tensor, target_bytes: Sequence[float]) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and an untrained student, whose every part starts near its goal.

    Each encoder is the model's own blocks, pruned to its size by least squares; the latent's basis is what the model's answer
    feels most, and the tail is the model's own. So the largest encoder answers nearly as the whole model before any training.

    Args:
        sample: normalised photos (N, 3, H, W), some 64 to 128 of them.
        target_bytes: estimated payload each gain tier aims at, finest first.
    """
    base = staged(load_efficientnet_lite0())
    with torch.no_grad():
        stem_map = base.stem(sample)
        body = narrow(base.body, nn.Sequential)
        student = skeleton([prune_blocks(body, keep, stem_map) for keep in (*SLIM, OWN)], base, (1.0,) * len(target_bytes)).eval()
        own = narrow(student.ensemble.encoders[-1], OwnEncoder)
        whole, pruned = body(stem_map), own.body(stem_map)
    grid = (whole.shape[2], whole.shape[3])
    gather = Gather([Crossing(layout="chw", channels=C_CUT, height=grid[0], width=grid[1])], grid)
    sensitive_start(own.project, student.decoder.linear, pruned, output_metric(base, [whole[:_METRIC_PHOTOS]], gather))
    for encoder in student.ensemble.encoders:
        narrow(encoder, OwnEncoder).project.load_state_dict(own.project.state_dict())
    with torch.no_grad():
        student.quantiser.aim(own.project(pruned), [8 * b for b in target_bytes])
    return base, student
