"""Our detector's learned split: cut after block 4, a latent a sixteenth of the input, three encoders to choose from.

Shape legend: N batch; images (N, 3, S, S), S 320 at work; stem map (N, 32, S / 2, S / 2); cut tensor (N, 40, S / 8, S / 8),
2 x 2 of its cells folded into channels, (N, 160, S / 16, S / 16); latent (N, 64, S / 16, S / 16).

The largest encoder is the detector's own first blocks, as they are: they never trained with the detector, so a bottleneck fits
any detector trained around the same blocks. The cheaper two are the same blocks with fewer expansion channels, chosen and solved
again by least squares (`splitters.zoo.efficientnet_lite0.pruning`), and a residual block that learns to make up for the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from protos.errors import BundleError
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.bottleneck.crossing import Crossing, Gather
from splitters.bottleneck.ensemble import EncoderEnsemble, SmallEncoder, SmallEncoderConfig, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.bottleneck.learned_any import FusedDecoder, FusedEncoder
from splitters.bottleneck.narrow import narrow
from splitters.bottleneck.sensitivity import output_metric, sensitive_start
from splitters.zoo.detector.network import TAP_CHANNELS, TAPS, Detector, load_detector
from splitters.zoo.detector.staged import staged_detector
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0, MBConv, conv_bn, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import prune_blocks
from splitters.zoo.efficientnet_lite0.split import fuse_norms

C_LATENT = 64
CUT_STRIDE, LATENT_STRIDE = 8, 16
LIGHT = SmallEncoderConfig(channels=(), strides=(), kernels=(), depth=0, deep=1, trunk=TAPS[0] + 1)
# Expansion channels kept in blocks 1 to 4 (of 96, 144, 144, 240): 11 and 18 % of the detector's work instead of 26 %.
KEPT = ({1: 24, 2: 32, 3: 40, 4: 64}, {1: 56, 2: 84, 3: 92, 4: 140})
TIERS = (
    Tier(name="s", runs=((0, 1.0),)),
    Tier(name="m", runs=((1, 1.0),)),
    Tier(name="own", runs=((2, 1.0),)),
)
DECODER_WIDTH, DECODER_DEPTH = 96, 2
_CHUNK, _METRIC_PHOTOS, _AIMED, _PRUNED_ON = 16, 48, 24, 12


def _gather(size_px: int) -> Gather:
    cells = size_px // CUT_STRIDE
    crossing = Crossing(layout="chw", channels=TAP_CHANNELS[0], height=cells, width=cells)
    return Gather((crossing,), (size_px // LATENT_STRIDE,) * 2)


def _blocks(keep: Mapping[int, int]) -> nn.Sequential:
    """The first blocks, each with the given number of expansion channels, norms folded; weights are loaded later."""
    blocks = narrow(EfficientNetLite0().blocks[: TAPS[0] + 1], nn.Sequential)
    for index, channels in keep.items():
        block = narrow(blocks[index], MBConv)
        c_in, c_out = (narrow(layer[0], nn.Conv2d) for layer in (narrow(block.expand, nn.Sequential), block.project))
        spatial = narrow(block.depthwise[0], nn.Conv2d)
        block.expand = conv_bn(c_in.in_channels, channels, 1)
        block.depthwise = conv_bn(channels, channels, spatial.kernel_size[0], spatial.stride[0], groups=channels)
        block.project = conv_bn(channels, c_out.out_channels, 1, act=False)
    return narrow(fuse_norms(blocks), nn.Sequential)


def skeleton(base: StagedModel, tiers: int, size_px: int) -> LearnedSplit:
    """The student's modules around the teacher's own; the bottleneck untrained.

    Args:
        base: the teacher, whose tail is copied.
        tiers: how many gain tiers.
        size_px: side of the pictures it will see; its weights do not depend on it.
    """
    gather = _gather(size_px)
    light = [
        SmallEncoder(LIGHT, gather.channels, C_LATENT, trunk=nn.Sequential(_blocks(keep), copy.deepcopy(gather))) for keep in KEPT
    ]
    own = FusedEncoder(copy.deepcopy(base.body), gather, C_LATENT)
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble([*light, own], TIERS),
        GainQuantiser(C_LATENT, (1.0,) * tiers),
        FusedDecoder(C_LATENT, gather, DECODER_WIDTH, DECODER_DEPTH),
        copy.deepcopy(base.stages),
    )


@torch.no_grad()
def build_learned_detector(
    sample: Tensor, target_bits: Sequence[float], model: Detector | None = None
) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and untrained student; the latent starts in the outputs' own metric, the gain tiers at their wanted sizes.

    Args:
        sample: some tens of normalised photos (N, 3, S, S), on which the latent's first basis is found.
        target_bits: of a picture in each gain tier, finest first.
        model: the detector; ours as committed when None.
    """
    base = staged_detector(model or load_detector(), sample.shape[-1])
    cut = torch.cat([base.body(base.stem(sample[i : i + _CHUNK])) for i in range(0, len(sample), _CHUNK)])
    student = skeleton(base, len(target_bits), sample.shape[-1])
    own, decoder = narrow(student.ensemble.encoders[-1], FusedEncoder), narrow(student.decoder, FusedDecoder)
    own.gather.measure([cut])
    decoder.scatter.scale.copy_(own.gather.scale)
    metric = output_metric(base, [cut[:_METRIC_PHOTOS]], own.gather)
    fused = own.gather(cut)
    spread = sensitive_start(own.project, decoder.linear, fused, metric)
    student.quantiser = GainQuantiser(C_LATENT, (1.0,) * len(target_bits), float(spread.square().mean().sqrt()))
    student.quantiser.aim(own.project(fused[:_AIMED]), target_bits)
    stem_map = base.stem(sample[:_PRUNED_ON])
    for encoder, keep in zip(student.ensemble.encoders, KEPT, strict=False):
        _start_light(narrow(encoder, SmallEncoder), own, keep, stem_map)
    return base, student


def _start_light(encoder: SmallEncoder, own: FusedEncoder, keep: Mapping[int, int], stem_map: Tensor) -> None:
    """The published blocks pruned for these photos, then what the largest encoder ends with."""
    published = narrow(load_efficientnet_lite0().blocks[: TAPS[0] + 1], nn.Sequential).eval()
    pruned = fuse_norms(prune_blocks(published, keep, stem_map))
    trunk = narrow(encoder.trunk, nn.Sequential)
    trunk[0].load_state_dict(pruned.state_dict())
    trunk[1].load_state_dict(own.gather.state_dict())
    encoder.project.load_state_dict(own.project.state_dict())


def load_learned_detector(weights: Path, size_px: int, model: Detector | None = None) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and trained student, eval mode, float32.

    Args:
        weights: the trained bottleneck's safetensors file; tail stages it does not hold are the detector's own.
        size_px: side of the pictures it will see.
        model: the detector; ours as committed when None.

    Raises:
        BundleError: the weights are absent or of another shape.
    """
    base = staged_detector(model or load_detector(), size_px)
    try:
        state = load_file(weights)
        student = skeleton(base, len(state["quantiser.log_gain"]), size_px)
        missing, unknown = student.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except (OSError, KeyError, RuntimeError) as error:
        raise BundleError(f"{weights} holds no usable weights of the detector's bottleneck: {error}") from error
    lost = [k for k in missing if not k.startswith(("stem.", "stages.")) and not k.endswith("num_batches_tracked")]
    if lost or unknown:
        raise BundleError(f"{weights} does not fit this release: missing {lost[:3]}, unknown {list(unknown)[:3]}")
    return base, student.eval()
