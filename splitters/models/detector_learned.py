"""Our detector's learned split: cut after block 4, a latent a sixteenth of the input, three encoder tiers.

Shape legend: N batch; images (N, 3, S, S), S 320 at work; stem map (N, 32, S / 2, S / 2); cut tensor (N, 40, S / 8, S / 8),
2 x 2 of its cells folded into channels, (N, 160, S / 16, S / 16); latent (N, 64, S / 16, S / 16).

The dearest encoder is the detector's own first blocks, as they are: they never trained with the detector, so a bottleneck fits
any detector trained around the same blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from protos.errors import BundleError
from splitters.models.bottleneck import GainQuantiser
from splitters.models.crossing import Crossing, Gather
from splitters.models.detector import TAP_CHANNELS, Detector, load_detector
from splitters.models.detector_staged import staged_detector
from splitters.models.ensemble import EncoderEnsemble, SmallEncoder, SmallEncoderConfig, Tier
from splitters.models.learned import LearnedSplit, StagedModel
from splitters.models.learned_any import FusedDecoder, FusedEncoder
from splitters.models.narrow import narrow
from splitters.models.sensitivity import output_metric, sensitive_start

C_STEM, C_LATENT = 32, 64
CUT_STRIDE, LATENT_STRIDE = 8, 16
SMALL = SmallEncoderConfig(channels=(64, 128, 192), strides=(2, 2, 2), kernels=(3, 5, 5), depth=2, widths=(0.5, 1.0))
TIERS = (
    Tier(name="s", runs=((0, 0.5),)),
    Tier(name="m", runs=((0, 1.0),)),
    Tier(name="own", runs=((1, 1.0),)),
)
DECODER_WIDTH, DECODER_DEPTH = 96, 2
_CHUNK, _METRIC_PHOTOS, _AIMED = 16, 48, 24


def _gather(size_px: int) -> Gather:
    cells = size_px // CUT_STRIDE
    crossing = Crossing(layout="chw", channels=TAP_CHANNELS[0], height=cells, width=cells)
    return Gather((crossing,), (size_px // LATENT_STRIDE,) * 2)


def skeleton(base: StagedModel, tiers: int, size_px: int) -> LearnedSplit:
    """The student's modules around the teacher's own; bottleneck and small encoders untrained.

    Args:
        base: the teacher, whose tail is copied.
        tiers: how many gain tiers.
        size_px: side of the pictures it will see; its weights do not depend on it.
    """
    gather = _gather(size_px)
    own = FusedEncoder(copy.deepcopy(base.body), gather, C_LATENT)
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble([SmallEncoder(SMALL, C_STEM, C_LATENT), own], TIERS),
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
    return base, student


@torch.no_grad()
def take_over_small(student: LearnedSplit, other: LearnedSplit) -> None:
    """Gives ``student`` the small encoder of ``other``, whose latent has another basis: its last layer is re-based.

    Both latents are linear in the cut, z = W f + b, so that z' = W' W^+ (z - b) + b' wherever W keeps what W' asks for.
    """
    mine, theirs = (narrow(s.ensemble.encoders[-1], FusedEncoder) for s in (student, other))
    small = narrow(student.ensemble.encoders[0], SmallEncoder)
    small.load_state_dict(other.ensemble.encoders[0].state_dict())
    ratio = float(theirs.gather.scale[0] / mine.gather.scale[0])
    change = ratio * mine.project.weight[:, :, 0, 0] @ torch.linalg.pinv(theirs.project.weight[:, :, 0, 0])
    bias, old, new = (narrow(layer.bias, nn.Parameter) for layer in (small.project, theirs.project, mine.project))
    small.project.weight[:, :, 0, 0] = change @ small.project.weight[:, :, 0, 0]
    bias.copy_(change @ (bias - old) + new)


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
