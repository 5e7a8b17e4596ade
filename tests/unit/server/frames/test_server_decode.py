import struct
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_server.frames.assembly import ArrivedFrame
from edge_server.frames.decode import decode_frame, decode_image, image_size
from edge_server.models import open_model
from protos.errors import HeadtailError, LimitError, PayloadError
from splitters.bundle.offload import compress
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture
from tests.fakes.server_flood import many_scans

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def coded(suffix: str, *flags: int) -> bytes:
    ok, data = cv2.imencode(suffix, PICTURE, list(flags))
    assert ok
    return data.tobytes()


KINDS = {
    "jpeg": coded(".jpg"),
    "progressive": coded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "webp": coded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80),
    "lossless": coded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_read_from_headers_and_pictures_decode(kind: str) -> None:
    assert image_size(KINDS[kind]) == (40, 24)
    assert decode_image(KINDS[kind], (24, 40), 10_000).shape == (24, 40, 3)


def test_extended_webp_says_its_canvas() -> None:
    head = b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<II", 10, 0) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little")
    assert image_size(head) == (640, 480)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    data = bytearray(KINDS["jpeg"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(LimitError, match="60000x60000"):
        decode_image(bytes(data), (24, 40), 1 << 20)


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each goes over all pixels: four megabytes of them took minutes of a thread."""
    data = many_scans(24, 100_000)
    assert data.count(b"\xff\xda") > 1000
    with pytest.raises(LimitError, match="scans"):
        decode_image(data, (24, 24), 10_000)
    assert decode_image(many_scans(24, 750), (24, 24), 10_000).shape == (24, 24, 3), "a few more than usual are decoded"


@pytest.mark.parametrize("filling", [b"\xff\xfe\x00\x02", b"\xff\xd0", b"\xff", b"\xff\x01"])
def test_a_header_without_end_is_given_up(filling: bytes) -> None:
    with pytest.raises(PayloadError, match="too much before its size"):
        image_size(b"\xff\xd8" + filling * 1_000_000)


def test_what_a_frame_says_of_its_operating_point_is_checked(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    model, device = open_model(bundle.path), Device(bundle)
    points = [point.id for point in bundle.points]
    payload = tuple(device.payloads(picture(), points[0]))
    frame = ArrivedFrame(frame_id=0, layers=payload, operating_point=points[0])
    assert decode_frame(model, frame, {}, max_pixels=1).symbols is not None
    for said in (points[1], 999):
        with pytest.raises(PayloadError, match=f"operating point {said}"):
            decode_frame(model, replace(frame, operating_point=said), {}, max_pixels=1)


def test_another_size_than_the_models_is_refused() -> None:
    with pytest.raises(PayloadError, match="40x24"):
        decode_image(KINDS["jpeg"], (32, 32), 1 << 20)


def test_a_reduced_picture_is_enlarged_to_the_models_input() -> None:
    assert decode_image(compress(PICTURE, image_format="jpeg", quality=80, size_px=12), (24, 40), 1 << 20).shape == (24, 40, 3)
    with pytest.raises(PayloadError, match="quarter"):
        decode_image(compress(PICTURE, image_format="jpeg", quality=80, size_px=5), (24, 40), 1 << 20)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a" + bytes(40), b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPVP8X", bytes(64)]
)
def test_what_is_no_picture_is_a_payload_error(data: bytes) -> None:
    with pytest.raises(PayloadError):
        image_size(data)


@given(
    st.sampled_from(sorted(KINDS)), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6), st.integers(0, 4000)
)
def test_mutated_pictures_end_in_a_picture_or_a_mapped_error(kind: str, edits: list, keep: int) -> None:
    data = bytearray(KINDS[kind])
    for at, value in edits:
        data[at % len(data)] = value
    try:
        picture = decode_image(bytes(data[: keep or len(data)]), (24, 40), 10_000)
    except HeadtailError:
        return
    assert picture.shape == (24, 40, 3)
