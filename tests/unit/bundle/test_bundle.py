"""Bundles: written at once, verified part by part, refused when anything is off."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest

from protos.errors import BundleError, ConfigError
from splitters.bundle import MANIFEST, OFFLOADS, POINTS, Bundle, BundleWriter, cache_dir, open_bundle, rewrite_points, sha256_hex
from splitters.bundle.manifest import Head, Preprocess, check_part_path, parse_manifest, parse_preprocess
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles

FIELDS: dict[str, Any] = {
    "name": "tiny",
    "task": "classification",
    "preprocess": Preprocess(resize="stretch", size_px=(32, 32)),
    "labels": {0: "no", 1: "yes"},
    "latent_shape": ((4, 8, 8),),
    "head": Head(stem="device/stem.onnx"),
    "codec": "device/codec.json",
    "tail": {"kind": "onnx", "path": "server/tail.onnx"},
    "licence": "none",
}


MEASURED = OperatingPoint(id=3, channels=4, bits=8, accuracy=0.5, accuracy_metric="top1", payload_bytes=Quantiles(p50=9, p95=10))


def write(out: Path, **changes: Any) -> Bundle:
    with BundleWriter(out) as writer:
        writer.add("device/stem.onnx", b"stem", "device")
        writer.add("device/codec.json", b"{}", "device")
        writer.add("server/tail.onnx", b"tail", "server")
        return writer.finish(points=[MEASURED], **(FIELDS | changes))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    again = open_bundle(tmp_path / "b")
    assert again == bundle
    assert again.sha256 == sha256_hex((tmp_path / "b" / MANIFEST).read_bytes())
    assert again.read_part("server/tail.onnx") == b"tail"
    assert {p.path for p in again.manifest.device_parts()} == {"device/stem.onnx", "device/codec.json", POINTS}
    assert again.point(3).codec_point == "3"


def test_the_same_content_has_the_same_hash(tmp_path: Path) -> None:
    assert write(tmp_path / "a").sha256 == write(tmp_path / "b").sha256


@pytest.mark.parametrize("part", ["device/stem.onnx", "server/tail.onnx", POINTS])
@pytest.mark.parametrize("damage", ["altered", "truncated", "absent"])
def test_a_damaged_part_is_named(tmp_path: Path, part: str, damage: str) -> None:
    file = write(tmp_path / "b").part_path(part)
    if damage == "absent":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if damage == "altered" else data[:-1])
    with pytest.raises(BundleError, match=part):
        open_bundle(tmp_path / "b")


def test_the_device_side_needs_no_server_parts(tmp_path: Path) -> None:
    write(tmp_path / "b").part_path("server/tail.onnx").unlink()
    assert open_bundle(tmp_path / "b", side="device").manifest.name == "tiny"


def test_an_unfinished_bundle_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            writer.add("device/stem.onnx", b"stem", "device")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no bundle"):
        BundleWriter(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_text('{"manifest_version": 3, "name": "a browser extension"}')
    with pytest.raises(ConfigError, match="no bundle"):
        BundleWriter(tmp_path / "b")
    write(tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    with pytest.raises(ConfigError, match="no bundle"):
        BundleWriter(tmp_path / "link")
    (tmp_path / "c" / "notes.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="other files"):
        BundleWriter(tmp_path / "c")


UNSAFE = ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "c:x", "a//b", "./a", "a\0b", "x" * 300, "a/b/c/d/e", "...", "a/..../b"]
UNSAFE += ["manifest.json", "Manifest.JSON", "a b", "a\x1b", "a\n", "é", "~", "$HOME"]


@pytest.mark.parametrize("path", UNSAFE)
def test_a_part_cannot_leave_the_bundle(path: str) -> None:
    with pytest.raises(BundleError):
        check_part_path(path)


def _parts(*paths: str) -> list[dict[str, Any]]:
    return [{"path": path, "sha256": "0" * 64, "bytes": 0, "side": "device"} for path in paths]


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "A"), ("a", "a/b"), ("a/b/c", "A/B"), [f"p{i}" for i in range(1025)]])
def test_parts_that_are_in_each_others_way_are_refused(tmp_path: Path, paths: list[str]) -> None:
    with pytest.raises(BundleError, match=r"same part twice|lies in a directory|at most 1024"):
        parse_manifest(_edited(tmp_path, parts=_parts(*paths)))


def _edited(tmp_path: Path, **changes: Any) -> str:
    data = json.loads(write(tmp_path / "b").manifest.to_json()) | changes
    return json.dumps(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2}, {"task": ""}, {"surprise": 1}, {"parts": []}, {"parts": "x"}, {"head": {}},
        {"labels": {"x": "y"}}, {"preprocess": {"resize": "stretch", "size_px": [1, 2]}},
        {"preprocess": {"resize": "melt", "size_px": [32, 32]}}, {"codec": "server/tail.onnx"},
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_one_clear_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        parse_manifest(_edited(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\0"])
def test_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text)


def test_new_measurements_change_the_hash(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    measured = OperatingPoint(
        id=3, channels=4, bits=8, accuracy=0.75, accuracy_metric="top1", payload_bytes=Quantiles(p50=9, p95=10)
    )
    after = rewrite_points(bundle, [measured])
    assert after.points == (measured,)
    assert after.sha256 != bundle.sha256
    assert open_bundle(bundle.path) == after


def test_offload_options_travel_with_the_bundle_as_a_part_of_the_device(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    assert bundle.offloads == ()
    option = OffloadOption(
        format="jpeg", quality=50, payload_bytes=Quantiles(p50=9, p95=10), accuracy=0.5, encode_ms=Quantiles(p50=1, p95=2)
    )
    after = rewrite_points(bundle, bundle.points, offloads=[option], local=(0.4, "top1"))
    assert after.offloads == (option,)
    assert OFFLOADS in {p.path for p in after.manifest.device_parts()}
    assert after.manifest.local is None or (after.manifest.local.accuracy, after.manifest.local.accuracy_metric) == (0.4, "top1")
    assert rewrite_points(after, after.points).offloads == (option,), "left as they are where nothing new is given"
    (bundle.path / OFFLOADS).write_text("[]")
    with pytest.raises(BundleError, match="offloads"):
        open_bundle(bundle.path, side="device")


@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_a_home_the_cache_has_to_be_named(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADTAIL_CACHE", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    else:

        def lacking() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", lacking)
    with pytest.raises(ConfigError, match="HEADTAIL_CACHE names"):
        cache_dir()
    monkeypatch.setenv("HEADTAIL_CACHE", "/x")
    assert cache_dir() == Path("/x")


def test_every_setting_of_the_preprocessing_returns_from_json_and_bounds_are_kept() -> None:
    spec = Preprocess(
        resize="letterbox", size_px=(64, 48), box_px=(70, 50), anchor="centre", pad=(124, 116, 104), resampler="pillow",
        interpolation="bicubic",
    )  # fmt: skip
    data = json.loads(json.dumps(dataclasses.asdict(spec)))
    assert parse_preprocess(data) == spec
    for wrong in ({"pad": 256}, {"pad": [0, 0, -1]}, {"pad": [0, 0]}, {"box_px": [4, 50]}, {"resampler": "other"}):
        with pytest.raises(BundleError, match=next(iter(wrong))):
            parse_preprocess(data | wrong)
    gc.collect()  # a crash in the validator's own types would show here
