"""The table of cuts, what it recommends, and where models come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splitters
from protos.errors import ConfigError, ModelError
from splitters.cli import main
from splitters.cutting.sources import load_source
from splitters.profiling.measure import zstd_8bit_bytes
from splitters.profiling.table import CutCost, Profile, mark_good
from splitters.profiling.times import coarse_to_fine


class Funnel(nn.Module):
    """Ever fewer bytes; known MACs and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 2, 1)  # 8·16·16·27 = 55,296 MACs, 224 parameters
        self.b = nn.Conv2d(8, 4, 3, 2, 1)  # 4·8·8·72 = 18,432 MACs, 292 parameters
        self.c = nn.Linear(4, 10)  # 40 MACs, 50 parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).mean((2, 3)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Funnel()


def build_nothing() -> int:
    return 3


@pytest.fixture(scope="module")
def table() -> Profile:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found: Profile = splitters.profile(build(), image, name="funnel", budget_s=5)
    return found


def test_bytes_work_and_weights_are_those_of_the_layers(table: Profile) -> None:
    rows = {r.name: r for r in table.rows}
    assert list(rows) == ["a", "b"]
    assert rows["a"].shapes == ((8, 16, 16),)
    assert (rows["a"].float_bytes, rows["a"].int8_bytes) == (8 * 16 * 16 * 4, 8 * 16 * 16)
    assert 0 < rows["a"].zstd_bytes <= rows["a"].int8_bytes + 64
    assert (rows["a"].head_macs, rows["b"].head_macs) == (55_296, 55_296 + 18_432)
    assert table.total_macs == 55_296 + 18_432 + 40
    assert rows["a"].tail_macs == 18_432 + 40
    assert (rows["a"].head_params, rows["a"].tail_params) == (224, 292 + 50)
    assert (rows["b"].head_params, rows["b"].tail_params) == (224 + 292, 50)
    assert table.input_bytes == 3 * 32 * 32


def test_times_are_measured_on_both_sides(table: Profile) -> None:
    assert table.notes == ()
    for row in table.rows:
        assert row.timed
        assert min(row.head_ms, row.tail_ms, row.head_torch_ms, row.tail_torch_ms) > 0
    assert table.local_ms > 0


ROW: dict[str, Any] = {
    "shapes": ((4,),), "float_bytes": 4000, "int8_bytes": 1000, "head_macs": 1, "tail_macs": 1, "head_params": 1,
    "tail_params": 1, "head_torch_ms": 9.0, "tail_torch_ms": 9.0, "timed": True, "good": True,
}  # fmt: skip


def made(local_ms: float = 9.0) -> Profile:
    rows = (
        CutCost(name="early", zstd_bytes=20_000, head_ms=1.0, tail_ms=8.0, **ROW),
        CutCost(name="late", zstd_bytes=1_000, head_ms=6.0, tail_ms=3.0, **ROW),
    )
    return Profile(
        model="m", rows=rows, input_bytes=150_000, picture_bytes=50_000, total_macs=2, local_ms=local_ms,
        local_torch_ms=18.0, notes=(),
    )  # fmt: skip


def test_the_network_decides_where_to_run() -> None:
    profile = made()
    assert profile.best(1e9, 1.0, device_slowdown=50).where == "server"  # a fast link and a slow device
    early = profile.best(8e6, 5.0, device_slowdown=10)
    assert (early.where, early.name) == ("cut", "early")
    assert early.latency_ms == pytest.approx(10 + 5 + 20 + 8)
    assert profile.best(1e4, 100.0).where == "local"  # hardly a link
    local = next(c for c in profile.choices(bitrate_bps=1e6, rtt_ms=10) if c.where == "local")
    assert (local.sent_bytes, local.network_ms, local.server_ms) == (0, 0.0, 0.0)


def test_a_slow_link_and_a_slow_device_cut_late() -> None:
    choice = made(local_ms=40.0).best(4e5, 5.0, device_slowdown=2, deadline_ms=50)
    assert (choice.where, choice.name) == ("cut", "late")
    assert choice.latency_ms == pytest.approx(12 + 5 + 20 + 3)
    assert choice.meets_deadline
    assert not made().best(1e3, 500.0, device_slowdown=100, deadline_ms=50).meets_deadline


@pytest.mark.parametrize("setting", [{"bitrate_bps": 0}, {"rtt_ms": -1}, {"device_slowdown": 0}])
def test_impossible_networks_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        made().best(**{"bitrate_bps": 1e6, "rtt_ms": 10.0, **setting})


def test_good_cuts_are_a_frontier_with_steps_that_matter() -> None:
    names = ["a", "b.conv", "b", "c", "d"]
    good = mark_good(names, [1, 2, 2, 3, 4], [900, 500, 501, 495, 100], picture_bytes=800)
    assert good == [False, False, True, False, True]  # a: more than the picture; b for b.conv; c saves 1 %


def test_measuring_order_iscoarse_to_fine() -> None:
    order = coarse_to_fine(list(range(9)))  # type: ignore[arg-type]
    assert sorted(order) == list(range(9))
    assert order[:3] == [0, 4, 8]


def test_compressed_bytes_follow_the_content() -> None:
    flat, noise = torch.zeros(1, 8, 32, 32), torch.rand(1, 8, 32, 32)
    assert zstd_8bit_bytes(flat) < 200 < 7000 < zstd_8bit_bytes(noise)
    assert zstd_8bit_bytes(torch.rand(1, 1000, 1, 1)) > 500  # one scale for all: a scale a value would be the message


def test_sources_that_cannot_be_found_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match="write timm:NAME"):
        load_source("resnet18")
    with pytest.raises(ConfigError, match="must be py:MODULE:FACTORY"):
        load_source("py:module")
    with pytest.raises(ConfigError, match="cannot be found"):
        load_source("py:tests.unit.profiling.test_profiling:absent")
    with pytest.raises(ConfigError, match=r"must return an nn.Module.*got int"):
        load_source("py:tests.unit.profiling.test_profiling:build_nothing")
    with pytest.raises(ConfigError, match="does not exist"):
        load_source("onnx:/nowhere/model.onnx")
    with pytest.raises(ConfigError, match="does not exist"):
        load_source("/nowhere/model.pt2")


def test_an_altered_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="no readable ONNX model"):
        load_source(f"onnx:{tmp_path / 'model.onnx'}")
    (tmp_path / "model.pt2").write_bytes(b"no model")
    with pytest.raises(ModelError, match="no exported program"):
        load_source(f"{tmp_path / 'model.pt2'}")


def test_a_pt2_file_keeps_its_example(tmp_path: Path) -> None:
    path = tmp_path / "funnel.pt2"
    torch.export.save(torch.export.export(build().eval(), (torch.rand(1, 3, 32, 32),)), path)
    source = load_source(str(path))
    assert (source.name, tuple(source.example.shape)) == ("funnel", (1, 3, 32, 32))
    found = splitters.split(source.model, "a", source.example)
    found.verify(torch.rand(1, 3, 32, 32))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="do not fit the model"):
        load_source("py:tests.unit.profiling.test_profiling:build", weights=str(tmp_path / "other.safetensors"))


def test_the_verb_prints_a_table_draws_a_picture_and_ends_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    picture = tmp_path / "deep" / "profile.png"
    code = main(["profile", "py:tests.unit.profiling.test_profiling:build", "--size", "32x32", "--budget-s", "1", "--all",
                 "--plot", str(picture), "--bitrate-bps", "1e6", "--json"])  # fmt: skip
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    assert code == 0
    assert "profile: 0 of 1  tracing the model" in printed.err
    assert "profile: 2 of 2  2 cuts timed" in printed.err
    assert any(line.split()[:1] == ["a"] or line.split()[:2] == ["*", "a"] for line in lines)
    assert [r["name"] for r in json.loads(lines[-1])["rows"]] == ["a", "b"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


def test_the_verb_ends_with_one_clear_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "nothing"]) == 2
    assert "names no model; write timm:NAME" in capsys.readouterr().err
    assert main(["profile", "py:tests.unit.profiling.test_profiling:build", "--size", "wide"]) == 2
    assert "--size must be HxW" in capsys.readouterr().err


def test_where_no_cut_sends_less_than_the_picture_the_nearest_are_shown_and_not_marked() -> None:
    from splitters.profiling.table import CutCost, Profile

    def row(name: str, zstd_bytes: int, macs: int) -> CutCost:
        return CutCost(
            name=name, shapes=((8,),), float_bytes=4, int8_bytes=1, zstd_bytes=zstd_bytes, head_macs=macs, tail_macs=100 - macs,
            head_params=1, tail_params=1, head_ms=1.0, tail_ms=1.0, head_torch_ms=1.0, tail_torch_ms=1.0, timed=True, good=False,
        )  # fmt: skip

    rows = (row("early", 900, 10), row("worse", 950, 20), row("middle", 500, 40), row("late", 800, 90))
    table = Profile(
        model="m", rows=rows, input_bytes=1, picture_bytes=100, total_macs=100, local_ms=1.0, local_torch_ms=1.0, notes=()
    )
    said = table.text(every=False)
    assert "early" in said
    assert "middle" in said
    assert "worse" not in said
    assert "no cut sends less than the picture" in said
    assert "2 others send more" in said
    assert all(name in table.text(every=True) for name in ("early", "worse", "middle", "late"))
