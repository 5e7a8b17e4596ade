"""Makes the codec's golden files: symbols and the exact payloads they become.

    python -m tests.golden.make_codec

Run it only when the payload format changes on purpose (and raise `envelope.VERSION` then): every release that reads
version 1 must turn these symbols into these bytes, on every machine, with either range coder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from splitters.codec import LearnedCodec, PlainCodec, Symbols, calibrate_plain, learned_spec
from splitters.codec.fitting.fit import fit_tables

FOLDER = Path(__file__).parent / "codec"
SHAPE = (24, 14, 14)
LAYERS = (6, 12, 24)
GAINS = np.array([[0.7] * 24, [2.5] * 24])
POINTS = {"coarse": (0, 24), "fine": (1, 24), "fine9": (1, 9), "single": (0, 12)}


def latents(rng: np.random.Generator, count: int) -> np.ndarray:
    """Smooth fields whose strength falls over the channels: (count, C, H, W)."""
    channels, height, width = SHAPE
    noise = rng.normal(size=(count, channels, height + 2, width + 2))
    field = sum(noise[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)) / 3
    return np.asarray(field * 3 / np.sqrt(np.arange(1, channels + 1))[:, None, None], dtype=np.float32)


def frames(codec: LearnedCodec, rng: np.random.Generator) -> list[tuple[Symbols, int | None]]:
    """Symbols and the index of the frame each is predicted from."""
    moving = latents(rng, 1)[0]
    out: list[tuple[Symbols, int | None]] = []
    for point in POINTS:
        out.append((codec.quantise([moving], point), None))
        moving = moving + 0.03 * latents(rng, 1)[0]
        out.append((codec.quantise([moving], point), len(out) - 1))
    out.append((codec.quantise([moving], "coarse"), 3))  # predicted across tiers
    wild = rng.integers(-2047, 2048, size=SHAPE).astype(np.int16) * (rng.random(SHAPE) < 0.01)
    out.append((Symbols(point_id="fine", tensors=(wild.astype(np.int16),), layers=3, layer_count=3), None))
    zero = np.zeros(SHAPE, np.int16)
    out.append((Symbols(point_id="coarse", tensors=(zero,), layers=3, layer_count=3), None))
    return out


def main() -> None:
    """Writes every file."""
    rng = np.random.default_rng(20)
    before = latents(rng, 150)
    now = before + 0.1 * latents(rng, 150)
    integers = [[np.rint(z * gain[:, None, None]).astype(np.int32) for gain in GAINS] for z in (before, now)]
    part = fit_tables(integers[0], LAYERS, pairs_by_tier=list(zip(integers[1], integers[0], strict=True)))
    spec = learned_spec(
        shape=SHAPE, gains=GAINS, ungains=1 / GAINS, points=POINTS, tables_path="tables.bin", single_layer=["single"]
    )
    codec = LearnedCodec(spec, part)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "tables.bin").write_bytes(part)
    (FOLDER / "codec.json").write_text(json.dumps(spec), encoding="utf-8")
    arrays, index, blob = {}, [], b""
    made = frames(codec, rng)
    for number, (symbols, source) in enumerate(made):
        payloads = codec.encode(symbols, None if source is None else made[source][0], source)
        arrays[f"frame{number}"] = symbols.tensors[0]
        entry: dict[str, Any] = {"point": symbols.point_id, "reference": source, "crc32": symbols.crc32()}
        index.append({**entry, "sizes": [len(p) for p in payloads]})
        blob += b"".join(payloads)
    plain_spec = calibrate_plain([before[:20, :8]], bits=(8, 4))
    plain = PlainCodec(plain_spec)
    symbols = plain.quantise([before[0, :8]], "b4")
    arrays["plain"] = symbols.tensors[0]
    (payload,) = plain.encode(symbols)
    np.savez_compressed(FOLDER / "symbols.npz", **arrays)  # type: ignore[arg-type]
    (FOLDER / "payloads.bin").write_bytes(blob + payload)
    (FOLDER / "index.json").write_text(json.dumps({"frames": index, "plain": plain_spec}, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()
