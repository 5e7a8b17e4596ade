"""Bookkeeping of temporal prediction: only acknowledged layers, bounded history, exact after any loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import PayloadError
from splitters.codec import Predictor, ReferenceStore, Symbols
from tests.unit.test_codec_learned import BEFORE, COMPILED, smooth


def symbols_of(step: int, point: str = "fine") -> Symbols:
    return COMPILED.quantise([BEFORE[0] + 0.02 * step], point)


def test_the_newest_acknowledged_frame_is_the_reference() -> None:
    predictor = Predictor(COMPILED)
    assert predictor.choose() == (None, None)
    for frame in range(4):
        predictor.sent(frame, symbols_of(frame), key=frame == 0)
    assert predictor.choose() == (None, None)
    assert predictor.acknowledged(2, 3, symbols_of(2).crc32())
    assert predictor.acknowledged(1, 3, symbols_of(1).crc32())
    reference, frame = predictor.choose()
    assert frame == 2
    assert reference is not None
    assert reference.equals(symbols_of(2))


def test_only_acknowledged_layers_are_referred_to() -> None:
    predictor = Predictor(COMPILED)
    predictor.sent(7, symbols_of(0), key=True)
    base = COMPILED.prefix(symbols_of(0), 1)
    assert predictor.acknowledged(7, 1, base.crc32())
    reference, _ = predictor.choose()
    assert reference is not None
    assert reference.equals(base)
    assert predictor.acknowledged(7, 3, symbols_of(0).crc32())
    reference, _ = predictor.choose()
    assert reference is not None
    assert reference.layers == 3


def test_a_wrong_acknowledgement_is_not_believed() -> None:
    predictor = Predictor(COMPILED)
    predictor.sent(7, symbols_of(0), key=True)
    assert not predictor.acknowledged(7, 3, symbols_of(0).crc32() ^ 1)
    assert not predictor.acknowledged(7, 9, symbols_of(0).crc32())
    assert predictor.acknowledged(99, 3, 0)
    assert predictor.choose() == (None, None)


def test_a_key_frame_comes_after_a_reset_and_at_the_interval() -> None:
    predictor = Predictor(COMPILED, key_interval_frames=3)
    keys = []
    for frame in range(9):
        reference, _ = predictor.choose()
        keys.append(reference is None)
        predictor.sent(frame, symbols_of(frame), key=reference is None)
        assert predictor.acknowledged(frame, 3, symbols_of(frame).crc32())
    assert keys == [True, False, False] * 3
    predictor.reset()
    assert predictor.choose() == (None, None)


def test_the_client_never_names_a_frame_the_server_has_forgotten() -> None:
    predictor, store = Predictor(COMPILED, max_frames=4), ReferenceStore(max_frames=4)
    for frame in range(20):
        coded = COMPILED.compress([BEFORE[0] + 0.002 * frame], "fine", *predictor.choose())
        predictor.sent(frame, coded.symbols, key=not coded.predicted)
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
        predictor.sent(frame, coded.symbols, key=not coded.predicted)
        arrived = payloads[: int(rng.integers(0, len(payloads) + 1))]
        if not arrived:
            continue
        try:
            decoded = COMPILED.decode(arrived, store, strict=True)
        except PayloadError as error:
            refused.append(error.message)
            predictor.reset()
            coded = COMPILED.compress([latent], point, *predictor.choose())
            payloads = coded.payloads
            predictor.sent(frame, coded.symbols, key=True)
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
    assert store[4].equals(symbols_of(9))
    store.clear()
    assert (len(store), store.held_bytes) == (0, 0)
    with pytest.raises(ValueError, match="at least one"):
        ReferenceStore(max_frames=0)
