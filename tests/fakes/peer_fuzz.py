"""What a device reads from outside, hostile: files of a bundle, caches, settings, messages, and bundles that arrive.

Every input must end in a value or in an error of the tree that is not "our own fault", and touch nothing but the cache.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_client.bundles.fetch import _Receiver
from edge_client.bundles.store import BundleStore
from edge_client.cli import parse
from edge_client.config import ClientConfig, read_config
from edge_client.device.choices import DeviceTimes, keep_times, known_times
from edge_client.gates.interest import read_promise
from protos.errors import HeadtailError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import Grant, Result, bundle_hash
from protos.schema import read_json
from splitters.bundle import Bundle, sha256_hex
from splitters.bundle.manifest import MANIFEST, parse_manifest, parse_preprocess
from splitters.bundle.offload import load_offloads
from splitters.bundle.operating_point import load_points
from splitters.codec import codec_from_spec
from splitters.codec.tables import pack_tables, read_tables
from splitters.tasks.base import TASKS, open_task
from tests.fakes.hostile_values import NAMES, NUMBERS, as_json, as_toml, hostile, value
from tests.fakes.server_fuzz import SLOW_S, Tally, mutate

QUOTA_BYTES = 1 << 20
QUOTA_FILES = 400
Case = Callable[[random.Random], object]

OFFLOAD = {
    "format": "jpeg", "quality": 50, "size_px": 0, "payload_bytes": {"p50": 1.0, "p95": 2.0}, "accuracy": 0.5,
    "encode_ms": {"p50": 1.0, "p95": 2.0},
}  # fmt: skip
PROMISE = {
    "category_ids": [1, 2], "interest": ["class 1"], "recall_asked": 0.9, "recall_promised": 0.9, "threshold": 0.4, "sure": 0.5,
    "recalls": [{"recall_asked": 0.8, "recall_promised": 0.8, "threshold": 0.5}],
}  # fmt: skip
BOXES = {"kind": "dense_boxes", "class_ids": [1, 2, 3], "score_min": 0.05, "iou": 0.6, "keep": 100}
INDEX = {"channels": 4, "layers": [2, 4], "tiers": 2, "radius": 20}


def cases(bundle: Bundle, root: Path) -> dict[str, tuple[int, Case]]:
    """Name → weight and case: it draws an input and reads it."""
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    points = json.loads((bundle.path / "operating_points.json").read_text())
    codec = json.loads(bundle.read_part(bundle.manifest.codec))
    store = BundleStore(root / "cache", max_bytes=QUOTA_BYTES // 2, max_entries=4)
    times = {"head_ms": {"0": {"p50": 1.0, "p95": 2.0}}, "local_ms": None, "offload_ms": {}}
    options = [f.name for f in fields(ClientConfig)]

    def remembered(rng: random.Random) -> object:
        (store.root / "servers.json").write_bytes(as_json(rng, hostile(rng, {"host:1 ": "a" * 64, "host:2 x": "b" * 64})))
        found = store.remembered(rng.choice(("host:1", "host:9")), rng.choice(("", "x", "y")))
        store.remember("host:1", "", "c" * 64)
        return found is None or store.path(found)

    def known(rng: random.Random) -> object:
        keep_times(DeviceTimes(), bundle, threads=1, cache=store.root / "times")
        (file,) = (store.root / "times").iterdir()
        file.write_bytes(as_json(rng, hostile(rng, times)))
        return known_times(bundle, threads=1, cache=store.root / "times")

    def promise(rng: random.Random) -> object:
        text = as_json(rng, hostile(rng, PROMISE))
        head = SimpleNamespace(prefilter="device/prefilter.onnx")
        fake: Any = SimpleNamespace(manifest=SimpleNamespace(head=head, labels={}, name="x"), read_part=lambda _path: text)
        return read_promise(fake, recall=rng.choice((None, 0.85, 0.99)))

    def tables(rng: random.Random) -> object:
        arrays = {f"intra/{rng.choice(('tables', 'x'))}": np.zeros((2, 3), np.int16)}
        return read_tables(pack_tables(_object(hostile(rng, INDEX)), arrays))

    def toml(rng: random.Random) -> object:
        file = store.root / "camera.toml"
        file.write_text(("" if rng.random() < 0.2 else 'camera = "0"\n') + as_toml(rng, options), encoding="utf-8")
        return read_config(file, {})

    def arguments(rng: random.Random) -> object:
        line = ["--camera", "0"]
        for _ in range(rng.randint(1, 3)):
            line += [f"--{rng.choice(options).replace('_', '-')}", str(value(rng))]
        with contextlib.redirect_stderr(io.StringIO()):
            return parse(line)

    return {
        "manifest": (10, lambda rng: parse_manifest(as_json(rng, hostile(rng, manifest)))),
        "points": (6, lambda rng: load_points(as_json(rng, hostile(rng, points)))),
        "offloads": (4, lambda rng: load_offloads(as_json(rng, hostile(rng, [OFFLOAD, OFFLOAD])))),
        "codec": (8, lambda rng: _codec(rng, codec)),
        "tables": (3, tables),
        "preprocess": (2, lambda rng: parse_preprocess(_object(hostile(rng, manifest["preprocess"])))),
        "postprocess": (3, lambda rng: _postprocess(rng, bundle)),
        "promise": (4, promise),
        "remembered": (2, remembered),
        "times": (2, known),
        "toml": (8, toml),
        "arguments": (2, arguments),
        "hash": (2, lambda rng: store.open(bundle_hash(rng.choice((*NAMES, "a" * 64, "A" * 64, "a" * 63))))),
        "result": (14, lambda rng: _checked_result(hostile_result(rng))),
        "grant": (4, lambda rng: Grant.from_proto(hostile_grant(rng))),
        "arriving bundle": (4, lambda rng: _arrive(rng, store, bundle, manifest)),
    }


def _object(tree: Any) -> dict[str, Any]:
    return tree if isinstance(tree, dict) else {"x": tree}


def _codec(rng: random.Random, spec: Any) -> object:
    raw = read_json(as_json(rng, hostile(rng, spec)), dict[str, Any], what="codec.json")
    built = codec_from_spec(raw, lambda _path: b"")
    with contextlib.suppress(HeadtailError):
        built.decode([rng.randbytes(40)])
    with contextlib.suppress(HeadtailError):
        built.quantise([np.zeros(shape, np.float32) for shape in built.shapes if np.prod(shape) < 1e6], built.point_ids[0])
    return built


def _postprocess(rng: random.Random, bundle: Bundle) -> object:
    spec = read_json(as_json(rng, hostile(rng, BOXES)), dict[str, Any], what="postprocess")
    return open_task(replace(bundle.manifest, task=rng.choice(TASKS.names()), postprocess=spec))


def _number(rng: random.Random) -> float:
    return rng.choice((0.0, 1.0, 0.5, 10.0, *(float(n) for n in NUMBERS if abs(n) < 1e38 or n != n or n in (float("inf"),))))


def _whole(rng: random.Random, bits: int = 64) -> int:
    return rng.choice((0, 1, 5, 2**16, 2**31, 2**32 - 1, 2**bits - 1, 2 ** (bits - 1))) % 2**bits


def hostile_result(rng: random.Random, frame_id: int = 0) -> pb.Result:
    """An answer, a refusal or neither, with numbers of any size."""
    message = pb.Result(frame_id=frame_id, layers_decoded=rng.choice((0, 1, 2**32 - 1)), symbols_crc32=_whole(rng, 32))
    kind = rng.randrange(4)
    if kind == 0:
        rows = [pb.ClassScore(class_id=_whole(rng, 32), score=_number(rng)) for _ in range(rng.choice((0, 1, 5)))]
        message.classification.CopyFrom(pb.Classification(top=rows * rng.choice((1, 1, 1, 300))))
    elif kind == 1:
        corners = [[_number(rng) for _ in range(4)] for _ in range(rng.choice((0, 1, 5)))]
        rows_px = [pb.Box(class_id=1, score=0.5, x1_px=a, y1_px=b, x2_px=c, y2_px=d) for a, b, c, d in corners]
        message.detection.CopyFrom(pb.Detection(boxes=rows_px * rng.choice((1, 1, 1, 1500))))
    elif kind == 2:
        code = rng.choice(("internal", "headtail", "payload", "overloaded", "version_mismatch", "config", *NAMES))
        message.error.CopyFrom(pb.FrameError(code=code, message=rng.choice(NAMES), retryable=rng.random() < 0.5))
    if rng.random() < 0.3:
        times = pb.ServerTimings(decode_ns=_whole(rng), queue_ns=_whole(rng), tail_ns=_whole(rng), total_ns=_whole(rng))
        message.timings.CopyFrom(times)
    return message


def hostile_grant(rng: random.Random) -> pb.Grant:
    """A grant of anything."""
    return pb.Grant(
        bitrate_bps=_whole(rng), max_in_flight=_whole(rng, 32), queue_ns=_whole(rng), tail_ns=_whole(rng),
        delivery_bps=_number(rng), delay_trend=_number(rng),
    )  # fmt: skip


def _checked_result(message: pb.Result) -> object:
    result = Result.from_proto(message)
    assert (result.answer is None) != (result.error is None)
    assert result.error is None or result.error.exit_code != 1
    return result


def _arrive(rng: random.Random, store: BundleStore, bundle: Bundle, manifest: Any) -> object:
    """A bundle sent in pieces: its manifest hostile but of the hash that is asked for, or the pieces."""
    text = as_json(rng, hostile(rng, manifest)) if rng.random() < 0.6 else (bundle.path / MANIFEST).read_bytes()
    if rng.random() < 0.3:
        extra = {"path": rng.choice((*NAMES, f"x{rng.randrange(100)}")), "sha256": sha256_hex(b""), "bytes": 0, "side": "device"}
        text = json.dumps({**manifest, "parts": [*manifest["parts"], extra]}).encode()
    sha256 = sha256_hex(text)
    with store.partial(sha256) as directory:
        receiver = _Receiver(directory, sha256, store)
        receiver.take(pb.BundleChunk(manifest_json=text))
        for part in bundle.manifest.device_parts():
            data = bundle.read_part(part.path)
            if rng.random() < 0.05:
                data = mutate(rng, data)
            path = rng.choice(NAMES) if rng.random() < 0.05 else part.path
            offset = _whole(rng) if rng.random() < 0.05 else receiver.held.get(path, 0)
            piece = data[offset:] if offset < 2**31 else data
            with contextlib.suppress(ValueError):  # protobuf's own, before anything is sent
                receiver.take(pb.BundleChunk(part=pb.PartChunk(path=path, offset=offset, data=piece)))
        return receiver.finish()


def run_readers(bundle: Bundle, root: Path, inputs: int, seed: int) -> Tally:
    """Raises AssertionError with the seed and number of an input that ended otherwise than it may."""
    with untouched(root):
        every = cases(bundle, root)
        (root / "cache").mkdir(exist_ok=True)
        names, weights = list(every), [weight for weight, _ in every.values()]
        tally, rng = Tally(), random.Random(seed)
        for number in range(inputs):
            name = rng.choices(names, weights)[0]
            tally.inputs += 1
            begun = time.thread_time()
            try:
                every[name][1](rng)
                tally.accepted += 1
            except HeadtailError as error:
                if error.exit_code == 1 or not error.message.isprintable():
                    raise AssertionError(f"{name}, seed {seed}, input {number}: {error.exit_code} {error.message!r}") from error
                tally.errors[f"{name}: {error.code}"] += 1
            except SystemExit as end:
                tally.errors[f"usage, exit {end.code}"] += 1
            except Exception as error:
                raise AssertionError(f"{name}, seed {seed}, input {number}: {type(error).__name__}: {error}") from error
            took = time.thread_time() - begun
            if took > tally.slowest_s:
                tally.slowest_s, tally.slowest = took, f"{name}, input {number}"
            assert took < SLOW_S, f"{name}, seed {seed}, input {number} took {took:.1f} s"
            if number % 1000 == 0:
                within_quota(root / "cache")
        within_quota(root / "cache")
    return tally


def within_quota(cache: Path, *, n_bytes: int = QUOTA_BYTES, files: int = QUOTA_FILES) -> None:
    """Raises AssertionError where the cache holds more."""
    found = list(cache.rglob("*"))
    used = sum(p.stat().st_size for p in found if p.is_file())
    assert len(found) <= files, f"{len(found)} files and directories in the cache"
    assert used <= n_bytes, f"{used} bytes in the cache"


@contextmanager
def untouched(root: Path) -> Iterator[None]:
    """Lays out a tree beside the cache that must be the same afterwards, and nothing beside it."""
    canary = root / "canary"
    for place in (canary, canary / "victim", canary / "bundles", root / "victim"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "precious.txt").write_text("years of work")
        (place / MANIFEST).write_text("{}")
    before = _tree(root)
    yield
    assert _tree(root) == before, "something outside of the cache was touched"


def _tree(root: Path) -> dict[str, str]:
    found = (p for p in root.rglob("*") if p.relative_to(root).parts[0] not in ("cache", "out"))
    return {str(p.relative_to(root)): sha256_hex(p.read_bytes()) if p.is_file() else "" for p in found}
