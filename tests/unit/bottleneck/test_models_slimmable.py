"""Slimmable layers, encoder ensembles, gains, decoder: shapes, slices, norms of their own, exact export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from protos.errors import ConfigError
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.bottleneck.ensemble import EncoderEnsemble, SmallEncoder, SmallEncoderConfig, Tier
from splitters.bottleneck.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    at_width,
    frozen_copy,
    recalibrate,
    set_width,
    slim_channels,
)

CONFIG = SmallEncoderConfig(channels=(16, 24), strides=(2, 2), kernels=(3, 5), widths=(0.5, 1.0))


@pytest.fixture
def encoder() -> SmallEncoder:
    torch.manual_seed(0)
    return SmallEncoder(CONFIG, 8, 6)


def test_a_width_uses_the_leading_channels_and_nothing_else() -> None:
    torch.manual_seed(0)
    conv = SlimmableConv2d(8, 8, 3)
    x = torch.randn(2, 4, 5, 5)
    set_width(conv, 0.5)
    before = conv(x)
    with torch.no_grad():
        conv.weight[4:] = 100.0
        conv.weight[:, 4:] = 100.0
    assert torch.equal(conv(x), before)
    with torch.no_grad():
        conv.weight[0, 0, 1, 1] += 1.0
    assert not torch.equal(conv(x), before)


@pytest.mark.parametrize(("channels", "width", "used"), [(10, 0.5, 5), (10, 1.0, 10), (3, 0.5, 2), (3, 0.01, 1), (10, 0.3, 3)])
def test_slim_channels(channels: int, width: float, used: int) -> None:
    assert slim_channels(channels, width) == used


def test_every_width_has_its_own_norm_statistics() -> None:
    norm = SlimmableBatchNorm2d(4, (0.5, 1.0))
    norm.train()
    with at_width(norm, 0.5):
        norm(torch.randn(8, 2, 3, 3) + 5)
    full, half = norm.norms[1], norm.norms[0]
    assert isinstance(full, nn.BatchNorm2d)
    assert isinstance(half, nn.BatchNorm2d)
    assert full.running_mean is not None
    assert half.running_mean is not None
    assert float(full.running_mean.abs().max()) == 0.0
    assert float(half.running_mean.min()) > 0.05


def test_an_unknown_width_is_refused(encoder: SmallEncoder) -> None:
    with pytest.raises(ConfigError, match=r"0\.7"):
        set_width(encoder, 0.7)


def test_recalibration_finds_the_statistics_of_the_data(encoder: SmallEncoder) -> None:
    batches = [torch.randn(16, 8, 16, 16) * 3 + 1 for _ in range(3)]
    recalibrate(encoder, batches, (0.5, 1.0))
    encoder.eval()
    norms = [m for m in encoder.body.modules() if isinstance(m, SlimmableBatchNorm2d)]
    for width in (0.5, 1.0):
        with at_width(encoder, width):
            seen: list[torch.Tensor] = []
            hook = norms[0].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            with torch.no_grad():
                for batch in batches:
                    encoder(batch)
            hook.remove()
            joined = torch.cat(seen)
            assert float(joined.mean((0, 2, 3)).abs().max()) < 0.05
            assert float((joined.std((0, 2, 3)) - 1).abs().max()) < 0.05


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_a_frozen_copy_is_the_same_function_of_plain_layers(encoder: SmallEncoder, width: float) -> None:
    encoder.eval()
    x = torch.randn(2, 8, 16, 16)
    with at_width(encoder, width), torch.no_grad():
        wanted = encoder(x)
        plain = frozen_copy(encoder).eval()
    assert not any(isinstance(m, SlimmableConv2d | SlimmableBatchNorm2d) for m in plain.modules())
    with torch.no_grad():
        assert torch.allclose(plain(x), wanted, atol=1e-6)
    assert any(isinstance(m, SlimmableConv2d) for m in encoder.modules()), "the original stays slimmable"


def test_the_latent_has_one_shape_in_every_tier_and_tiers_sum(encoder: SmallEncoder) -> None:
    other = SmallEncoder(SmallEncoderConfig(channels=(8, 8), strides=(2, 2), kernels=(3, 3)), 8, 6)
    tiers = (Tier(name="s", runs=((0, 0.5),)), Tier(name="m", runs=((0, 1.0),)), Tier(name="l", runs=((0, 0.5), (1, 1.0))))
    ensemble = EncoderEnsemble([encoder, other], tiers).eval()
    x = torch.randn(2, 8, 16, 16)
    with torch.no_grad():
        latents = [ensemble(x, tier) for tier in range(3)]
        assert {tuple(z.shape) for z in latents} == {(2, 6, 4, 4)}
        assert torch.allclose(latents[2], latents[0] + other(x), atol=1e-5)
        assert not torch.allclose(latents[0], latents[1])


def test_a_tier_of_an_unknown_width_is_refused(encoder: SmallEncoder) -> None:
    with pytest.raises(ConfigError, match="'x'"):
        EncoderEnsemble([encoder], (Tier(name="x", runs=((0, 0.25),)),))


def quantiser() -> GainQuantiser:
    return GainQuantiser(4, (0.5, 2.0), scale=1.0)


def test_coarser_tiers_have_fewer_bits_and_larger_error() -> None:
    torch.manual_seed(0)
    q, z, kept = quantiser().eval(), torch.randn(3, 4, 8, 8), torch.ones(3, 4)
    results = [q(z, torch.full((3,), tier), kept) for tier in (0, 1)]
    errors = [float((restored - z).abs().mean()) for restored, _ in results]
    bits = [float(b.mean()) for _, b in results]
    assert errors[0] < errors[1]
    assert bits[0] > 1.5 * bits[1]


def test_dropped_channels_are_zero_and_free() -> None:
    q, z = quantiser(), torch.randn(1, 4, 8, 8)
    kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    tier = torch.zeros(1, dtype=torch.int64)
    restored, bits = q(z, tier, kept)
    assert float(restored[:, 2:].abs().max()) == 0.0
    assert torch.allclose(bits, q.bits(q.symbols(z, tier).round()[:, :2].repeat(1, 2, 1, 1), tier, kept))


def test_estimated_bits_are_those_of_an_ideal_coder() -> None:
    q = quantiser()
    every = torch.arange(-200, 201).float()
    spread = torch.stack([every] * 4)[None, :, :, None]
    # One symbol a cell: 2^-bits over all integers sums to one for a proper distribution.
    mean, rate = q.prior_mean[0, 0], torch.exp(-q.prior_log_scale[0, 0])
    mass = torch.sigmoid((every - mean + 0.5) * rate) - torch.sigmoid((every - mean - 0.5) * rate)
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-4)
    told = q.bits(spread, torch.zeros(1, dtype=torch.int64), torch.ones(1, 4))
    assert float(told) == pytest.approx(float(-torch.log2(mass.clamp_min(2**-16)).sum() * 4), rel=1e-4)


def test_shifting_a_tier_scales_its_gains_and_leaves_the_latent() -> None:
    q, z, tier = quantiser(), torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64)
    before = q.symbols(z, tier)
    q.shift(0, 0.5)
    after = q.symbols(z, tier)
    assert torch.allclose(after, before * 1.6487213, rtol=1e-4)
    assert torch.allclose(q.restore(after, tier), z, atol=1e-5)
