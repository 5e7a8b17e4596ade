"""The learned codec: exact layers, prediction, both coders, damage."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import BundleError, ConfigError, ModelError, PayloadError
from splitters.codec import LearnedCodec, Symbols, codec_from_spec, learned_spec
from splitters.codec.entropy.coder import CoderFactory, TableSet
from splitters.codec.envelope import Header, PredictedHeader, open_layers, seal, seal_predicted
from splitters.codec.fitting.fit import fit_tables, refit_predicted, with_scene
from splitters.codec.tables import read_tables
from tests.fakes.symbols import same

C, H, W = 6, 7, 9
LAYERS = (2, 4, 6)
GAINS = np.array([[1.0] * C, [4.0] * C])


def smooth(rng: np.random.Generator, count: int) -> np.ndarray:
    """Latents with spatial correlation, falling in strength over channels: (count, C, H, W)."""
    noise = rng.normal(size=(count, C, H + 2, W + 2))
    field = sum(noise[:, :, dy : dy + H, dx : dx + W] for dy in range(3) for dx in range(3)) / 3
    return np.asarray(field / np.arange(1, C + 1)[:, None, None], dtype=np.float32)


def scene(rng: np.random.Generator, frames: int, speed: float = 0.3) -> np.ndarray:
    """A still scene through which something moves, with a little noise: (T, C, H, W)."""
    still, noise = smooth(rng, 1)[0], smooth(rng, frames)
    y, x = np.mgrid[:H, :W]
    thing = rng.normal(size=(C, 1, 1)) * 2 / np.arange(1, C + 1)[:, None, None]
    start = rng.uniform(1, 5, size=2)
    near = [np.exp(-((y - start[0]) ** 2) - (x - start[1] - t * speed) ** 2) for t in range(frames)]
    return np.asarray(still + 0.01 * noise + np.stack([n * thing for n in near]), np.float32)


def make_fit() -> tuple[dict[str, Any], bytes]:
    rng = np.random.default_rng(3)
    before = smooth(rng, 60)
    symbols = [np.rint(before * gain[:, None, None]).astype(np.int32) for gain in GAINS]
    clips = [scene(rng, 12) for _ in range(10)]
    spec = learned_spec(
        shape=(C, H, W),
        gains=GAINS,
        ungains=1 / GAINS,
        points={"coarse": (0, C), "fine": (1, C), "fine3": (1, 3), "coarse2": (0, 2), "single": (0, 5)},
        tables_path="device/codec.bin",
        single_layer=["single"],
    )
    return json.loads(json.dumps(spec)), fit_tables(symbols, LAYERS, clips=clips, gains=GAINS)


SPEC, PART = make_fit()
COMPILED = LearnedCodec(SPEC, PART)
PURE = LearnedCodec(SPEC, PART, coder="pure")
RNG = np.random.default_rng(11)
BEFORE = smooth(RNG, 4)
NOW = BEFORE + 0.05 * smooth(RNG, 4)


def any_symbols(data: st.DataObject, point: str) -> Symbols:
    """Symbols as a codec may meet them: quiet, wild, or far outside the tables."""
    reach = data.draw(st.sampled_from([0, 1, 3, 40, 2047]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(-reach, reach + 1, size=(C, H, W)).astype(np.int16)
    kept = SPEC["points"][COMPILED.point_ids.index(point)]["channels"]
    values[kept:] = 0
    count = COMPILED.layer_count(point)
    return Symbols(point_id=point, tensors=(values,), layers=count, layer_count=count)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_symbols_survive_exactly_and_both_coders_agree(data: st.DataObject) -> None:
    point = data.draw(st.sampled_from(COMPILED.point_ids))
    symbols = any_symbols(data, point)
    reference = any_symbols(data, data.draw(st.sampled_from(COMPILED.point_ids))) if data.draw(st.booleans()) else None
    frame = data.draw(st.integers(0, 2**40)) if reference is not None else None
    payloads = COMPILED.encode(symbols, reference, frame)
    assert PURE.encode(symbols, reference, frame) == payloads
    held = {frame: reference} if reference is not None and frame is not None else {}
    for count in range(1, len(payloads) + 1):
        decoded = [codec.decode(payloads[:count], held, strict=True) for codec in (COMPILED, PURE)]
        assert np.array_equal(decoded[0].tensors[0], COMPILED.prefix(symbols, count if len(payloads) > 1 else 99).tensors[0])
        assert same(decoded[0], decoded[1])
        assert decoded[0].crc32() == decoded[1].crc32()


@pytest.mark.parametrize(
    "rows", [[[65535, 1]], [[1, 65535]], [[1, 1, 65533, 1]], [[65533, 1, 1, 1]], [[16384] * 4, [1, 2, 3, 65530]]]
)
def test_every_entry_of_a_table_keeps_its_interval_in_both_coders(rows: list[list[int]]) -> None:
    tables = TableSet(np.array(rows))
    symbols = np.tile(np.arange(len(rows[0]), dtype=np.int32), 3 * len(rows))
    index = np.repeat(np.arange(len(rows), dtype=np.intp), 3 * len(rows[0]))
    bodies = []
    for name in ("constriction", "pure"):
        factory = CoderFactory(name)
        encoder = factory.encoder()
        encoder.put(symbols, tables, index)
        bodies.append(encoder.finish())
        assert np.array_equal(factory.decoder(bodies[-1]).get(tables, index), symbols)
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize(("point", "layers"), [("coarse", 3), ("fine", 3), ("fine3", 2), ("coarse2", 1), ("single", 1)])
def test_layers_follow_the_channels_kept(point: str, layers: int) -> None:
    symbols = COMPILED.quantise([NOW[0]], point)
    assert COMPILED.layer_count(point) == len(COMPILED.encode(symbols)) == layers
    kept = SPEC["points"][COMPILED.point_ids.index(point)]["channels"]
    latent = COMPILED.dequantise(symbols)[0]
    gain = GAINS[SPEC["points"][COMPILED.point_ids.index(point)]["tier"], 0]
    assert np.abs(latent[:kept] - NOW[0][:kept]).max() <= 0.5001 / gain
    assert not latent[kept:].any()


def test_missing_layers_are_zeros_and_damage_ends_the_prefix() -> None:
    symbols = COMPILED.quantise([NOW[0]], "fine")
    payloads = COMPILED.encode(symbols)
    damaged = [payloads[0], payloads[1][:-1], payloads[2]]
    decoded = COMPILED.decode(damaged)
    assert (decoded.layers, decoded.layer_count, decoded.complete) == (1, 3, False)
    assert np.array_equal(decoded.tensors[0][:2], symbols.tensors[0][:2])
    assert not decoded.tensors[0][2:].any()
    with pytest.raises(PayloadError, match="layer 1"):
        COMPILED.decode(damaged, strict=True)


def test_contexts_beat_a_memoryless_code() -> None:
    """Below the empirical entropy of each channel, header and checksums aside."""
    bits, size = 0.0, 0
    for latent in BEFORE:
        symbols = COMPILED.quantise([latent], "fine")
        size += sum(map(len, open_layers(COMPILED.encode(symbols))[1]))
    values = np.concatenate([COMPILED.quantise([z], "fine").tensors[0].reshape(C, -1) for z in BEFORE], axis=1)
    for channel in values:
        p = np.unique(channel, return_counts=True)[1] / channel.size
        bits -= float((p * np.log2(p)).sum()) * channel.size
    assert size < 0.95 * bits / 8


def test_a_still_scene_costs_next_to_nothing_and_a_cut_no_more_than_alone() -> None:
    rng = np.random.default_rng(4)
    clip = scene(rng, 8)
    before, now = clip[0], clip[0] + 0.003 * smooth(rng, 1)[0]
    reference = COMPILED.quantise([before], "fine")
    coded = COMPILED.compress([now], "fine", reference, 5)
    assert coded.predicted
    assert sum(map(len, coded.payloads)) <= 12
    assert np.array_equal(coded.symbols.tensors[0], reference.tensors[0])
    unlike = COMPILED.quantise([-3 * smooth(rng, 1)[0]], "fine")
    cut = COMPILED.compress([now], "fine", unlike, 5)
    alone = COMPILED.encode(COMPILED.quantise([now], "fine"))
    assert sum(map(len, cut.payloads)) <= 1.01 * sum(map(len, alone))
    assert COMPILED.decode(cut.payloads, {5: unlike}, strict=True).crc32() == cut.symbols.crc32()


@pytest.mark.parametrize("age", [1, 2, 3])
def test_what_moves_is_followed_for_less_than_it_costs_alone(age: int) -> None:
    clip = scene(np.random.default_rng(6), 20)
    alone = sum(sum(map(len, COMPILED.encode(COMPILED.quantise([z], "fine")))) for z in clip[4:])
    sent, sizes = [COMPILED.quantise([clip[0]], "fine")], []
    for number, latent in enumerate(clip[1:], 1):
        back = max(0, number - age)
        coded = COMPILED.compress([latent], "fine", sent[back], back)
        error = (latent - COMPILED.dequantise(coded.symbols)[0]) * GAINS[1][:, None, None]
        assert np.square(error).sum(axis=0).max() < 0.2 * 60  # what a choice leaves out is bounded: the price of coding a cell
        sent.append(coded.symbols)
        sizes.append(sum(map(len, coded.payloads)))
    assert sum(sizes[3:]) < 0.45 * alone


@pytest.mark.parametrize("point", ["coarse", "fine"])
def test_a_moving_camera_costs_no_more_than_coding_alone(point: str) -> None:
    rng = np.random.default_rng(8)
    wide = rng.normal(size=(C, H + 2, 60))
    wide = sum(wide[:, dy : dy + H, dx : dx + 58] for dy in range(3) for dx in range(3)) / np.arange(1, C + 1)[:, None, None]
    frames = [wide[:, :, int(2.6 * t) : int(2.6 * t) + W].astype(np.float32) for t in range(14)]
    reference, spent, alone = COMPILED.quantise([frames[0]], point), 0, 0
    for number, latent in enumerate(frames[1:], 1):
        coded = COMPILED.compress([latent], point, reference, number - 1)
        spent += sum(map(len, coded.payloads))
        alone += sum(map(len, COMPILED.encode(COMPILED.quantise([latent], point))))
        reference = coded.symbols
    assert spent <= 1.01 * alone


def test_the_price_of_a_bit_buys_accuracy() -> None:
    clip = scene(np.random.default_rng(8), 12)
    found = []
    for price in (0.0, 0.2, 2.0):
        spec = {**SPEC, "points": [{**p, "price": price} for p in SPEC["points"]]}
        codec, size, error = LearnedCodec(spec, PART), 0, 0.0
        held = codec.quantise([clip[0]], "fine")
        for number, latent in enumerate(clip[1:]):
            coded = codec.compress([latent], "fine", held, number)
            held = coded.symbols
            size += sum(map(len, coded.payloads))
            error += float(np.square(latent - codec.dequantise(held)[0]).sum())
        found.append((size, error))
    assert found[0][0] > found[1][0] > found[2][0]
    assert found[0][1] < found[1][1] < found[2][1]


def test_a_frame_predicted_from_what_is_not_held_asks_for_a_key_frame() -> None:
    clip = scene(np.random.default_rng(9), 3)
    reference, other = (COMPILED.quantise([z], "fine") for z in (clip[0], BEFORE[0]))
    payloads = COMPILED.compress([clip[1]], "fine", reference, 5).payloads
    with pytest.raises(PayloadError, match="which is not held: send a key frame"):
        COMPILED.decode(payloads)
    with pytest.raises(PayloadError, match="which is not held"):
        COMPILED.decode(payloads, {4: reference})
    with pytest.raises(PayloadError, match="with other symbols: send a key frame"):
        COMPILED.decode(payloads, {5: other})
    with pytest.raises(PayloadError, match="with other symbols"):
        COMPILED.decode(payloads, {5: COMPILED.prefix(reference, 2)})
    # The same symbols with another past give other contexts: that is told apart too.
    twice = COMPILED.compress([clip[0]], "fine", reference, 4).symbols
    assert same(twice, Symbols(point_id="fine", tensors=reference.tensors, layers=1, layer_count=1))
    with pytest.raises(PayloadError, match="with other symbols"):
        COMPILED.decode(payloads, {5: twice})
    assert COMPILED.decode(payloads, {5: reference, 261: reference}).complete


def test_a_prefix_of_a_key_frame_serves_as_reference() -> None:
    clip = scene(np.random.default_rng(10), 2)
    base = COMPILED.prefix(COMPILED.quantise([clip[0]], "fine"), 1)
    coded = COMPILED.compress([clip[1]], "fine", base, 9)
    assert COMPILED.decode(coded.payloads, {9: base}, strict=True).crc32() == coded.symbols.crc32()


def test_no_drift_over_a_long_chain_with_losses() -> None:
    rng = np.random.default_rng(5)
    clip, held = scene(rng, 60), {}
    sent: dict[int, Symbols] = {}
    acknowledged: int | None = None
    for frame, latent in enumerate(clip):
        reference = sent.get(acknowledged) if acknowledged is not None else None
        coded = COMPILED.compress([latent], ("fine", "coarse", "fine3")[(frame % 7) // 3], reference, acknowledged)
        payloads = coded.payloads
        arrived = int(rng.integers(0, len(payloads) + 1))  # none: the frame is lost
        if arrived:
            held[frame] = COMPILED.decode(payloads[:arrived], held, strict=True)
            sent[frame] = COMPILED.prefix(coded.symbols, arrived)
            assert held[frame].crc32() == sent[frame].crc32()
            acknowledged = frame


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_any_flipped_bit_is_detected(data: st.DataObject) -> None:
    clip = scene(np.random.default_rng(12), 2, speed=2.0)
    reference, symbols = (COMPILED.quantise([z], "coarse") for z in clip)
    payloads = COMPILED.encode(symbols, reference, 300) if data.draw(st.booleans()) else COMPILED.encode(symbols)
    layer = data.draw(st.integers(0, len(payloads) - 1))
    bit = data.draw(st.integers(0, 8 * len(payloads[layer]) - 1))
    changed = bytearray(payloads[layer])
    changed[bit // 8] ^= 1 << bit % 8
    damaged = [*payloads[:layer], bytes(changed), *payloads[layer + 1 :]]
    with pytest.raises(PayloadError):
        COMPILED.decode(damaged, {300: reference}, strict=True)
    if layer:
        assert same(COMPILED.decode(damaged, {300: reference}), COMPILED.prefix(symbols, layer))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_forged_but_well_sealed_payloads_never_crash_a_decoder(data: st.DataObject) -> None:
    reference = COMPILED.quantise([BEFORE[0]], "fine")
    point = data.draw(st.integers(0, 5))
    count = data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        header = PredictedHeader(
            kind="learned",
            point_index=point,
            reference_byte=1,
            density=data.draw(st.integers(0, 5)),
            scene=data.draw(st.booleans()),
        )
        payloads = [seal_predicted(header, data.draw(st.binary(max_size=200)), reference.crc32())]
    else:
        bodies = data.draw(st.lists(st.binary(max_size=200), min_size=1, max_size=count))
        payloads = seal(Header(kind="learned", point_index=point, layer_count=count), bodies)
    outcomes = []
    for codec in (COMPILED, PURE):
        try:
            outcomes.append(codec.decode(payloads, {1: reference}, strict=True).crc32())
        except PayloadError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@given(payloads=st.lists(st.binary(max_size=80), max_size=4))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(payloads: list[bytes]) -> None:
    with pytest.raises(PayloadError):
        COMPILED.decode(payloads)


def test_layers_of_different_frames_do_not_mix() -> None:
    a, b = (COMPILED.encode(COMPILED.quantise([z], "fine")) for z in NOW[:2])
    assert COMPILED.decode([a[0], b[1], b[2]]).layers == 1
    assert COMPILED.decode([a[0], a[2], a[1]]).layers == 1


def test_wrong_input_is_named() -> None:
    with pytest.raises(ModelError, match="NaN"):
        COMPILED.quantise([np.full((C, H, W), np.nan, np.float32)], "fine")
    assert COMPILED.quantise([np.full((C, H, W), np.inf, np.float32)], "fine").tensors[0].max() == 2047
    with pytest.raises(ConfigError, match="no codec point"):
        COMPILED.quantise([NOW[0]], "finest")
    with pytest.raises(ConfigError, match="shape"):
        COMPILED.quantise([NOW[0][:, :3]], "fine")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("shape", [C + 1, H, W]),
        ("shape", [C, 0, W]),
        ("shape", [C, 1 << 20, 1 << 20]),
        ("gains", [[1.0] * C]),
        ("gains", [[0.0] * C, [1.0] * C]),
        ("points", []),
        ("points", [{"id": "a", "tier": 2, "channels": 1}]),
        ("points", [{"id": "a", "tier": 0, "channels": 0}]),
        ("points", [{"id": "a", "tier": 0, "channels": 1}] * 2),
        ("tables", None),
    ],
)
def test_a_broken_spec_is_a_bundle_error(key: str, value: object) -> None:
    with pytest.raises(BundleError):
        codec_from_spec({**copy.deepcopy(SPEC), key: value}, lambda _: PART)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_altered_tables_are_a_bundle_error_or_still_a_codec(data: st.DataObject) -> None:
    changed = bytearray(PART)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(PART) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(PART), len(PART) // 2, 3, 0]))
    try:
        codec = LearnedCodec(SPEC, bytes(changed[:cut]))
    except BundleError:
        return
    symbols = codec.quantise([NOW[0]], "fine")
    assert same(codec.decode(codec.encode(symbols), strict=True), symbols)


def test_fitting_refuses_what_does_not_fit_together() -> None:
    symbols = np.zeros((2, C, H, W), np.int32)
    with pytest.raises(ConfigError, match="layers must rise"):
        fit_tables([symbols], (2, 2, 6))
    with pytest.raises(ConfigError, match="layers must rise"):
        fit_tables([symbols], (2, 4))
    with pytest.raises(ConfigError, match="every gain tier"):
        fit_tables([], (6,))
    with pytest.raises(ConfigError, match="the codec's gains"):
        fit_tables([symbols], LAYERS, clips=[np.zeros((2, C, H, W))])
    with pytest.raises(ConfigError, match="two frames or more"):
        fit_tables([symbols], LAYERS, clips=[np.zeros((1, C, H, W))], gains=GAINS[:1])
    with pytest.raises(ConfigError, match="in which more moves"):
        fit_tables([symbols], LAYERS, clips=[np.zeros((3, C, H, W))], gains=GAINS[:1])


def test_prediction_is_fitted_anew_and_key_frames_and_the_choice_stay() -> None:
    part = refit_predicted(PART, [scene(np.random.default_rng(20 + i), 10, speed=1.0) for i in range(6)], GAINS)
    codec = LearnedCodec(SPEC, part)
    clip, total = scene(np.random.default_rng(27), 10, speed=1.0), [0, 0]
    held = COMPILED.quantise([clip[0]], "fine")
    for number, latent in enumerate(clip[1:]):
        was, now = (c.compress([latent], "fine", held, number) for c in (COMPILED, codec))
        assert now.predicted
        assert was.symbols.crc32() == now.symbols.crc32()
        total = [n + sum(map(len, coded.payloads)) for n, coded in zip(total, (was, now), strict=True)]
        held = now.symbols
    assert total[1] < total[0]
    symbols = COMPILED.quantise([NOW[0]], "fine")
    assert codec.encode(symbols) == COMPILED.encode(symbols)
    assert part != PART
    old = (Path(__file__).parents[2] / "golden" / "codec" / "tables.bin").read_bytes()
    clips = [np.random.default_rng(i).normal(size=(6, 24, 5, 5)).astype(np.float32) for i in range(3)]
    assert read_tables(old).predicted is None
    assert read_tables(refit_predicted(old, clips, np.ones((2, 24)))).predicted is not None
    with pytest.raises(ConfigError, match="gains, 2 x 24"):
        refit_predicted(old, clips, np.ones((3, 24)))


def test_a_sites_scene_makes_key_frames_cheap_and_steps_aside_elsewhere() -> None:
    rng = np.random.default_rng(30)
    clip = scene(rng, 14, speed=2.0)  # what moves is soon gone
    others = [scene(np.random.default_rng(40 + i), 10) for i in range(6)]
    part = with_scene(refit_predicted(PART, [clip, *others], GAINS), np.median(clip, 0), GAINS)
    codec, pure = LearnedCodec(SPEC, part), LearnedCodec(SPEC, part, coder="pure")
    for point in codec.point_ids:
        key = codec.compress([clip[1]], point)
        assert not key.predicted
        assert pure.compress([clip[1]], point).payloads == key.payloads
        assert len(key.payloads) == 1
        assert sum(map(len, key.payloads)) < 0.7 * sum(map(len, COMPILED.compress([clip[1]], point).payloads))
        for reader in (codec, pure):  # nothing has to be held for it
            assert reader.decode(key.payloads, strict=True).crc32() == key.symbols.crc32()
        with pytest.raises(PayloadError, match="this bundle holds none: send a key frame"):
            COMPILED.decode(key.payloads)
        alone = COMPILED.compress([clip[1]], point).symbols
        left = [np.abs(c.dequantise(k)[0] - clip[1]).mean() for c, k in ((codec, key.symbols), (COMPILED, alone))]
        assert left[0] < 1.3 * left[1], "told from the scene it is hardly coarser than alone"
    follows = codec.compress([clip[2]], "fine", codec.compress([clip[1]], "fine").symbols, 1)
    assert follows.predicted
    elsewhere = codec.compress([-3 * smooth(rng, 1)[0]], "fine")
    assert len(elsewhere.payloads) == codec.layer_count("fine")
    other = with_scene(part, clip[0] + 1, GAINS)
    with pytest.raises(PayloadError, match="another scene: send a key frame"):
        LearnedCodec(SPEC, other).decode(codec.compress([clip[1]], "fine").payloads)
    wide = {**SPEC, "shape": [C, H, W + 1]}
    with pytest.raises(BundleError, match="the bundle's scene is of shape"):
        LearnedCodec(wide, part)


def test_tables_without_clips_and_odd_planes_still_code() -> None:
    rng = np.random.default_rng(1)
    for shape in ((3, 1, 1), (3, 2, 13), (3, 13, 13)):
        part = fit_tables([rng.integers(-2, 3, size=(4, *shape))], (1, 3))
        spec = learned_spec(shape=shape, gains=np.ones((1, 3)), ungains=np.ones((1, 3)), points={"p": (0, 3)}, tables_path="t")
        codec = codec_from_spec(spec, lambda _, part=part: part)
        assert not codec.supports_reference
        symbols = codec.quantise([rng.normal(size=shape).astype(np.float32) * 30], "p")
        payloads = codec.encode(symbols, symbols, 1)
        assert same(codec.decode(payloads, strict=True), symbols)
