"""What four slices that decode alone cost in bytes: key frames of photographs, headers and checksums included.

python -m tests.bench.slices --data DATA BUNDLE [BUNDLE ...]        # half a minute a bundle
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from splitters.bundle import open_bundle
from splitters.codec.slices import unpack
from tests.fakes.server_client import Device

_PHOTOS = 12
_HEADER_BYTES = 2  # of a slice, its length


def cost(bundle: Path, photos: list[Path]) -> dict[str, tuple[int, float]]:
    """By point: bytes whole, and how much more in slices, headers and checksums included."""
    device = Device(open_bundle(bundle))
    found = {}
    for point in device.bundle.points:
        whole, sliced = [], []
        for photo in photos:
            picture = cv2.imread(str(photo))
            assert picture is not None
            symbols = device.codec.quantise(device.latents(picture.astype(np.uint8), point.id), point.codec_point)
            payload = device.codec.encode_slices(symbols)
            assert payload is not None
            assert device.codec.decode_slices(payload).crc32() == symbols.crc32()
            whole.append(sum(map(len, device.codec.encode(symbols))))
            sliced.append(sum(len(piece) + _HEADER_BYTES for piece in unpack(payload) if piece is not None))
        found[str(point.id)] = (round(float(np.mean(whole))), round(float(np.sum(sliced) / np.sum(whole) - 1), 4))
    return found


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("bundles", type=Path, nargs="+")
    args = parser.parse_args()
    files = sorted((args.data / "imagenette160" / "val").rglob("*.JPEG"))
    photos = [files[int(i)] for i in np.random.default_rng(0).choice(len(files), _PHOTOS, replace=False)]
    table = {bundle.name: cost(bundle, photos) for bundle in args.bundles}
    for name, points in table.items():
        for point, (n_bytes, more) in points.items():
            print(f"{name} {point}: {n_bytes} bytes, in slices {more:+.1%}")
    print(json.dumps({"slices": table}))


if __name__ == "__main__":
    main()
