"""Symbols to payload is byte-exact: across releases, processes, thread counts and both coders.

Key frames: ``tests/golden/codec``, as version 1 wrote them, beside predicted frames in a form that is refused today. Predicted
frames: made by ``python -m tests.golden.make_predicted``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protos.errors import PayloadError
from splitters.codec import LearnedCodec, PlainCodec, ReferenceStore, Symbols, is_predicted
from tests.fakes.symbols import same
from tests.golden import make_predicted

FOLDER = Path(__file__).parents[2] / "golden" / "codec"
INDEX = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
SYMBOLS = dict(np.load(FOLDER / "symbols.npz", allow_pickle=False))
BLOB = (FOLDER / "payloads.bin").read_bytes()


def learned(coder: str) -> LearnedCodec:
    spec = json.loads((FOLDER / "codec.json").read_text(encoding="utf-8"))
    return LearnedCodec(spec, (FOLDER / "tables.bin").read_bytes(), coder=coder)


def golden_frames(codec: LearnedCodec) -> list[tuple[Symbols, int | None, list[bytes]]]:
    out, at = [], 0
    for number, entry in enumerate(INDEX["frames"]):
        payloads = []
        for size in entry["sizes"]:
            payloads.append(BLOB[at : at + size])
            at += size
        layers = codec.layer_count(entry["point"])
        tensor = SYMBOLS[f"frame{number}"].astype(np.int16)
        symbols = Symbols(point_id=entry["point"], tensors=(tensor,), layers=layers, layer_count=layers)
        assert symbols.crc32() == entry["crc32"]
        out.append((symbols, entry["reference"], payloads))
    return out


@pytest.mark.parametrize("coder", ["constriction", "pure"])
def test_symbols_and_payloads_match_the_golden_files(coder: str) -> None:
    if coder == "constriction":
        pytest.importorskip("constriction")
    codec = learned(coder)
    frames = golden_frames(codec)
    held = {number: symbols for number, (symbols, _, _) in enumerate(frames)}
    assert [is_predicted(payloads[0]) for _, _, payloads in frames] == [source is not None for _, source, _ in frames]
    assert not codec.supports_reference
    for symbols, source, payloads in frames:
        if source is None:
            assert codec.encode(symbols) == payloads
            assert same(codec.decode(payloads, held, strict=True), symbols)
        else:
            with pytest.raises(
                PayloadError, match=r"predicted in form 1, this release reads form 2: both sides need the same release"
            ):
                codec.decode(payloads, held, strict=True)


@pytest.mark.parametrize("coder", ["constriction", "pure"])
def test_predicted_symbols_and_payloads_match_the_golden_files(coder: str) -> None:
    if coder == "constriction":
        pytest.importorskip("constriction")
    folder = make_predicted.FOLDER
    codec, store = make_predicted.make_codec(coder), ReferenceStore()
    frames = json.loads((folder / "index.json").read_text(encoding="utf-8"))["frames"]
    symbols, blob, at = np.load(folder / "symbols.npz"), (folder / "payloads.bin").read_bytes(), 0
    kinds = []
    for number, entry in enumerate(frames):
        payloads = []
        for size in entry["sizes"]:
            payloads.append(blob[at : at + size])
            at += size
        decoded = codec.decode(payloads, store, strict=True)
        assert np.array_equal(decoded.tensors[0], symbols[f"frame{number}"])
        assert decoded.crc32() == entry["crc32"]
        source = entry["reference"]
        assert codec.encode(decoded, None if source is None else store[source], source) == payloads
        kinds.append(is_predicted(payloads[0]))
        store.add(number, decoded)
    assert at == len(blob)
    assert kinds.count(True) >= 8
    assert min(sum(e["sizes"]) for e in frames) <= 12  # the frame in which nothing moved


def test_the_golden_plain_payload_decodes() -> None:
    """Decoding only: zstandard promises one meaning for its bytes, not one way to write them."""
    codec = PlainCodec(INDEX["plain"])
    start = sum(sum(entry["sizes"]) for entry in INDEX["frames"])
    assert np.array_equal(codec.decode([BLOB[start:]], strict=True).tensors[0], SYMBOLS["plain"])


def digest() -> str:
    """SHA-256 of all payloads as this process codes them, with the coder `auto` picks."""
    codec = learned("auto")
    frames = golden_frames(codec)
    sha = hashlib.sha256()
    for symbols, source, _ in frames:
        if source is None:
            sha.update(b"".join(codec.encode(symbols)))
    predicted, store = make_predicted.make_codec(), ReferenceStore()
    for number, latent in enumerate(make_predicted.scene(np.random.default_rng(5), 6)):
        coded = predicted.compress([latent], "fine", store.get(number - 1), number - 1)
        store.add(number, coded.symbols)
        sha.update(b"".join(predicted.encode(coded.symbols, store.get(number - 1), number - 1)))
    return sha.hexdigest()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_another_process_and_thread_count_give_the_same_bytes(threads: str) -> None:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    script = "from tests.unit.codec.test_codec_golden import digest; print(digest())"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == digest()


def test_the_codec_runs_where_constriction_is_absent() -> None:
    """No aarch64 Linux wheel exists: the pure coder must take over by itself, and torch must not be needed."""
    script = (
        "import sys; sys.modules['constriction'] = None; sys.modules['torch'] = None\n"
        "from tests.unit.codec.test_codec_golden import digest, learned\n"
        "assert learned('auto')._coders.name == 'pure'; print(digest())"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == digest()
