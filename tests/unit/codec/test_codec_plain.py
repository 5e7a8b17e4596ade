"""The plain codec: round trips, saturation, damage, limits."""

from __future__ import annotations

import copy
import json
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import BundleError, ConfigError, LimitError, ModelError, PayloadError
from splitters.codec import PlainCodec, Symbols, calibrate_plain, codec_from_spec
from splitters.codec.envelope import Header, seal
from tests.fakes.symbols import same

RNG = np.random.default_rng(7)
SAMPLES = [
    RNG.normal(size=(6, 5, 16, 16)).astype(np.float32) * np.arange(1, 6, dtype=np.float32)[:, None, None],
    RNG.normal(size=(6, 7, 3)).astype(np.float32),
    RNG.normal(size=(6, 9)).astype(np.float32),
    RNG.normal(size=(6,)).astype(np.float32),
]
SPEC = calibrate_plain(SAMPLES, bits=(8, 4, 2), channel_axes=(0, 1, 0, 0))


def no_part(path: str) -> bytes:
    raise AssertionError(f"the plain codec reads no parts, asked for {path}")


def make_codec() -> PlainCodec:
    codec = codec_from_spec(json.loads(json.dumps(SPEC)), no_part)
    assert isinstance(codec, PlainCodec)
    return codec


CODEC = make_codec()


def frame(index: int = 0) -> list[Any]:
    return [sample[index] for sample in SAMPLES]


@pytest.mark.parametrize("point", CODEC.point_ids)
def test_symbols_survive_the_payload_exactly(point: str) -> None:
    symbols = CODEC.quantise(frame(), point)
    payloads = CODEC.encode(symbols)
    assert len(payloads) == CODEC.layer_count(point) == 1
    decoded = CODEC.decode(payloads, strict=True)
    assert same(decoded, symbols)
    assert decoded.crc32() == symbols.crc32()


def test_eight_bits_stay_within_half_a_step() -> None:
    latents = CODEC.dequantise(CODEC.quantise(frame(), "b8"))
    for latent, original, entry in zip(latents, frame(), SPEC["points"][0]["tensors"], strict=True):
        assert latent.dtype == np.float32
        assert latent.shape == np.shape(original)
        assert np.abs(latent - original).max() <= 0.51 * max(entry["step"])


def test_more_than_eight_bits_take_two_bytes_and_lose_nothing_on_the_way() -> None:
    spec = calibrate_plain(SAMPLES, bits=(14, 12, 8), channel_axes=(0, 1, 0, 0))
    codec = PlainCodec(spec)
    errors = []
    for point in codec.point_ids:
        symbols = codec.quantise(frame(), point)
        assert same(codec.decode(codec.encode(symbols), strict=True), symbols)
        errors.append(float(np.abs(codec.dequantise(symbols)[0] - frame()[0]).max()))
    assert errors[0] < errors[1] / 3 < errors[2] / 12
    assert max(int(t.max()) for t in codec.quantise(frame(), "b14").tensors) > 0xFF


def test_fewer_bits_cost_fewer_bytes_and_more_error() -> None:
    sizes, errors = [], []
    for point in CODEC.point_ids:
        symbols = CODEC.quantise(frame(), point)
        sizes.append(len(CODEC.encode(symbols)[0]))
        errors.append(float(np.square(CODEC.dequantise(symbols)[0] - SAMPLES[0][0]).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_outliers_and_infinity_saturate_but_nan_is_an_error() -> None:
    latents = frame()
    latents[2] = np.full(9, np.inf, dtype=np.float32)
    assert (CODEC.quantise(latents, "b4").tensors[2] == 15).all()
    latents[2] = np.full(9, np.nan, dtype=np.float32)
    with pytest.raises(ModelError, match="NaN in latent_2"):
        CODEC.quantise(latents, "b4")


def test_wrong_shapes_and_points_are_named() -> None:
    with pytest.raises(ConfigError, match="latent_0 has shape"):
        CODEC.quantise([np.zeros((5, 16, 5), np.float32), *frame()[1:]], "b8")
    with pytest.raises(ConfigError, match="has 4 latents, got 1"):
        CODEC.quantise(frame()[:1], "b8")
    with pytest.raises(ConfigError, match="b8, b4, b2"):
        CODEC.quantise(frame(), "b5")
    bad = Symbols(
        point_id="b2",
        tensors=tuple(np.full(shape, 4, np.int16) for shape in CODEC.shapes),
        layers=1,
        layer_count=1,
    )
    with pytest.raises(ConfigError, match=r"lie in 0\.\.3"):
        CODEC.encode(bad)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_or_truncation_is_detected(data: st.DataObject) -> None:
    payload = CODEC.encode(CODEC.quantise(frame(), "b4"))[0]
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(payload) - 1))
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        damaged = bytes(changed)
    else:
        damaged = payload[: data.draw(st.integers(0, len(payload) - 1))]
    with pytest.raises(PayloadError):
        CODEC.decode([damaged])


@given(body=st.binary(max_size=300), point=st.integers(0, 255), layers=st.integers(1, 16))
@settings(max_examples=300, deadline=None)
def test_a_forged_but_well_sealed_payload_is_refused(body: bytes, point: int, layers: int) -> None:
    payloads = seal(Header(kind="plain", point_index=point, layer_count=layers), [body])
    with pytest.raises(PayloadError):
        CODEC.decode(payloads)


@given(payload=st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        CODEC.decode([payload])


def test_a_decompression_bomb_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 * 2**20))
    with pytest.raises(PayloadError):
        CODEC.decode(seal(Header(kind="plain", point_index=0, layer_count=1), [bomb]))
    with pytest.raises(LimitError):
        CODEC.decode([bytes(17 * 2**20)])
    with pytest.raises(LimitError):
        CODEC.decode([b""] * 17)
    with pytest.raises(PayloadError, match="base layer"):
        CODEC.decode([])


def test_another_version_is_named() -> None:
    payload = bytearray(CODEC.encode(CODEC.quantise(frame(), "b4"))[0])
    payload[0] = 2 << 4 | payload[0] & 15
    payload[3:7] = zlib.crc32(payload[:3]).to_bytes(4, "little")
    with pytest.raises(PayloadError, match="version 2 is not 1"):
        CODEC.decode([bytes(payload)])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "jpeg"),
        (("version",), 9),
        (("points",), []),
        (("tensors", 0, "shape"), [1 << 20, 1 << 20]),
        (("tensors", 0, "channel_axis"), 7),
        (("points", 0, "bits"), 15),
        (("points", 0, "tensors"), []),
        (("points", 0, "tensors", 0, "step"), [0.0] * 5),
        (("points", 0, "tensors", 0, "low"), [float("nan")] * 5),
        (("points", 1, "id"), "b8"),
    ],
)
def test_a_broken_spec_is_a_bundle_error(path: tuple[Any, ...], value: object) -> None:
    spec = copy.deepcopy(SPEC)
    at: Any = spec
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(BundleError):
        codec_from_spec(spec, no_part)


def test_calibration_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        calibrate_plain([])
    with pytest.raises(ConfigError, match="NaN"):
        calibrate_plain([np.full((2, 3), np.nan)])
    with pytest.raises(ConfigError, match="bits"):
        calibrate_plain(SAMPLES[:1], bits=(15,))
    with pytest.raises(ConfigError, match="channel axis 3"):
        calibrate_plain(SAMPLES[:1], channel_axes=(3,))
