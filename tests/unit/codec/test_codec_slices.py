"""A key frame in slices: whole it is what was encoded, with holes it is what both ends say it is, and nothing forged gets in."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from protos.errors import PayloadError
from splitters.codec import LearnedCodec, Predictor, Symbols
from splitters.codec.slices import ALL, SLICES, pack, unpack
from tests.unit.codec.test_codec_learned import PART, SPEC, C

H, W = 10, 9
CODEC = LearnedCodec({**SPEC, "shape": [C, H, W]}, PART)
PURE = LearnedCodec({**SPEC, "shape": [C, H, W]}, PART, coder="pure")
QUARTERS = ((slice(0, 4), slice(0, 4)), (slice(0, 4), slice(4, 9)), (slice(4, 10), slice(0, 4)), (slice(4, 10), slice(4, 9)))


def key_frame(seed: int = 0, point: str = "fine", reach: float = 3.0) -> Symbols:
    return CODEC.quantise([np.random.default_rng(seed).normal(0, reach, (C, H, W)).astype(np.float32)], point)


def payload_of(symbols: Symbols) -> bytes:
    payload = CODEC.encode_slices(symbols)
    assert payload is not None
    return payload


def with_holes(payload: bytes, held: int) -> bytes:
    size = len(payload) // SLICES
    return b"".join(payload[i * size : (i + 1) * size] if held >> i & 1 else bytes(size) for i in range(SLICES))


@pytest.mark.parametrize("point", ["fine", "fine3", "coarse", "single"])
def test_whole_slices_are_the_frame_and_both_coders_agree(point: str) -> None:
    symbols = key_frame(1, point)
    payload = payload_of(symbols)
    assert payload == PURE.encode_slices(symbols)
    for codec in (CODEC, PURE):
        decoded = codec.decode_slices(payload)
        assert decoded.crc32() == symbols.crc32()
        assert decoded.held == 0


@pytest.mark.parametrize("held", range(1, ALL))
def test_what_is_there_is_exact_and_what_is_not_is_the_prior_at_both_ends(held: int) -> None:
    symbols = key_frame(2)
    decoded = CODEC.decode_slices(with_holes(payload_of(symbols), held))
    assert decoded.held == held
    assert decoded.crc32() == CODEC.with_holes(symbols, held).crc32()
    for index, quarter in enumerate(QUARTERS):
        found = decoded.tensors[0][:, *quarter]
        if held >> index & 1:
            assert np.array_equal(found, symbols.tensors[0][:, *quarter])
        else:
            assert (found == found[:, :1, :1]).all()  # a constant for each channel


def test_the_next_frame_is_predicted_from_the_holes_too() -> None:
    latent = np.random.default_rng(5).normal(0, 1, (C, H, W)).astype(np.float32)
    symbols, predictor = CODEC.quantise([latent], "fine"), Predictor(CODEC)
    predictor.sent(0, symbols, reference=None)
    server = CODEC.decode_slices(with_holes(payload_of(symbols), 0b1011))
    assert predictor.acknowledged(0, server.layers, server.crc32(), server.held)
    reference, frame = predictor.choose()
    assert frame == 0
    coded = CODEC.compress([latent + 0.01], "fine", reference, frame)
    assert CODEC.decode(coded.payloads, {0: server}).crc32() == coded.symbols.crc32()


def test_a_wrong_word_about_the_holes_is_not_believed() -> None:
    symbols, predictor = key_frame(3), Predictor(CODEC)
    predictor.sent(0, symbols, reference=None)
    server = CODEC.decode_slices(with_holes(payload_of(symbols), 0b1011))
    assert not predictor.acknowledged(0, server.layers, server.crc32(), 0b0111)
    assert predictor.choose() == (None, None)


def test_a_damaged_slice_is_a_missing_one() -> None:
    symbols = key_frame(4)
    payload = bytearray(payload_of(symbols))
    payload[12] ^= 1  # in the first slice
    decoded = CODEC.decode_slices(bytes(payload))
    assert decoded.held == 0b1110
    assert decoded.crc32() == CODEC.with_holes(symbols, 0b1110).crc32()


def test_slices_of_two_points_do_not_mix() -> None:
    fine, coarse = (unpack(payload_of(key_frame(6, point))) for point in ("fine", "coarse"))
    mixed = [piece for piece in (fine[0], coarse[1], fine[2], fine[3]) if piece is not None]
    assert CODEC.decode_slices(pack(mixed)).held == 0b1101


def test_forged_payloads_are_refused_or_decoded_and_never_crash() -> None:
    dice, payload = random.Random(1), payload_of(key_frame(7))
    for _ in range(300):
        forged = bytearray(payload)
        for _ in range(dice.randrange(1, 30)):
            forged[dice.randrange(len(forged))] = dice.randrange(256)
        cut = bytes(forged[: dice.choice([len(forged), dice.randrange(len(forged))])])
        try:
            assert CODEC.decode_slices(cut).tensors[0].shape == (C, H, W)
        except PayloadError:
            continue
    for empty in (b"", bytes(8), bytes(7)):
        with pytest.raises(PayloadError):
            CODEC.decode_slices(empty)


def test_a_plane_that_is_too_small_has_no_slices() -> None:
    small = LearnedCodec({**SPEC, "shape": [C, 3, 9]}, PART)
    symbols = small.quantise([np.zeros((C, 3, 9), np.float32)], "fine")
    assert small.encode_slices(symbols) is None
    with pytest.raises(PayloadError):
        small.decode_slices(payload_of(key_frame()))


def test_slices_cost_little_on_what_has_structure() -> None:
    """On the shipped bundles: see docs/results/datagrams.md; here a smooth plane of their size."""
    codec = LearnedCodec({**SPEC, "shape": [C, 28, 28]}, PART)
    noise = np.random.default_rng(8).normal(size=(C, 30, 30))
    field = sum(noise[:, dy : dy + 28, dx : dx + 28] for dy, dx in itertools.product(range(3), range(3))) / 3
    symbols = codec.quantise([np.asarray(field / np.arange(1, C + 1)[:, None, None], np.float32)], "fine")
    payload = codec.encode_slices(symbols)
    assert payload is not None
    sliced = sum(len(piece) for piece in unpack(payload) if piece is not None)
    assert sliced < 1.1 * sum(map(len, codec.encode(symbols)))
