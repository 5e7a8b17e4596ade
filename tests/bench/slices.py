"""What four slices that decode alone cost in bytes, and what a classifier loses where some of them are missing.

    python -m tests.bench.slices --data DATA BUNDLE [BUNDLE ...]        # half a minute a bundle
    python -m tests.bench.slices --data DATA --lost 1 --photos 200 BUNDLE

Bytes are of key frames of photographs, headers and checksums included. Which slices are missing is drawn with a seed; the
accuracy is that of the bundle's own tail, holes filled as the server fills them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from protos.messages import SLICES
from splitters.bundle import open_bundle
from splitters.codec.slices import ALL, unpack
from splitters.runtime.tail import load_tail
from tests.fakes.server_client import Device

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


def accuracy(bundle: Path, photos: list[Path], classes: dict[str, int], point: int) -> list[float]:
    """Share of right answers with none, one, two and three slices missing."""
    opened = open_bundle(bundle)
    device, tail, dice = Device(opened), load_tail(opened), np.random.default_rng(0)
    right = [0] * SLICES
    for photo in photos:
        picture = cv2.imread(str(photo))
        assert picture is not None
        height, width = picture.shape[:2]
        whole = device.codec.quantise(device.latents(picture.astype(np.uint8), point), device.bundle.point(point).codec_point)
        order = dice.permutation(SLICES)
        for lost in range(SLICES):
            held = ALL - sum(1 << int(index) for index in order[:lost])
            symbols = device.codec.with_holes(whole, held) if lost else whole
            (answer,) = tail.run([x[None] for x in device.codec.dequantise(symbols)], [(width, height)])
            right[lost] += answer.top[0].class_id == classes[photo.parent.name]
    return [round(hits / len(photos), 4) for hits in right]


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=12, help="how many, drawn with a seed (default %(default)s)")
    parser.add_argument("--lost", type=int, metavar="POINT", help="accuracy of this operating point with slices missing, instead")
    parser.add_argument("bundles", type=Path, nargs="+")
    args = parser.parse_args()
    root = args.data / "imagenette160"
    files = sorted((root / "val").rglob("*.JPEG"))
    photos = [files[int(i)] for i in np.random.default_rng(0).choice(len(files), args.photos, replace=False)]
    if args.lost is not None:
        classes = json.loads((root / "imagenet_class_index.json").read_text())
        found = {bundle.name: accuracy(bundle, photos, classes, args.lost) for bundle in args.bundles}
        for name, shares in found.items():
            print(f"{name} {args.lost}: right with none, one, two, three of four slices missing: {shares}, {len(photos)} photos")
        print(json.dumps({"slices_lost": found}))
        return
    table = {bundle.name: cost(bundle, photos) for bundle in args.bundles}
    for name, points in table.items():
        for point, (n_bytes, more) in points.items():
            print(f"{name} {point}: {n_bytes} bytes, in slices {more:+.1%}")
    print(json.dumps({"slices": table}))


if __name__ == "__main__":
    main()
