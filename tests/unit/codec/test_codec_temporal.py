"""Bookkeeping of temporal prediction: only acknowledged layers, bounded history, exact after any loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import PayloadError
from splitters.codec import Predictor, ReferenceStore, Symbols
from tests.fakes.symbols import same
from tests.unit.codec.test_codec_learned import BEFORE, COMPILED, scene, smooth


def symbols_of(step: int, point: str = "fine") -> Symbols:
    return COMPILED.quantise([BEFORE[0] + 0.02 * step], point)


def test_the_newest_acknowledged_frame_is_the_reference() -> None:
    predictor = Predictor(COMPILED)
    assert predictor.choose() == (None, None)
    for frame in range(4):
        predictor.sent(frame, symbols_of(frame), reference=None if frame == 0 else 0)
    assert predictor.choose() == (None, None)
    assert predictor.acknowledged(2, 3, symbols_of(2).crc32())
    assert predictor.acknowledged(1, 3, symbols_of(1).crc32())
    reference, frame = predictor.choose()
    assert frame == 2
    assert reference is not None
    assert same(reference, symbols_of(2))


def test_only_acknowledged_layers_are_referred_to() -> None:
    predictor = Predictor(COMPILED)
    predictor.sent(7, symbols_of(0), reference=None)
    base = COMPILED.prefix(symbols_of(0), 1)
    assert predictor.acknowledged(7, 1, base.crc32())
    reference, _ = predictor.choose()
    assert reference is not None
    assert same(reference, base)
    assert predictor.acknowledged(7, 3, symbols_of(0).crc32())
    reference, _ = predictor.choose()
    assert reference is not None
    assert reference.layers == 3


def test_a_wrong_acknowledgement_is_not_believed() -> None:
    predictor = Predictor(COMPILED)
    predictor.sent(7, symbols_of(0), reference=None)
    assert not predictor.acknowledged(7, 9, symbols_of(0).crc32())
    assert not predictor.acknowledged(7, 3, symbols_of(0).crc32() ^ 1)
    assert predictor.acknowledged(99, 3, 0)
    assert predictor.choose() == (None, None)


def test_a_key_frame_comes_after_a_reset_and_at_the_interval() -> None:
    predictor = Predictor(COMPILED, key_interval_frames=3)
    keys = []
    for frame in range(9):
        reference, _ = predictor.choose()
        keys.append(reference is None)
        predictor.sent(frame, symbols_of(frame), reference=None if reference is None else frame - 1)
        assert predictor.acknowledged(frame, 3, symbols_of(frame).crc32())
    assert keys == [True, False, False] * 3
    predictor.reset()
    assert predictor.choose() == (None, None)


def test_the_client_never_names_a_frame_the_server_has_forgotten() -> None:
    predictor, store = Predictor(COMPILED, max_frames=4), ReferenceStore(max_frames=4)
    for frame in range(20):
        coded = COMPILED.compress([BEFORE[0] + 0.002 * frame], "fine", *predictor.choose())
        predictor.sent(frame, coded.symbols, reference=coded.reference)
        decoded = COMPILED.decode(coded.payloads, store, strict=True)
        store.add(frame, decoded)
        if frame == 0:  # the acknowledgements of all later frames are lost
            predictor.acknowledged(frame, decoded.layers, decoded.crc32())
        assert coded.predicted == (1 <= frame <= 4)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_exact_after_losses_reconnects_and_restarts(data: st.DataObject) -> None:
    """Frames lost, cut to a prefix or late, acknowledgements lost, the server's memory gone: never a wrong symbol."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    predictor, store = Predictor(COMPILED, max_frames=6), ReferenceStore(max_frames=6)
    latent = BEFORE[1].copy()
    refused: list[str] = []
    predicted = 0
    for frame in range(30):
        latent += 0.01 * smooth(rng, 1)[0]
        if rng.random() < 0.05:
            store.clear()  # the server restarts, the client does not know yet
        point = str(rng.choice(COMPILED.point_ids))
        coded = COMPILED.compress([latent], point, *predictor.choose())
        payloads = coded.payloads
        predictor.sent(frame, coded.symbols, reference=coded.reference)
        arrived = payloads[: int(rng.integers(0, len(payloads) + 1))]
        if not arrived:
            continue
        try:
            decoded = COMPILED.decode(arrived, store, strict=True)
        except PayloadError as error:
            refused.append(error.message)
            predictor.refused(frame)
            assert predictor.choose() == (None, None)  # what was acknowledged is gone with the server's memory
            coded = COMPILED.compress([latent], point, *predictor.choose())
            payloads = coded.payloads
            predictor.sent(frame, coded.symbols, reference=None)
            decoded = COMPILED.decode(payloads, store, strict=True)
        predicted += coded.predicted
        assert decoded.crc32() == COMPILED.prefix(coded.symbols, decoded.layers).crc32()
        store.add(frame, decoded)
        if rng.random() < 0.8:
            assert predictor.acknowledged(frame, decoded.layers, decoded.crc32())
    assert predicted
    assert all("send a key frame" in message for message in refused)


def test_the_store_is_bounded_in_frames_and_bytes() -> None:
    one = sum(t.nbytes for t in symbols_of(0).tensors)
    store = ReferenceStore(max_frames=3, max_bytes=one * 2)
    for frame in range(5):
        store.add(frame, symbols_of(frame))
    assert list(store) == [3, 4]
    assert store.held_bytes == 2 * one
    store.add(4, symbols_of(9))
    assert (len(store), store.held_bytes) == (2, 2 * one)
    assert same(store[4], symbols_of(9))
    store.clear()
    assert (len(store), store.held_bytes) == (0, 0)
    with pytest.raises(ValueError, match="at least one"):
        ReferenceStore(max_frames=0)


def one_layer(step: int) -> Symbols:
    """A predicted frame's symbols."""
    return Symbols(point_id="fine", tensors=symbols_of(step).tensors, layers=1, layer_count=1)


def test_on_a_stream_the_newest_frame_sent_is_the_reference() -> None:
    predictor = Predictor(COMPILED, reliable=True)
    predictor.sent(0, symbols_of(0), reference=None)
    assert predictor.choose() == (None, None)  # of three layers, none of which has gone out yet
    for layer in range(2):
        predictor.delivered(0, layer)
        assert predictor.choose() == (None, None)
    predictor.delivered(0, 2)
    assert predictor.choose()[1] == 0
    predictor.sent(1, one_layer(1), reference=0)
    assert predictor.choose()[1] == 0  # it waits in a queue, and may be held back
    predictor.delivered(1, 0)
    assert predictor.choose()[1] == 1
    assert predictor.acknowledged(0, 3, symbols_of(0).crc32())
    assert predictor.choose()[1] == 1


def test_a_frame_that_did_not_go_out_takes_what_refers_to_it_along() -> None:
    predictor = Predictor(COMPILED, reliable=True)
    predictor.sent(0, symbols_of(0), reference=None)
    predictor.delivered(0, 2)
    assert predictor.acknowledged(0, 3, symbols_of(0).crc32())
    for frame in (1, 2, 3):
        predictor.sent(frame, one_layer(frame), reference=frame - 1)
        predictor.delivered(frame, 0)
    predictor.lost(2)
    assert predictor.choose()[1] == 1
    predictor.refused(3)  # its answer comes later, and changes nothing
    assert predictor.choose()[1] == 1
    predictor.sent(4, one_layer(4), reference=1)
    predictor.delivered(4, 0)
    predictor.refused(4)  # the server does not hold 1, so neither 4
    assert predictor.choose()[1] == 0
    predictor.sent(5, one_layer(5), reference=0)
    predictor.refused(5)  # nor what it had acknowledged: its memory is gone
    assert predictor.choose() == (None, None)


def test_a_key_frame_that_arrived_in_part_is_no_whole_reference() -> None:
    predictor = Predictor(COMPILED, reliable=True)
    predictor.sent(0, symbols_of(0), reference=None)
    predictor.delivered(0, 2)
    predictor.sent(1, one_layer(1), reference=0)
    base = COMPILED.prefix(symbols_of(0), 1)
    assert predictor.acknowledged(0, 1, base.crc32())
    reference, frame = predictor.choose()
    assert frame == 0
    assert reference is not None
    assert same(reference, base)


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_stays_exact_whatever_the_server_refuses(seed: int) -> None:
    """Frames not sent, refused undecoded, a server whose memory is gone; answers three frames late: never a wrong symbol."""
    rng = np.random.default_rng(seed)
    predictor, store = Predictor(COMPILED, reliable=True), ReferenceStore()
    clip = scene(rng, 80)
    answers: list[tuple[int, Symbols | None, bool]] = []
    good = ages = 0
    for frame, latent in enumerate(clip):
        if len(answers) == 3:  # the round trip
            number, decoded, payload_error = answers.pop(0)
            if decoded is not None:
                assert predictor.acknowledged(number, decoded.layers, decoded.crc32())
            elif payload_error:
                predictor.refused(number)
            else:
                predictor.lost(number)
        coded = COMPILED.compress([latent], "fine", *predictor.choose())
        predictor.sent(frame, coded.symbols, reference=coded.reference)
        for layer in range(len(coded.payloads)):
            predictor.delivered(frame, layer)
        fate = rng.random()
        if fate < 0.03:
            predictor.lost(frame)  # held back by the sender
            continue
        if fate < 0.06:
            answers.append((frame, None, False))  # refused before it was decoded
            continue
        if fate < 0.07:
            store.clear()
        try:
            decoded = COMPILED.decode(coded.payloads, store, strict=True)
        except PayloadError:
            answers.append((frame, None, True))
            continue
        assert decoded.crc32() == coded.symbols.crc32()
        store.add(frame, decoded)
        answers.append((frame, decoded, False))
        good += 1
        ages += coded.reference == frame - 1
    assert good > 50
    assert ages > 40
