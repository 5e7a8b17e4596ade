"""Cuts every architecture of a list at four places and verifies each cut. One JSON line at the end.

    python -m tests.bench.cut_zoo [--only NAME ...] [--threads 1] [--json]

Weights are random, those of normalisations, their statistics, layer scales and everything initialised to a constant
(zeros among them) uniform in 0.5–1.5: a branch multiplied by an initial zero would hide whatever was wrong with it.
Each cut must agree with the uncut model within 1e-4 of the output's standard deviation, for different pictures alone and in
one batch, and replacing any tensor that crosses must move the output by more than 1e-3 of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn

from splitters.cutting import torchvision_compat
from splitters.cutting.graph.partition import Cut
from splitters.cutting.graph.split import Cutter

# Name, input side in pixels. Without a prefix: timm. The first of each family is the smallest there is.
ZOO: dict[str, int] = {
    "mobilenetv2_035": 224, "mobilenetv2_100": 224, "torchvision:mobilenet_v2": 224,
    "mobilenetv3_small_050": 224, "mobilenetv3_large_100": 224, "torchvision:mobilenet_v3_small": 224,
    "mobilenetv4_conv_small_035": 224, "mobilenetv4_hybrid_medium": 224,
    "mnasnet_small": 224, "semnasnet_050": 224, "semnasnet_075": 224, "torchvision:mnasnet0_5": 224,
    "spnasnet_100": 224, "fbnetc_100": 224, "fbnetv3_b": 224, "nasnetalarge": 331,
    "ghostnet_050": 224, "ghostnet_100": 224, "ghostnetv2_100": 224, "ghostnetv3_050": 224,
    "efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_b0": 224,
    "efficientformer_l1": 224, "efficientformerv2_s0": 224, "efficientformerv2_s1": 224,
    "shvit_s1": 224, "shvit_s2": 224, "nextvit_small": 224,
    "mobilevit_xxs": 256, "mobilevit_xs": 256, "mobilevitv2_050": 256, "mobilevitv2_075": 256,
    "fasternet_t0": 224, "fasternet_t1": 224,
    "efficientvit_b0": 224, "efficientvit_m0": 224, "efficientvit_m1": 224,
    "mobileone_s0": 224, "mobileone_s1": 224, "repvit_m0_9": 224, "repvit_m1_0": 224,
    "starnet_s050": 224, "starnet_s100": 224, "fastvit_t8": 256, "fastvit_t12": 256,
    "convnext_atto": 224, "convnext_femto": 224, "torchvision:convnext_tiny": 224,
    "resnet10t": 176, "resnet18": 224, "torchvision:resnet50": 224, "res2net50_14w_8s": 224,
    "densenet121": 224, "densenetblur121d": 224, "inception_v3": 299, "torchvision:inception_v3": 299,
    "swin_tiny_patch4_window7_224": 224, "torchvision:swin_t": 224, "torchvision:swin_v2_t": 256,
    "vit_tiny_patch16_224": 224, "vit_tiny_r_s16_p8_224": 224,
    "lcnet_035": 224, "edgenext_xx_small": 256, "regnety_002": 224, "repghostnet_050": 224, "hgnetv2_b0": 224,
    "tiny_vit_5m_224": 224, "levit_128s": 224, "hrnet_w18_small": 224, "ese_vovnet19b_slim_dw": 224,
    "mixnet_s": 224, "hardcorenas_a": 224, "rexnet_100": 224, "pvt_v2_b0": 224, "coat_lite_tiny": 224,
    "crossvit_9_240": 240, "xcit_nano_12_p16_224": 224, "torchvision:shufflenet_v2_x0_5": 224,
    "torchvision:squeezenet1_1": 224, "torchvision:googlenet": 224, "torchvision:lraspp_mobilenet_v3_large": 224,
    "torchvision:deeplabv3_mobilenet_v3_large": 224,
}  # fmt: skip

# What `make test` cuts: chains, excitation, residuals, tokens, shuffled halves.
FAST = (
    "mobilenetv3_small_050", "fasternet_t0", "starnet_s050", "resnet10t", "vit_tiny_patch16_224",
    "torchvision:shufflenet_v2_x0_5",
)  # fmt: skip

# Weight variance times fan-in, where He's 2 lets the residual stream grow until a branch is lost in it.
GAIN = {"shvit_s1": 1.0, "efficientvit_m1": 1.0, "torchvision:lraspp_mobilenet_v3_large": 1.0}


def build(name: str, side_px: int) -> tuple[nn.Module, torch.Tensor]:
    """A zoo model with random weights and an input for it."""
    torchvision_compat.activate()
    import timm
    import torchvision

    torch.manual_seed(0)
    source, _, rest = name.rpartition(":")
    if source == "torchvision":
        keywords: dict[str, Any] = {"weights": None}
        if "deeplab" in rest or "lraspp" in rest:
            keywords["weights_backbone"] = None
        if "googlenet" in rest or "inception" in rest:
            keywords["init_weights"] = False  # a truncated normal that takes half a minute
        model = torchvision.models.get_model(rest, **keywords)
    else:
        model = timm.create_model(rest)
    randomise(model, gain=GAIN.get(name, 2.0))
    return model.eval(), torch.rand(1, 3, side_px, side_px)


def randomise(model: nn.Module, *, gain: float = 2.0, seed: int = 0) -> None:
    """Uniform 0.5–1.5 for all of normalisations and for whatever was initialised to one constant.

    Matrices are normal with a variance of ``gain`` over fan-in: some initial classifiers are so small that their (now
    random) biases would drown all that depends on the image.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower() or hasattr(module, "running_var")
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if not tensor.is_floating_point() or tensor.numel() == 0:
                    continue
                if tensor.ndim > 1 and name == "weight" and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * (gain / tensor[0].numel()) ** 0.5)
                    continue
                statistic = name in {"running_mean", "running_var"}
                constant = isinstance(tensor, nn.Parameter) and bool((tensor == tensor.flatten()[0]).all())
                if statistic or constant or (is_norm and isinstance(tensor, nn.Parameter)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def choose(cuts: tuple[Cut, ...]) -> list[Cut]:
    """Four cuts: a quarter, half and three quarters of the way, and where most tensors cross."""
    picked = {c.position: c for c in (cuts[len(cuts) // 4], cuts[len(cuts) // 2], cuts[3 * len(cuts) // 4])}
    most = max((c for c in cuts if c.position not in picked), key=lambda c: len(c.crossing), default=None)
    if most is not None:
        picked[most.position] = most
    return [picked[p] for p in sorted(picked)]


def check(name: str, side_px: int) -> dict[str, Any]:
    """Cuts one model and verifies; raises what the splitter raises."""
    model, image = build(name, side_px)
    cutter = Cutter(model, image)
    cuts = cutter.candidates()
    rows = []
    for cut in choose(cuts):
        found = cutter.split(cut).verify(image)
        rows.append({"at": cut.name, "tensors": len(cut.crossing), "relative": found.relative_difference,
                     "std": found.output_std, "sensitivity": min(found.sensitivity)})  # fmt: skip
        if found.output_std <= 1e-3:
            raise AssertionError(f"{name}: the output hardly varies ({found.output_std:.2g}), so nothing is shown")
    if len(rows) < 3:
        raise AssertionError(f"{name}: only {len(rows)} cuts")
    return {"candidates": len(cuts), "method": cutter.trace.method, "dynamic_batch": cutter.trace.dynamic_batch,
            "notes": cutter.trace.notes, "cuts": rows}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the bench; exit 1 if any architecture fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ZOO), choices=list(ZOO), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    failed: dict[str, str] = {}
    verified = cuts = 0
    worst, multiple = 0.0, 0
    for name in arguments.only:
        start = time.perf_counter()
        try:
            found = check(name, ZOO[name])
        except Exception as error:  # noqa: BLE001  (one architecture's fault must not hide the others')
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{name:42} FAILED  {failed[name]}", flush=True)
            continue
        verified += 1
        cuts += len(found["cuts"])
        multiple += sum(row["tensors"] > 1 for row in found["cuts"])
        most = max(row["relative"] for row in found["cuts"])
        worst = max(worst, most)
        sensitivity = min(row["sensitivity"] for row in found["cuts"])
        print(
            f"{name:42} {found['method']}{'' if found['dynamic_batch'] else ' (fixed batch)'}  {found['candidates']:4} candidates  "
            f"tensors {'/'.join(str(r['tensors']) for r in found['cuts']):12} relative {most:.1e}  "
            f"replaced moves ≥ {sensitivity:.1e}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    result = {"architectures": verified, "cuts": cuts, "cuts_with_several_tensors": multiple, "worst_relative": worst}
    print(json.dumps(result | {"failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
