"""Our detector's learned split: cut after block 4, a latent a sixteenth of the input, three encoder tiers.

Shape legend: N batch; images (N, 3, S, S), S 320 at work; stem map (N, 32, S / 2, S / 2); cut tensor (N, 40, S / 8, S / 8),
2 x 2 of its cells folded into channels, (N, 160, S / 16, S / 16); latent (N, 64, S / 16, S / 16).

The dearest encoder is the detector's own first blocks, as they are: they never trained with the detector, so a bottleneck fits
any detector trained around the same blocks.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from protos.errors import BundleError
from splitters.models.bottleneck import GainQuantiser, principal_start
from splitters.models.crossing import Crossing, Gather
from splitters.models.detector import TAP_CHANNELS, Detector, load_detector
from splitters.models.detector_staged import staged_detector
from splitters.models.ensemble import EncoderEnsemble, SmallEncoder, SmallEncoderConfig, Tier
from splitters.models.learned import LearnedSplit, StagedModel
from splitters.models.learned_any import FusedDecoder, FusedEncoder
from splitters.models.narrow import narrow

C_STEM, C_LATENT = 32, 64
CUT_STRIDE, LATENT_STRIDE = 8, 16
SMALL = SmallEncoderConfig(channels=(64, 128, 192), strides=(2, 2, 2), kernels=(3, 5, 5), depth=2, widths=(0.5, 1.0))
TIERS = (
    Tier(name="s", runs=((0, 0.5),)),
    Tier(name="m", runs=((0, 1.0),)),
    Tier(name="own", runs=((1, 1.0),)),
)
DECODER_WIDTH, DECODER_DEPTH = 96, 2
FIRST_STEP, STEP_RATIO = 0.4, 1.7  # of the gain tiers before training moves them, in units of the latent's deviation
_CHUNK = 16


def _gather(size_px: int) -> Gather:
    cells = size_px // CUT_STRIDE
    crossing = Crossing(layout="chw", channels=TAP_CHANNELS[0], height=cells, width=cells)
    return Gather((crossing,), (size_px // LATENT_STRIDE,) * 2)


def skeleton(base: StagedModel, tiers: int, size_px: int, scale: float = 1.0) -> LearnedSplit:
    """The student's modules around the teacher's own; bottleneck and small encoders untrained.

    Args:
        base: the teacher, whose tail is copied.
        tiers: how many gain tiers.
        size_px: side of the pictures it will see; its weights do not depend on it.
        scale: the latent's rough deviation.
    """
    gather = _gather(size_px)
    own = FusedEncoder(copy.deepcopy(base.body), gather, C_LATENT)
    steps = tuple(scale * FIRST_STEP * STEP_RATIO**i for i in range(tiers))
    return LearnedSplit(
        copy.deepcopy(base.stem),
        EncoderEnsemble([SmallEncoder(SMALL, C_STEM, C_LATENT), own], TIERS),
        GainQuantiser(C_LATENT, steps, scale),
        FusedDecoder(C_LATENT, gather, DECODER_WIDTH, DECODER_DEPTH),
        copy.deepcopy(base.stages),
    )


@torch.no_grad()
def build_learned_detector(sample: Tensor, tiers: int, model: Detector | None = None) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and untrained student.

    Args:
        sample: some tens of normalised photos (N, 3, S, S), on which the latent's first basis is found.
        tiers: how many gain tiers.
        model: the detector; ours as committed when None.
    """
    base = staged_detector(model or load_detector(), sample.shape[-1])
    cut = torch.cat([base.body(base.stem(sample[i : i + _CHUNK])) for i in range(0, len(sample), _CHUNK)])
    student = skeleton(base, tiers, sample.shape[-1], 1.0)
    own, decoder = narrow(student.ensemble.encoders[-1], FusedEncoder), narrow(student.decoder, FusedDecoder)
    own.gather.measure([cut])
    decoder.scatter.scale.copy_(own.gather.scale)
    spread = principal_start(own.project, decoder.linear, own.gather(cut))
    scale = float(spread.square().mean().sqrt())
    steps = tuple(scale * FIRST_STEP * STEP_RATIO**i for i in range(tiers))
    student.quantiser = GainQuantiser(C_LATENT, steps, scale)
    # Later channels hold less: a prior as wide as the first one's would charge them several times their bits at the start.
    student.quantiser.prior_log_scale.add_((spread / scale).clamp_min(1e-3).log())
    return base, student


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
