"""A server fits a bundle to what it decoded: the sample, the fit, and the roll-out by hash while a client goes on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from edge_client import Client, ClientOptions, Outcome
from edge_server import Server, ServerConfig
from edge_server.adapting.fit import fit, latents_of, main, save_runs
from edge_server.adapting.seen import Run, Seen
from protos.errors import ConfigError
from splitters.bundle import Bundle, open_bundle, replace_parts
from splitters.codec import Symbols, codec_from_spec
from splitters.codec.fitting.fit import refit_predicted
from splitters.codec.learned_spec import tier_prices
from tests.fakes.detector_bundle import write_cell_detector
from tests.unit.evaluation.test_video_evaluation import frames

SHA = "a" * 64


def symbols(value: int, point: str = "0", of: int = 1) -> Symbols:
    return Symbols(point_id=point, tensors=(np.full((1, 2, 2), value, np.int16),), layers=1, layer_count=of)


def watched(seen: Seen, session: str, ids: list[int], point: str = "0") -> None:
    for i in ids:
        seen.add(session, SHA, i, symbols(i, point))


def test_successive_frames_of_one_session_and_point_make_a_run() -> None:
    seen = Seen(run_frames=4)
    watched(seen, "a", [1, 2, 3])
    watched(seen, "b", [7])
    assert seen.runs(SHA) == []
    watched(seen, "a", [5])  # one was lost on the way
    (run,) = seen.runs(SHA)
    assert run.values[:, 0, 0, 0].tolist() == [1, 2, 3, 5]
    watched(seen, "b", [8, 30, 31, 32, 33])  # a long pause begins another
    assert seen.runs(SHA)[1].values[:, 0, 0, 0].tolist() == [30, 31, 32, 33]
    watched(seen, "c", [1, 2])
    watched(seen, "c", [3, 4, 5, 6], point="1")  # so does another operating point
    assert [r.point_id for r in seen.runs(SHA)] == ["0", "0", "1"]
    seen.forget(SHA)
    assert seen.runs(SHA) == []


def test_a_frame_with_missing_layers_ends_a_run() -> None:
    seen = Seen(run_frames=3)
    watched(seen, "a", [1, 2])
    seen.add("a", SHA, 3, symbols(3, of=2))
    watched(seen, "a", [4, 5])
    assert seen.runs(SHA) == []


def test_the_sample_is_bounded_and_of_all_times() -> None:
    seen = Seen(max_runs=10, run_frames=2)
    watched(seen, "a", list(range(1, 2001)))
    runs = seen.runs(SHA)
    assert len(runs) == 10
    starts = sorted(int(r.values[0, 0, 0, 0]) for r in runs)
    assert starts[0] < 1000 < starts[-1]


def test_few_sessions_are_watched_at_a_time_and_an_end_makes_room() -> None:
    seen = Seen(run_frames=2)
    for session in "abcde":
        watched(seen, session, [1])
    watched(seen, "e", [2])
    assert seen.runs(SHA) == []
    seen.end("a")
    watched(seen, "e", [3, 4])
    assert len(seen.runs(SHA)) == 1


def test_latents_are_of_the_symbols_and_stand_still_where_those_do() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(-9, 9, (1, 3, 4, 4)), 5, axis=0).astype(np.int16)
    values[3:, 1, 2, 2] += 2
    ungain = np.array([0.5, 1.0, 2.0], np.float32)
    found = latents_of(values, ungain, rng)
    assert np.array_equal(np.rint(found / ungain[:, None, None]), values)
    same = np.ones(values.shape[1:], bool)
    same[1, 2, 2] = False
    assert np.array_equal(found[0][same], found[4][same])
    assert found[0][~same] != found[4][~same]


def moved(rng: np.random.Generator, count: int, busy: bool) -> np.ndarray:
    """Latents (T, 1, 8, 8): one cell goes through a still scene, or everything flickers."""
    still = rng.uniform(0.2, 0.4, (1, 1, 8, 8))
    clip = np.repeat(still, count, axis=0) + (rng.normal(0, 0.2, (count, 1, 8, 8)) if busy else 0)
    row, start = rng.integers(0, 8), rng.integers(0, 8)
    for t in range(count):
        clip[t, 0, row, (start + t) % 8] = 0.9
    return clip.astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Predicts as if everything flickered all the time."""
    plain = write_cell_detector(tmp_path / "bundle", bits=(6, 4), learned=True)
    spec = json.loads(plain.read_part("device/codec.json"))
    rng = np.random.default_rng(1)
    clips = [moved(rng, 12, busy=True) for _ in range(10)]
    part = refit_predicted(plain.read_part(spec["tables"]), clips, np.asarray(spec["gains"]), prices=tier_prices(spec))
    return replace_parts(plain, {spec["tables"]: part})


def runs_of(bundle: Bundle, count: int = 16) -> list[Run]:
    spec = json.loads(bundle.read_part("device/codec.json"))
    codec = codec_from_spec(spec, bundle.read_part)
    rng = np.random.default_rng(2)
    return [
        Run(point_id="0", values=np.stack([codec.quantise([z], "0").tensors[0] for z in moved(rng, 8, busy=False)]))
        for _ in range(count)
    ]  # fmt: skip


def test_a_fit_that_helps_changes_the_tables_alone_and_one_that_does_not_changes_nothing(bundle: Bundle) -> None:
    runs = runs_of(bundle)
    before, after = fit(bundle, runs)
    assert after < 0.9 * before
    fitted = open_bundle(bundle.path)
    assert fitted.sha256 != bundle.sha256
    assert [p.path for p, q in zip(fitted.manifest.parts, bundle.manifest.parts, strict=True) if p != q] == ["device/tables.bin"]
    before, after = fit(fitted, runs)
    assert after >= 0.98 * before
    assert open_bundle(bundle.path).sha256 == fitted.sha256


def test_the_fit_runs_in_a_process_of_its_own(bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = runs_of(bundle)
    save_runs(tmp_path / "runs.npz", runs)
    assert main([str(bundle.path), str(tmp_path / "runs.npz")]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["sha256"] == open_bundle(bundle.path).sha256 != bundle.sha256
    save_runs(tmp_path / "few.npz", runs[:2])
    assert main([str(bundle.path), str(tmp_path / "few.npz")]) == ConfigError.exit_code
    assert "2 runs are too few" in capfd.readouterr().err
    plain = write_cell_detector(tmp_path / "plain", bits=(6,))
    with pytest.raises(ConfigError, match="only a learned one"):
        fit(plain, runs)


async def test_a_running_server_rolls_the_fitted_bundle_out_by_its_hash(bundle: Bundle, tmp_path: Path) -> None:
    config = ServerConfig(listen="127.0.0.1:0", models=(str(bundle.path),), adapt_dir=tmp_path / "fitted", adapt_every_s=1.0)
    options = ClientOptions(cache=tmp_path / "cache", operating_point=0, wait_for_server_s=30)
    clip = frames(40, 64, 64)
    async with Server.start(config) as server, Client.open(server=server.address, options=options) as client:
        old = dict(server.models)
        reports = []
        for number in range(20_000):
            reports.append(await client.infer(clip[number % len(clip)]))
            if server.models != old and client._engine.sha256 == server.models["cells"]:
                break
            await asyncio.sleep(0.001)
        reports += [await client.infer(picture) for picture in clip[:12]]
        assert server.models["cells"] != old["cells"]
        assert client._engine.sha256 == server.models["cells"]
        assert all(r.outcome is Outcome.RESULT for r in reports[-12:])
        (kept,) = (tmp_path / "fitted").iterdir()
        assert kept.name == f"cells-{server.models['cells'][:12]}"
        assert open_bundle(bundle.path).sha256 == bundle.sha256 == old["cells"]  # the user's own stays as it was
        await server.reload()
        assert server.models == old  # bundles are read from their own places again
