"""What the codec costs and saves: milliseconds of both range coders and zstandard, bytes with and without a reference frame.

Without arguments it runs on made-up smooth latents, needs neither weights nor data, and fits its own tables (a few
seconds). With a bundle that has a learned codec, and HEADTAIL_DATA, it also runs real photos and fixed-camera videos (their
second halves at 10 frames a second) through the bundle's head: bytes and milliseconds per frame alone and predicted from the
frame 1 or 2 before it, the symbols of both sides checked frame by frame; bytes of a still scene with sensor noise; and how many
symbols change when ONNX Runtime runs with 2 threads instead of 1.

    python -m tests.bench.codec [--bundle NAME_OR_DIR] [--data $HEADTAIL_DATA] [--frames 30] [--clips vtest.avi ...]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import zstandard
from numpy.typing import NDArray

from splitters.bundle import Bundle, open_bundle
from splitters.codec import LatentCodec, LearnedCodec, PlainCodec, Symbols, calibrate_plain, learned_spec
from splitters.codec.fitting.fit import fit_tables
from splitters.evaluation.video.clips import Part, read_clip
from splitters.evaluation.video.run import send_clip
from splitters.runtime.head import Head
from splitters.tasks.preprocess import preprocess
from splitters.zoo.defaults import ensure_exported

VIDEOS = ("vtest.avi", "person-bicycle-car-detection.mp4")
LAGS = (1, 2)
NOISE = (2, 4)  # standard deviations, of 255
STILL_FRAMES = 10
Latents = Sequence[NDArray[np.float32]]


def median_ms(call: Callable[[int], object], count: int) -> list[float]:
    """Medians of wall and of processor time over `count` calls, after three that do not count.

    On an idle machine they agree; on a busy one the second is what the work takes.
    """
    spent = []
    for i in range(-3, count):
        begun, worked = time.perf_counter_ns(), time.thread_time_ns()
        call(max(i, 0))
        if i >= 0:
            spent.append((time.perf_counter_ns() - begun, time.thread_time_ns() - worked))
    return [round(float(value), 3) for value in np.median(np.array(spent) / 1e6, axis=0)]


def smooth(rng: np.random.Generator, count: int, channels: int) -> NDArray[np.float32]:
    """Latents like an encoder's: spatially smooth, falling in strength over the channels, (count, C, 14, 14)."""
    noise = rng.normal(size=(count, channels, 16, 16))
    field = sum(noise[:, :, y : y + 14, x : x + 14] for y in range(3) for x in range(3)) / 3
    return np.asarray(field * 3 / np.sqrt(np.arange(1, channels + 1))[:, None, None], dtype=np.float32)


def time_coder(codec: LatentCodec, frames: list[Symbols], count: int) -> dict[str, Any]:
    payloads = [codec.encode(symbols) for symbols in frames]
    return {
        "bytes": round(float(np.mean([sum(map(len, p)) for p in payloads]))),
        "encode_ms": median_ms(lambda i: codec.encode(frames[i % len(frames)]), count),
        "decode_ms": median_ms(lambda i: codec.decode(payloads[i % len(frames)], strict=True), count),
    }


def made_up(count: int) -> dict[str, Any]:
    """Both coders and zstandard at three bitrates and two widths of the latent."""
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {}
    for channels in (32, 48):
        train, test = smooth(rng, 120, channels), smooth(rng, 10, channels)
        gains = np.array([[0.25], [0.8], [2.5]]) * np.ones((3, channels))
        layers = (channels // 4, channels // 2, channels)
        part = fit_tables([np.rint(train * g[:, None, None]).astype(np.int32) for g in gains], layers)
        spec = learned_spec(
            shape=(channels, 14, 14), gains=gains, ungains=1 / gains,
            points={f"gain{g[0]:g}": (i, channels) for i, g in enumerate(gains)}, tables_path="-",
        )  # fmt: skip
        for coder in ("constriction", "pure"):
            codec = LearnedCodec(spec, part, coder=coder)
            for point in codec.point_ids:
                frames = [codec.quantise([latent], point) for latent in test]
                row = time_coder(codec, frames, count if coder == "constriction" else max(1, count // 5))
                report[f"{channels} channels, {point}, {coder}"] = row
                if coder == "constriction":
                    raw = [symbols.tensors[0].astype(np.int8).tobytes() for symbols in frames]
                    report[f"{channels} channels, {point}, zstandard 19"] = time_zstandard(raw, max(1, count // 5))
    train = smooth(rng, 100, 80)
    plain = PlainCodec(calibrate_plain([train], bits=(8, 4)))
    for point in plain.point_ids:
        frames = [plain.quantise([latent], point) for latent in train[:10]]
        report[f"80 channels, plain {point}"] = time_coder(plain, frames, count)
    return report


def time_zstandard(raw: list[bytes], count: int) -> dict[str, Any]:
    """The generic coder on the same symbols, one byte each."""
    packed = [zstandard.compress(r, 19) for r in raw]
    return {
        "bytes": round(float(np.mean([len(p) for p in packed]))),
        "encode_ms": median_ms(lambda i: zstandard.compress(raw[i % len(raw)], 19), count),
        "decode_ms": median_ms(lambda i: zstandard.decompress(packed[i % len(raw)]), count),
    }


class Device:
    """A bundle's head and codec on pictures."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.bundle = bundle
        self.head = Head(bundle, threads=threads)

    def latents(self, picture: NDArray[np.uint8], number: int) -> Latents:
        """Of operating point `number`; pictures are BGR."""
        features = self.head.stem([preprocess(picture, self.bundle.manifest.preprocess)])
        return self.head.latents(features, self.bundle.points[number].graphs)


def read_codec(bundle: Bundle) -> LearnedCodec:
    spec = json.loads(bundle.read_part(bundle.manifest.codec))
    if spec.get("kind") != "learned":
        raise SystemExit(f"{bundle.path} has a {spec.get('kind')} codec; this part of the bench needs a learned one")
    return LearnedCodec(spec, bundle.read_part(spec["tables"]))


def spread(bundle: Bundle) -> list[int]:
    """Three operating points of the most accurate encoders: first, middle and last on the bitrate ladder."""
    graphs = max(bundle.points, key=lambda p: (p.accuracy, len(p.graphs))).graphs
    same = [i for i, p in enumerate(bundle.points) if p.graphs == graphs]
    return [same[0], same[len(same) // 2], same[-1]]


def video(bundle: Bundle, codec: LearnedCodec, path: Path, count: int, numbers: Sequence[int], repeat: int) -> dict[str, Any]:
    """Bytes and milliseconds per frame of a clip's second half, alone and predicted, and bytes of a still scene."""
    head = Head(bundle, threads=1)
    clip = read_clip(path, bundle.manifest.preprocess, part=Part(start=0.5), limit=count)
    report: dict[str, Any] = {}
    for number in numbers:
        point, graphs = bundle.points[number].codec_point, bundle.points[number].graphs

        def latent(shown: NDArray[np.uint8], graphs: tuple[str, ...] = graphs) -> Latents:
            return head.latents(head.stem_of(shown), graphs)

        latents = [latent(shown) for shown in clip.frames.pictures]
        alone = [codec.compress(z, point) for z in latents]
        row: dict[str, Any] = {"alone_bytes": mean_bytes([list(coded.payloads) for coded in alone])}
        row["alone_ms"] = [
            median_ms(lambda i, p=point, zs=latents: codec.compress(zs[i % len(zs)], p), repeat),
            median_ms(lambda i, coded=alone: codec.decode(coded[i % len(coded)].payloads), repeat),
        ]
        for lag in LAGS:
            row |= predicted(codec, latents, point, lag, repeat)
            row[f"lag{lag}_saved"] = round(1 - row[f"lag{lag}_bytes"] / row["alone_bytes"], 3)
        row |= {f"still_noise{sigma}_bytes": still(codec, latent, clip.frames.pictures[0], point, sigma) for sigma in NOISE}
        report[f"{path.name}, {point}"] = row
    return report


def predicted(codec: LearnedCodec, latents: Sequence[Latents], point: str, lag: int, repeat: int) -> dict[str, Any]:
    """Each frame against the one ``lag`` back."""
    sent = send_clip(codec, latents, point, lag)
    pairs = [(z, (sent.symbols[i], i)) for i, z in enumerate(latents[lag:])]
    coded = [codec.compress(z, point, *reference) for z, reference in pairs]
    for number, (each, decoded) in enumerate(zip(coded, sent.symbols[lag:], strict=True), lag):
        if each.symbols.crc32() != decoded.crc32():  # what the decoder has is what the encoder said it would have
            raise SystemExit(f"frame {number} of {point}: the decoded symbols differ")
    stores = [{i: symbols} for i, symbols in enumerate(sent.symbols[: len(pairs)])]
    return {
        f"lag{lag}_bytes": round(float(sent.sizes[lag:].mean()), 1),
        f"lag{lag}_key_frames": int((~sent.predicted[1:]).sum()),
        f"lag{lag}_ms": [
            median_ms(lambda i: codec.compress(pairs[i % len(pairs)][0], point, *pairs[i % len(pairs)][1]), repeat),
            median_ms(lambda i: codec.decode(coded[i % len(coded)].payloads, stores[i % len(stores)]), repeat),
        ],
    }


def still(
    codec: LearnedCodec, latent: Callable[[NDArray[np.uint8]], Latents], shown: NDArray[np.uint8], point: str, sigma: int
) -> float:
    """Mean bytes of predicted frames of a scene in which nothing moves, seen with a sensor's noise of this standard deviation."""
    rng = np.random.default_rng(0)
    noisy = [np.clip(np.rint(shown + rng.normal(0, sigma, shown.shape)), 0, 255).astype(np.uint8) for _ in range(1 + STILL_FRAMES)]
    return round(float(send_clip(codec, [latent(each) for each in noisy], point, 1).sizes[1:].mean()), 1)


def picture(frame: Any) -> NDArray[np.uint8]:
    """A frame as OpenCV read it, BGR as `preprocess` wants it."""
    if frame is None:
        raise SystemExit("a photo cannot be read")
    return np.ascontiguousarray(frame, dtype=np.uint8)


def mean_bytes(payloads: list[list[bytes]]) -> float:
    return round(float(np.mean([sum(map(len, p)) for p in payloads])), 1)


def threads_differ(bundle: Bundle, codec: LearnedCodec, photos: list[Path]) -> dict[str, Any]:
    """Pixels to symbols with 1 and 2 threads of ONNX Runtime: the share that differs and by how much."""
    devices = [Device(bundle, threads=threads) for threads in (1, 2)]
    number = spread(bundle)[0]
    point = bundle.points[number].codec_point
    total = different = largest = 0
    for path in photos:
        shown = picture(cv2.imread(str(path)))
        one, two = (codec.quantise(d.latents(shown, number), point).tensors[0].astype(np.int32) for d in devices)
        total += one.size
        different += int((one != two).sum())
        largest = max(largest, int(np.abs(one - two).max()))
    return {"symbols": total, "different": different, "share": different / total, "largest_step": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", help="a bundle with a learned codec, by name or path")
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), help="folder with video/ and imagenette160/")
    parser.add_argument("--frames", type=int, default=30, help="frames of each video")
    parser.add_argument("--clips", nargs="+", default=VIDEOS, help="files in the data's folder video")
    parser.add_argument("--points", type=int, nargs="+", help="operating points, by number; otherwise three of the most accurate")
    parser.add_argument("--repeat", type=int, default=100, help="timed calls of each coder")
    args = parser.parse_args()
    if args.repeat < 1 or args.frames <= max(LAGS):
        parser.error(f"--repeat must be at least 1 and --frames at least {max(LAGS) + 1}")
    report: dict[str, Any] = {"timing": made_up(args.repeat)}
    print("milliseconds are [wall, processor]")
    for name, row in report["timing"].items():
        print(f"{name:42} {row['bytes']:6} bytes   encode {row['encode_ms']} ms   decode {row['decode_ms']} ms")
    if args.bundle is not None:
        bundle = open_bundle(Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle))
        codec = read_codec(bundle)
        data = Path(args.data) if args.data else None
        if data is None:
            print("no data given (--data or HEADTAIL_DATA): no videos, no photos")
        else:
            report["video"] = {}
            for name in args.clips:
                numbers = args.points or spread(bundle)
                report["video"] |= video(bundle, codec, data / "video" / name, args.frames, numbers, args.repeat)
            for name, row in report["video"].items():
                print(f"{name:42} {row}")
            photos = sorted((data / "imagenette160" / "val").glob("*/*"))[::5]
            report["threads"] = threads_differ(bundle, codec, photos)
            print(f"symbols that differ between 1 and 2 threads: {report['threads']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
