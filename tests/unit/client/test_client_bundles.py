"""The client's cache and what it accepts from a server."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edge_client.bundles.fetch import _offsets, _Receiver, choose_model
from edge_client.bundles.store import BundleStore
from edge_client.device.choices import keep_times, known_times, make_controller, measure
from edge_client.device.engine import Engine
from protos.errors import BundleError, HeadtailError, ProtocolError, StorageError, UnknownModelError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import Classification, bundle_hash
from splitters.bundle import Bundle, replace_parts, sha256_hex
from splitters.bundle.manifest import MANIFEST
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_loop import VirtualLoop
from tests.fakes.detector_bundle import write_cell_detector


def chunks(bundle: Bundle, size: int = 700) -> list[pb.BundleChunk]:
    out = [pb.BundleChunk(manifest_json=(bundle.path / MANIFEST).read_bytes())]
    for part in bundle.manifest.device_parts():
        data = bundle.read_part(part.path)
        pieces = [pb.PartChunk(path=part.path, offset=at, data=data[at : at + size]) for at in range(0, len(data), size)]
        out += [pb.BundleChunk(part=piece) for piece in pieces]
    return out


def receive(store: BundleStore, bundle: Bundle, messages: list[pb.BundleChunk], sha256: str = "") -> Bundle:
    sha256 = sha256 or bundle.sha256
    with store.partial(sha256) as directory:
        receiver = _Receiver(directory, sha256, store)
        for message in messages:
            receiver.take(message)
        return receiver.finish()


def kept(store: BundleStore) -> list[str]:
    return sorted(p.name for p in (store.root / "bundles").iterdir())


def test_a_bundle_arrives_chunk_by_chunk_and_is_adopted(tmp_path: Path, bundle: Bundle) -> None:
    store = BundleStore(tmp_path)
    adopted = receive(store, bundle, chunks(bundle))
    assert adopted.sha256 == bundle.sha256
    assert not list((adopted.path).glob("server/*"))
    assert store.open(bundle.sha256) is not None
    assert store.open("f" * 64) is None
    assert kept(store) == [bundle.sha256]


def test_an_interrupted_fetch_is_resumed_where_it_stopped(tmp_path: Path, bundle: Bundle) -> None:
    all_chunks = chunks(bundle)
    store = BundleStore(tmp_path)
    with pytest.raises(BundleError, match="truncated"):
        receive(store, bundle, all_chunks[: len(all_chunks) // 2])
    held = _offsets(tmp_path / "bundles" / f".partial-{bundle.sha256}")
    assert held
    rest = [c for c in all_chunks if c.WhichOneof("content") == "manifest_json" or c.part.offset >= held.get(c.part.path, 0)]
    assert len(rest) < len(all_chunks)
    receive(store, bundle, rest)


def test_a_part_altered_on_the_way_is_refused_and_fetched_whole_next_time(tmp_path: Path, bundle: Bundle) -> None:
    bad = chunks(bundle)
    last = bad[-1].part
    last.data = bytes(len(last.data))
    with pytest.raises(BundleError, match="altered"):
        receive(BundleStore(tmp_path), bundle, bad)
    assert last.path not in _offsets(tmp_path / "bundles" / f".partial-{bundle.sha256}")


def test_what_a_hostile_server_may_not_do(tmp_path: Path, bundle: Bundle) -> None:
    good = chunks(bundle)
    manifest = good[0]
    cases: list[list[pb.BundleChunk]] = [
        [],
        good[1:],  # no manifest
        [pb.BundleChunk(manifest_json=manifest.manifest_json + b" ")],  # another manifest than promised
        [manifest, manifest],
        [manifest, pb.BundleChunk()],
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="../evil", data=b"x"))],
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="manifest.json", data=b"x"))],
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="server/tail.onnx", data=b"x"))],
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="device/stem.onnx", offset=5, data=b"x"))],
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="device/stem.onnx", data=b""))],  # could go on for ever
        [manifest, pb.BundleChunk(part=pb.PartChunk(path="operating_points.json", data=bytes(100_000)))],
        [manifest],
    ]
    for number, messages in enumerate(cases):
        with pytest.raises((BundleError, ProtocolError)):
            receive(BundleStore(tmp_path / f"case-{number}"), bundle, messages)
    assert not list(tmp_path.glob("**/evil"))
    assert not list(tmp_path.glob("**/tail.onnx"))


def with_parts(bundle: Bundle, *parts: dict[str, Any]) -> bytes:
    data = json.loads((bundle.path / MANIFEST).read_text())
    return json.dumps({**data, "parts": [*data["parts"], *parts]}).encode()


PART = {"sha256": sha256_hex(b""), "bytes": 0, "side": "device"}


@pytest.mark.parametrize(
    "parts",
    [
        [PART | {"path": "manifest.json"}],
        [PART | {"path": "operating_points.json/x"}],
        [PART | {"path": "/".join([f"{i:x}"] + ["a"] * 90)} for i in range(50)],
        [PART | {"path": "x" * 256}],
        [PART | {"path": f"x{i}"} for i in range(1100)],
        [PART | {"path": "huge", "bytes": 2 << 30}],
    ],
)
def test_a_manifest_that_cannot_be_is_a_bad_bundle_and_leaves_nothing(tmp_path: Path, bundle: Bundle, parts: list[Any]) -> None:
    text = with_parts(bundle, *parts)
    store = BundleStore(tmp_path)
    with pytest.raises(BundleError):
        receive(store, bundle, [pb.BundleChunk(manifest_json=text)], sha256_hex(text))
    assert kept(store) == []


@pytest.mark.parametrize(
    "name", ["/victim", "../victim", "../../victim", "", ".", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "\x1b" * 64]
)
def test_only_a_hash_names_a_bundle(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    store = BundleStore(tmp_path / "cache")
    for use in (store.path, store.open, lambda n: store.partial(n).__enter__(), lambda n: store.adopt(victim, n)):
        with pytest.raises(ProtocolError, match="not a sha256"):
            use(str(victim) if name == "/victim" else name)
    with pytest.raises(ProtocolError, match="not a sha256"):
        bundle_hash(name)
    assert (victim / "precious").exists()
    assert not (tmp_path / "cache").exists()


def test_what_is_not_the_bundle_that_was_asked_for_is_not_adopted(tmp_path: Path, bundle: Bundle) -> None:
    store = BundleStore(tmp_path)
    with store.partial("a" * 64) as directory:
        shutil.copytree(bundle.path, directory, dirs_exist_ok=True)
        with pytest.raises(BundleError, match="not the bundle"):
            store.adopt(directory, "a" * 64)
    assert store.open("a" * 64) is None
    assert kept(store) == []


def test_the_cache_is_bounded_and_what_was_unused_longest_goes_first(tmp_path: Path) -> None:
    bundles = [write_tiny_bundle(tmp_path / str(seed), seed=seed) for seed in range(5)]
    store = BundleStore(tmp_path / "cache", max_entries=3)
    for number, one in enumerate(bundles[:3]):
        receive(store, one, chunks(one))
        os.utime(store.path(one.sha256), ns=(number, number))
    store.close()
    first = store.open(bundles[0].sha256)  # in use, and the one used last
    assert first is not None
    receive(store, bundles[3], chunks(bundles[3]))
    assert kept(store) == sorted(bundles[i].sha256 for i in (0, 2, 3))
    os.utime(store.path(bundles[0].sha256), ns=(0, 0))
    other = BundleStore(tmp_path / "cache", max_entries=3)  # another client of this device: it respects what is in use here
    receive(other, bundles[4], chunks(bundles[4]))
    assert kept(store) == sorted(bundles[i].sha256 for i in (0, 3, 4))


def test_bytes_of_bundles_and_partial_ones_are_bounded(tmp_path: Path, bundle: Bundle) -> None:
    size = sum(p.bytes for p in bundle.manifest.device_parts()) + 10_000
    store = BundleStore(tmp_path, max_bytes=size)
    stale = tmp_path / "bundles" / f".partial-{'b' * 64}" / "device"
    stale.mkdir(parents=True)
    (stale / "stem.onnx").write_bytes(bytes(20_000))
    receive(store, bundle, chunks(bundle))
    assert kept(store) == [bundle.sha256]
    text = with_parts(bundle, PART | {"path": "more", "bytes": 5_000})
    with pytest.raises(StorageError, match="in use"):
        receive(store, bundle, [pb.BundleChunk(manifest_json=text)], sha256_hex(text))
    assert kept(store) == [bundle.sha256]
    store.close()
    with pytest.raises(BundleError, match=r"absent|truncated"):
        receive(store, bundle, [pb.BundleChunk(manifest_json=text)], sha256_hex(text))
    assert kept(store) == [f".partial-{sha256_hex(text)}"]


def test_an_altered_cached_bundle_is_removed(tmp_path: Path, bundle: Bundle) -> None:
    store = BundleStore(tmp_path)
    shutil.copytree(bundle.path, store.path(bundle.sha256))
    (store.path(bundle.sha256) / "device" / "stem.onnx").write_bytes(b"")
    assert store.open(bundle.sha256) is None
    assert not store.path(bundle.sha256).exists()


def test_what_is_remembered_of_servers(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    assert store.remembered("host:1", "") is None
    store.remember("host:1", "", "a" * 64)
    store.remember("host:1", "other", "b" * 64)
    assert BundleStore(tmp_path).remembered("host:1", "") == "a" * 64
    assert store.remembered("host:1", "other") == "b" * 64
    for text in ('{"host:1 ": "../../etc", "x": 3', '{"host:1 ": "../../etc"}', "[" * 100_000, "[]", '{"host:1 ": 3}', "\0"):
        (tmp_path / "servers.json").write_text(text)
        assert store.remembered("host:1", "") is None


def test_a_server_that_changes_its_address_keeps_its_bundle(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    store.remember("host:1", "", "a" * 64)
    store.remember("host:1", "other", "b" * 64)
    store.remember("host:2", "", "c" * 64)
    store.remember("host:1", "", "a" * 64)
    assert store.remembered("elsewhere:1", "") == "a" * 64  # the last that any server gave
    assert store.remembered("elsewhere:1", "other") == "b" * 64
    assert store.remembered("elsewhere:1", "third") is None
    for number in range(100):
        store.remember(f"host:{number}", "", "d" * 64)
    assert store.remembered("host:1", "other") is None  # long ago, and the file does not grow for ever


def test_two_clients_of_a_device_do_not_write_into_each_other(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    with store.partial("a" * 64) as one, store.partial("a" * 64) as two:
        assert one != two
        (one / "x").touch()
        (two / "x").touch()
    assert one.exists()
    assert not two.exists()


def test_choosing_a_model() -> None:
    models = [pb.ModelInfo(name="a"), pb.ModelInfo(name="b")]
    assert choose_model(models, "", "h").name == "a"
    assert choose_model(models, "b", "h").name == "b"
    with pytest.raises(UnknownModelError, match="a, b"):
        choose_model(models, "c", "h")


# ---------------------------------------------------------------- the engine


def test_an_engine_encodes_and_answers(bundle: Bundle) -> None:
    import numpy as np

    loop = VirtualLoop()
    engine = Engine(bundle, clock=loop.clock)
    frame = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
    features = engine.features(frame)
    encoded = engine.encode(features, bundle.points[0])
    assert engine.codec.decode(list(encoded.payloads)).complete
    assert encoded.payload_bytes == sum(map(len, encoded.payloads))
    jpeg = engine.compress(engine.picture(frame), "jpeg", 75)
    assert jpeg.symbols is None
    assert jpeg.payloads[0][:2] == b"\xff\xd8"
    assert engine.local is not None
    answer, _ = engine.local.answer(engine.local.prepare(frame), (70, 50))
    assert isinstance(answer, Classification)
    assert len(answer.top) == 5
    loop.close()


def test_a_head_that_is_no_model_is_a_bundle_error(tmp_path: Path, bundle: Bundle) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    (broken / "device" / "stem.onnx").write_bytes(b"no model")
    import dataclasses

    with pytest.raises(HeadtailError, match="stem"):
        Engine(dataclasses.replace(bundle, path=broken), clock=lambda: 0)


def test_device_times_are_measured_once_and_kept(tmp_path: Path, bundle: Bundle) -> None:
    ticks = iter(range(0, 10**12, 1_000_000))
    engine = Engine(bundle, clock=lambda: next(ticks))
    times = measure(engine, clock=lambda: next(ticks))
    assert set(times.head_ms) == {p.id for p in bundle.points}
    assert times.local_ms is not None
    assert known_times(bundle, threads=1, cache=tmp_path) is None
    keep_times(times, bundle, threads=1, cache=tmp_path)
    assert known_times(bundle, threads=1, cache=tmp_path) == times
    assert known_times(bundle, threads=2, cache=tmp_path) is None
    (file,) = tmp_path.iterdir()
    for text in ("", "[" * 100_000, '{"head_ms": {"0": {"p50": 1, "p95": -1}}}', '{"head_ms": {"x": {}}}', '{"more": 1}', "NaN"):
        file.write_text(text)
        assert known_times(bundle, threads=1, cache=tmp_path) is None
    controller = make_controller(engine, times, fps=30)
    assert controller.config.fps == 30


def test_a_prefilter_may_give_more_scores_than_it_promises_and_not_fewer(tmp_path: Path) -> None:
    """The default detector's has a ninth score for anything else; its promise names eight classes."""
    bundle = write_cell_detector(tmp_path / "cells", prefilter=True)  # two scores, one class promised
    assert measure(Engine(bundle, clock=time.monotonic_ns)).head_ms
    promise = json.loads(bundle.read_part("device/prefilter.json"))
    wide = replace_parts(bundle, {"device/prefilter.json": json.dumps({**promise, "category_ids": [1, 2, 3]}).encode()})
    with pytest.raises(BundleError, match="gives fewer than the 3 scores it promises"):
        measure(Engine(wide, clock=time.monotonic_ns))
