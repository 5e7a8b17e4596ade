"""Makes the golden files of predicted frames: symbols and the exact payloads they become.

    python -m tests.golden.make_predicted

Run it only when the form changes on purpose (and raise `envelope.PREDICTED_VERSION` then). Key frames have files of their own,
which stay as version 1 wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from splitters.codec import LearnedCodec, ReferenceStore, Symbols, learned_spec
from splitters.codec.fitting.fit import fit_tables

FOLDER = Path(__file__).parent / "predicted"
SHAPE = (24, 13, 10)
LAYERS = (6, 12, 24)
GAINS = np.array([[0.7] * 24, [2.5] * 24])
POINTS = {"coarse": (0, 24), "fine": (1, 24), "fine9": (1, 9)}


def scene(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Latents of a still scene through which a blob moves: (T, C, H, W)."""
    channels, height, width = SHAPE
    strength = 3 / np.sqrt(np.arange(1, channels + 1))[:, None, None]
    noise = rng.normal(size=(channels, height + 2, width + 2))
    still = sum(noise[:, y : y + height, x : x + width] for y in range(3) for x in range(3)) / 3
    blob = rng.normal(size=(channels, 1, 1)) * 1.5
    y, x = np.mgrid[:height, :width]
    start, speed = rng.uniform(2, 8, size=2), rng.normal(0, 0.5, size=2)
    out = []
    for t in range(frames):
        near = np.exp(-(((y - start[0] - t * speed[0]) / 1.5) ** 2) - ((x - start[1] - t * speed[1]) / 1.5) ** 2)
        out.append((still + near * blob + 0.02 * rng.normal(size=SHAPE)) * strength)
    return np.asarray(out, np.float32)


def make_codec(coder: str = "auto") -> LearnedCodec:
    """The codec as its files hold it."""
    return LearnedCodec(
        json.loads((FOLDER / "codec.json").read_text(encoding="utf-8")), (FOLDER / "tables.bin").read_bytes(), coder=coder
    )


def main() -> None:
    """Writes every file."""
    rng = np.random.default_rng(21)
    clips = [scene(rng, 12) for _ in range(12)]
    photos = np.concatenate([c[::4] for c in clips])
    part = fit_tables([np.rint(photos * g[:, None, None]).astype(np.int32) for g in GAINS], LAYERS, clips=clips, gains=GAINS)
    spec = learned_spec(shape=SHAPE, gains=GAINS, ungains=1 / GAINS, points=POINTS, tables_path="tables.bin")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "tables.bin").write_bytes(part)
    (FOLDER / "codec.json").write_text(json.dumps(spec), encoding="utf-8")
    codec, store = make_codec(), ReferenceStore()
    arrays, index, blob = {}, [], b""
    latents = scene(rng, 14)
    for number, latent in enumerate(latents):
        point = ("fine", "fine", "coarse", "fine9", "fine")[number % 5]
        source = number - (1, 1, 3, 2)[number % 4] if number else None
        source = None if source is None else max(0, source)
        reference = None if source is None else store[source]
        symbols = codec.compress([latent], point, reference, source).symbols
        if number == 9:  # far outside the tables, everywhere
            wild = rng.integers(-2047, 2048, size=SHAPE).astype(np.int16) * (rng.random(SHAPE) < 0.02)
            symbols = Symbols(point_id="fine", tensors=(wild.astype(np.int16),), layers=1, layer_count=1)
        if number == 12:  # nothing moved
            source = number - 1
            symbols = reference = store[source]
        payloads = codec.encode(symbols, reference, source)
        decoded = codec.decode(payloads, store, strict=True)
        store.add(number, decoded)
        arrays[f"frame{number}"] = decoded.tensors[0]
        entry = {"point": decoded.point_id, "reference": source, "crc32": decoded.crc32(), "sizes": [len(p) for p in payloads]}
        index.append(entry)
        blob += b"".join(payloads)
    np.savez_compressed(FOLDER / "symbols.npz", **arrays)  # type: ignore[arg-type]
    (FOLDER / "payloads.bin").write_bytes(blob)
    (FOLDER / "index.json").write_text(json.dumps({"frames": index}, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()
