"""EfficientNet-Lite0 in pieces, and its learned split: the default model's builder.

Cut after block 5 (80 x H/16 x W/16). Stem: the base's first convolution (32 x H/2 x W/2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from splitters.bottleneck.bottleneck import Decoder, GainQuantiser, principal_start
from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.bottleneck.narrow import narrow
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import prune_blocks

CUT_BLOCK = 5
C_CUT = 80
C_LATENT = 48
# Expansion channels kept in the device's own blocks: 30 % of the model's time instead of 39 %.
PRUNED = {1: 64, 2: 96, 3: 112, 4: 160, 5: 200}
# The cheaper encoders are the own blocks pruned further, which starts them far nearer to its latent than small networks of
# another build ever came at equal work; block 0 has no expansion and takes some of the stem's channels.
SLIM = (
    {0: 12, 1: 16, 2: 16, 3: 24, 4: 32, 5: 48},
    {0: 20, 1: 24, 2: 32, 3: 32, 4: 48, 5: 80},
    {0: 24, 1: 40, 2: 48, 3: 48, 4: 64, 5: 112},
)
TIERS = tuple(Tier(name=name, runs=((i, 1.0),)) for i, name in enumerate(("s", "m", "l", "own")))
STEPS = (4.0, 6.0, 9.0, 13.0, 19.0, 28.0)


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


def skeleton(bodies: Sequence[nn.Sequential], base: StagedModel, steps: tuple[float, ...] = STEPS) -> LearnedSplit:
    """The student's modules around its encoders' already pruned blocks, the own ones last; the bottleneck is untrained."""
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble([OwnEncoder(body, C_CUT, C_LATENT) for body in bodies], TIERS),
        GainQuantiser(C_LATENT, steps),
        Decoder(C_LATENT, C_CUT),
        copy.deepcopy(base.stages),
    )


@torch.no_grad()
def slim_from_own(own: OwnEncoder, stem_map: Tensor) -> list[OwnEncoder]:
    """The cheaper encoders, cheapest first: the own one's blocks pruned further, into the same latent.

    Args:
        own: the largest encoder, as far as it is trained; left as it was.
        stem_map: of sample photos (N, 32, H/2, W/2).
    """
    body = narrow(own.body, nn.Sequential)
    encoders = []
    for keep in SLIM:
        encoder = OwnEncoder(prune_blocks(body, keep, stem_map), C_CUT, C_LATENT)
        encoder.project = copy.deepcopy(own.project)
        encoders.append(encoder)
    return encoders


def build_learned_efficientnet(sample: Tensor) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and an untrained student.

    Args:
        sample: normalised photos (N, 3, 224, 224), some 64 to 128 of them, on which blocks are pruned and the latent's
            first basis is found.
    """
    model = load_efficientnet_lite0()
    base = staged(model)
    with torch.no_grad():
        stem_map = model.stem(sample)
        pruned = fuse_norms(prune_blocks(narrow(model.blocks[: CUT_BLOCK + 1], nn.Sequential), PRUNED, stem_map))
        cut = pruned(stem_map)
    pruned = narrow(pruned, nn.Sequential)
    student = skeleton([pruned] * len(TIERS), base)
    own = narrow(student.ensemble.encoders[-1], OwnEncoder)
    spread = principal_start(own.project, student.decoder.linear, cut)
    with torch.no_grad():
        student.quantiser.prior_log_scale.add_(torch.log(spread.clamp_min(0.05)))
    student.ensemble.encoders = nn.ModuleList([*slim_from_own(own, stem_map), own])
    return base, student
