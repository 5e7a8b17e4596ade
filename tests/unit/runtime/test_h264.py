"""H.264 for offload: what one side codes the other decodes, each frame at its own quality; nothing else is let through."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest

from protos.errors import MissingDependencyError, PayloadError
from splitters.runtime.h264 import SOFTWARE, H264Decoder, H264Encoder, Picture, find_encoder, padded_pixels, reduced, video_size
from splitters.runtime.h264_stream import VideoPayload, picture_units, split_units

SIZE = (64, 48)
PIXELS = padded_pixels((48, 64))


def clip(count: int) -> list[Picture]:
    """A smooth scene that pans, with a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:64]
    frames = []
    for t in range(count):
        waves = [128 + 90 * np.sin((x + 2 * t) / p + y / q) for p, q in ((5, 9), (7, 6), (11, 8))]
        frames.append(np.clip(np.stack(waves, -1) + rng.normal(0, 2, (48, 64, 3)), 0, 255).astype(np.uint8))
    return frames


def coded(count: int = 6, quality: int = 30) -> list[tuple[bytes, bool]]:
    encoder = H264Encoder(SOFTWARE, SIZE)
    return [encoder.encode(p, quality) for p in clip(count)]


def wrapped(frames: list[tuple[bytes, bool]]) -> list[bytes]:
    return [VideoPayload(units=u, reference=None if key else n - 1).to_bytes() for n, (u, key) in enumerate(frames)]


def off(seen: Picture, wanted: Picture) -> float:
    return float(np.abs(seen.astype(int) - wanted).mean())


def test_each_frame_has_its_own_quality_without_a_key_frame() -> None:
    encoder, decoder, pictures = H264Encoder(SOFTWARE, SIZE), H264Decoder(PIXELS), clip(24)
    errors: dict[int, list[float]] = {16: [], 46: []}
    sizes: dict[int, list[int]] = {16: [], 46: []}
    for number, picture in enumerate(pictures):
        quality = 16 if number // 4 % 2 else 46
        units, key = encoder.encode(picture, quality)
        assert key == (number == 0)
        if number:
            sizes[quality].append(len(units))
            errors[quality].append(off(decoder.decode(units), picture))
        else:
            decoder.decode(units)
    assert np.median(sizes[16]) > 2 * np.median(sizes[46])
    assert np.median(errors[16]) < np.median(errors[46])


def test_a_key_frame_on_request_begins_a_stream_of_its_own() -> None:
    encoder, pictures = H264Encoder(SOFTWARE, SIZE), clip(8)
    frames = [encoder.encode(p, 28, key=n == 5) for n, p in enumerate(pictures)]
    assert [key for _, key in frames] == [True, False, False, False, False, True, False, False]
    whole, late = H264Decoder(PIXELS), H264Decoder(PIXELS)
    seen = [whole.decode(units) for units, _ in frames]
    again = [late.decode(units) for units, _ in frames[5:]]
    assert all(np.array_equal(a, b) for a, b in zip(again, seen[5:], strict=True))


def test_what_no_receiver_needs_does_not_travel() -> None:
    units, key = coded(1)[0]
    assert key
    assert {unit[0] & 0x1F for unit in split_units(units)} == {5, 7, 8}
    assert picture_units(b"\0\0\0\1\x06settings" + units) == (units, True)


def test_sizes_are_even_and_never_enlarged() -> None:
    assert video_size((416, 416), 0) == (416, 416)
    assert video_size((299, 299), 0) == (298, 298)
    assert video_size((320, 640), 160) == (320, 160)
    assert video_size((320, 320), 1000) == (320, 320)
    assert reduced(clip(1)[0], (32, 24)).shape == (24, 32, 3)


def test_payloads_say_which_frame_they_depend_on() -> None:
    payloads = [VideoPayload.from_bytes(p) for p in wrapped(coded(3))]
    assert [p.reference for p in payloads] == [None, 0, 1]
    assert payloads[2].depends_on(1)
    assert payloads[2].depends_on(1 + 2**32)
    assert not payloads[2].depends_on(2)
    assert not payloads[0].depends_on(0)


KEY, NEXT = (u for u, _ in coded(2))
START = b"\0\0\0\1"
FIRST_SLICE = START + split_units(NEXT)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\x00" + KEY,
        b"\x01\x07" + KEY,
        b"\x01\x01\x00\x00",
        b"\x01\x00" + NEXT,  # a key frame without a picture of its own
        b"\x01\x01\0\0\0\0" + KEY,
        b"\x01\x01\0\0\0\0" + NEXT + NEXT,  # two pictures
        b"\x01\x00" + KEY + FIRST_SLICE,
        b"\x01\x00" + KEY + START + split_units(KEY)[0],  # two parameter sets
        b"\x01\x00" + START + split_units(KEY)[0] + bytes([1]) * 600 + KEY,
        b"\x01\x01\0\0\0\0" + NEXT + (START + bytes([split_units(NEXT)[0][0], 0x40])) * 9,  # more slices than any encoder writes
        b"\x01\x01\0\0\0\0" + NEXT + START + b"\x06about",
        b"\x01\x01\0\0\0\0" + NEXT + START + b"\x02partition",
    ],
)
def test_nothing_but_one_picture_is_let_through(data: bytes) -> None:
    with pytest.raises(PayloadError):
        VideoPayload.from_bytes(data)


def test_thousands_of_skipped_pictures_in_one_payload_are_refused_before_the_decoder() -> None:
    encoder, still = H264Encoder(SOFTWARE, SIZE), clip(1)[0]
    units = [encoder.encode(still, 51)[0] for _ in range(4)][-1]
    assert len(units) < 100
    with pytest.raises(PayloadError, match="one picture"):
        VideoPayload.from_bytes(VideoPayload(units=units * 4000, reference=0).to_bytes())


def test_a_picture_larger_than_allowed_is_refused() -> None:
    with pytest.raises(PayloadError, match="too large"):
        H264Decoder(PIXELS - 1).decode(KEY)
    assert H264Decoder(PIXELS).decode(KEY).shape == (48, 64, 3)


def test_a_predicted_frame_alone_is_an_error() -> None:
    with pytest.raises(PayloadError):
        H264Decoder(PIXELS).decode(NEXT)


def test_a_damaged_stream_is_a_picture_or_a_plain_error() -> None:
    rng, good = random.Random(1), coded(5)
    outcomes = {"picture": 0, "error": 0}
    for _ in range(400):
        decoder = H264Decoder(PIXELS)
        for units, key in good:
            data = bytearray(VideoPayload(units=units, reference=None if key else 0).to_bytes())
            for _ in range(rng.choice((0, 0, 1, 3))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            data = data[: rng.randrange(len(data))] if rng.random() < 0.05 else data
            try:
                picture = decoder.decode(VideoPayload.from_bytes(bytes(data)).units)
            except PayloadError:
                outcomes["error"] += 1
                break
            assert picture.ndim == 3
            assert picture.shape[0] * picture.shape[1] <= PIXELS
            outcomes["picture"] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_the_first_encoder_that_works_is_found_and_the_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "splitters.runtime.h264")
    assert find_encoder(SIZE, ("h264_not_there", "mpeg4", SOFTWARE)) == SOFTWARE  # mpeg4 opens, and is no H.264
    assert "h264_not_there" in caplog.text
    assert find_encoder(SIZE, ("h264_not_there",)) == ""
    with pytest.raises(MissingDependencyError, match="h264_not_there"):
        H264Encoder("h264_not_there", SIZE, bitrate_bps=100_000)
