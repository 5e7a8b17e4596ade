"""EfficientNet-Lite0 in pieces, and its learned split: the default model's builder.

Cut after block 5 (80 x H/16 x W/16). Stem: the base's first convolution (32 x H/2 x W/2).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from splitters.bottleneck.bottleneck import Decoder, GainQuantiser, principal_start
from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, SmallEncoder, SmallEncoderConfig, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.bottleneck.narrow import narrow
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import prune_blocks

CUT_BLOCK = 5
C_CUT = 80
C_LATENT = 48
# Expansion channels kept in the device's own blocks: 30 % of the model's time instead of 39 %.
PRUNED = {1: 64, 2: 96, 3: 112, 4: 160, 5: 200}
TIERS = (
    Tier(name="s", runs=((0, 0.5),)),
    Tier(name="m", runs=((0, 1.0),)),
    Tier(name="l", runs=((0, 0.5), (1, 1.0))),
    Tier(name="own", runs=((2, 1.0),)),
)
# Residual blocks that the two small encoders grow when training goes on; the shipped ones have none.
DEEP = (3, 1)
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


def skeleton(
    pruned: nn.Sequential, base: StagedModel, steps: tuple[float, ...] = STEPS, deep: tuple[int, int] = (0, 0)
) -> LearnedSplit:
    """The student's modules around an already pruned own body; bottleneck and small encoders untrained."""
    small = SmallEncoderConfig(channels=(64, 128, 224), widths=(0.5, 1.0), deep=deep[0])
    middle = SmallEncoderConfig(channels=(64, 192), strides=(2, 2), kernels=(5, 5), depth=1, deep=deep[1], trunk=2)
    encoders = [
        SmallEncoder(small, 32, C_LATENT),
        SmallEncoder(middle, 24, C_LATENT, trunk=copy.deepcopy(pruned[:2])),
        OwnEncoder(pruned, C_CUT, C_LATENT),
    ]
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble(encoders, TIERS),
        GainQuantiser(C_LATENT, steps),
        Decoder(C_LATENT, C_CUT),
        copy.deepcopy(base.stages),
    )


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
        # Block 0 has no expansion: pruning leaves it alone.
        pruned = fuse_norms(prune_blocks(narrow(model.blocks[: CUT_BLOCK + 1], nn.Sequential), PRUNED, stem_map))
        cut = pruned(stem_map)
    pruned = narrow(pruned, nn.Sequential)
    student = skeleton(pruned, base)
    own = student.ensemble.encoders[2]
    own = narrow(own, OwnEncoder)
    spread = principal_start(own.project, student.decoder.linear, cut)
    with torch.no_grad():
        student.quantiser.prior_log_scale.add_(torch.log(spread.clamp_min(0.05)))
    return base, student
