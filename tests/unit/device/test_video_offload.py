"""H.264 on the device: when a frame may depend on the one before, what each choice then costs, and a device without an encoder."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from edge_client.control import ControlConfig, Controller, Offload, Split
from edge_client.device import video as module
from edge_client.device.video import VideoChain, VideoSender, is_hopeless
from protos.errors import LimitError, ModelError, OverloadedError, PayloadError
from protos.messages import Result
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.runtime.h264 import SOFTWARE

MS = 1_000_000


def q(value: float) -> Quantiles:
    return Quantiles(p50=value, p95=value)


def video(quality: int, size_px: int, n_bytes: float, accuracy: float, key: float = 12_000) -> OffloadOption:
    return OffloadOption(
        format="h264",
        quality=quality,
        size_px=size_px,
        payload_bytes=q(n_bytes),
        key_bytes=q(key),
        accuracy=accuracy,
        encode_ms=q(2),
    )


# ------------------------------------------------------------------ the chain


def test_a_frame_depends_on_the_one_encoded_before() -> None:
    chain = VideoChain()
    for wire_id, wanted in ((3, None), (5, 3), (6, 5)):
        assert chain.take(320) == wanted
        chain.queued(wire_id, wanted)
    assert chain.standing_px == 320
    assert chain.take(240) is None, "another size is another stream"


def test_a_frame_that_was_encoded_and_not_sent_ends_the_stream() -> None:
    chain = VideoChain()
    chain.queued(0, chain.take(0))
    assert chain.take(0) == 0  # encoded, and then it did not fit the grant
    assert chain.standing_px is None
    assert chain.take(0) is None


def test_a_frame_held_back_takes_those_with_it_that_depend_on_it() -> None:
    chain = VideoChain()
    for wire_id in range(3):
        chain.queued(wire_id, chain.take(0))
    assert chain.holds(1)
    chain.lost(1)
    assert not chain.holds(1)
    assert not chain.holds(2)
    assert chain.holds(None)
    assert chain.take(0) is None


def test_what_is_lost_while_the_next_frame_is_encoded_counts() -> None:
    chain = VideoChain()
    chain.queued(0, chain.take(0))
    reference = chain.take(0)
    chain.lost(0)
    chain.queued(1, reference)
    assert not chain.holds(reference)
    assert chain.take(0) is None


def test_news_of_an_older_stream_or_of_other_frames_changes_nothing() -> None:
    chain = VideoChain()
    chain.queued(0, chain.take(0))
    chain.lost(0)
    chain.queued(4, chain.take(0))
    chain.lost(0)
    chain.lost(3)
    assert chain.take(0) == 4


def test_a_frame_refused_but_decoded_may_be_referred_to() -> None:
    chain = VideoChain()
    chain.queued(0, chain.take(0))
    chain.answered(Result(frame_id=0, error=OverloadedError("late"), layers_decoded=1))
    assert chain.standing_px == 0
    chain.answered(Result(frame_id=0, error=OverloadedError("refused at the door")))
    assert chain.standing_px is None


def test_a_new_session_begins_with_a_key_frame() -> None:
    chain = VideoChain()
    chain.queued(0, chain.take(0))
    chain.reset()
    assert chain.take(0) is None


def test_which_refusals_end_video_for_good() -> None:
    assert is_hopeless(PayloadError("cannot be decoded"), key=True)
    assert not is_hopeless(PayloadError("its reference is not held"), key=False)
    assert is_hopeless(LimitError("no more decoders"), key=False)
    assert not is_hopeless(OverloadedError("busy"), key=True)


# ------------------------------------------------------------------ the encoder


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (48, 64, 3)).astype(np.uint8)


def test_sizes_and_references_of_what_is_encoded() -> None:
    sender = VideoSender((48, 64))
    assert sender.name
    assert sender.encode(picture(), 30, 0, None, 0).reference is None
    assert sender.encode(picture(1), 30, 0, 7, 0).reference == 7
    assert sender.encode(picture(2), 30, 24, 8, 0).reference is None, "a stream of another size begins with a key frame"
    assert sender.encode(picture(3), 40, 24, 9, 0).reference == 9, "another quality does not"


def test_an_encoder_that_does_not_work_is_replaced_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert VideoSender((48, 64), "h264_not_there").name == SOFTWARE
    assert "h264_not_there does not work" in caplog.text


def test_without_any_encoder_there_is_no_video(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "ENCODERS", ("h264_not_there",))
    sender = VideoSender((48, 64))
    assert sender.name == ""
    assert "no H.264 encoder works on this device (tried h264_not_there)" in caplog.text
    with pytest.raises(ModelError, match=r"no H\.264 encoder"):
        sender.encode(picture(), 30, 0, None, 0)
    assert VideoSender((48, 64), "off").name == ""


def test_an_encoder_that_fails_later_is_replaced_and_begins_with_a_key_frame(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(module, "find_encoder", lambda *_: "mpeg4")  # stands for a device's own
    sender = VideoSender((48, 64))
    assert sender.encode(picture(), 30, 0, 4, 500_000).reference is None
    assert sender.name == SOFTWARE
    assert "libx264 is used from here on" in caplog.text


# ------------------------------------------------------------------ the controller

POINT = OperatingPoint(id=0, channels=8, bits=4, accuracy=0.5, payload_bytes=q(900), head_ms=q(5))


def controller(mbps: float, *options: OffloadOption) -> Controller:
    made = Controller(ControlConfig(fps=10, initial_bps=mbps * 1e6), [POINT], offloads=options)
    made.estimator.on_connect(0)
    return made


def choice(c: Controller, number: int, deadline_ms: int = 120) -> Any:
    now = number * 100 * MS
    return c.decide(number, now, now + deadline_ms * MS)


def test_a_key_frame_is_paid_for_only_where_it_fits() -> None:
    options = (video(28, 0, 800, 0.9),)
    assert isinstance(choice(controller(20, *options), 0), Offload)
    narrow = controller(0.4, *options)
    assert isinstance(choice(narrow, 0), Split), "240 ms of link time for the key frame"
    narrow.on_video(0)
    assert choice(narrow, 1) == Offload(format="h264", quality=28, size_px=0), "16 ms for one that depends on another"


def test_sizes_of_key_frames_and_of_others_are_learnt_apart() -> None:
    option = video(28, 0, 800, 0.9, key=10_000)
    c = controller(20, option)
    decision = Offload(format="h264", quality=28)
    c.on_video(None)
    c.on_payload(decision, 20_000, 0)
    c.on_video(0)
    for n in range(1, 20):
        c.on_payload(decision, 200, n * 100 * MS)
    assert c._sizes is not None
    assert c._sizes.expect("h264 28", 0, 2_000 * MS).p50 == pytest.approx(200, rel=0.3)
    assert c._sizes.expect("h264 28 key", 0, 2_000 * MS).p50 > 10_000


def test_video_alone_can_be_withdrawn() -> None:
    jpeg = OffloadOption(format="jpeg", quality=80, payload_bytes=q(3000), accuracy=0.8, encode_ms=q(2))
    c = controller(20, video(28, 0, 800, 0.9), jpeg)
    c.on_video(0)
    assert choice(c, 0).name == "h264 28"
    assert c.withdraw_offloads("h264")
    assert not c.withdraw_offloads("h264")
    assert choice(c, 1).name == "jpeg 80"
    assert c.withdraw_offloads()
    assert choice(c, 2).name == "split 0"
