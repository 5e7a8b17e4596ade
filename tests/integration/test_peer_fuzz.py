"""A short campaign of hostile peers and files; the long one is ``python -m tests.bench.fuzz``."""

from __future__ import annotations

from pathlib import Path

from splitters.bundle import Bundle
from tests.fakes.hostile_server import run_clients
from tests.fakes.open_inference_fuzz import run_open_inference
from tests.fakes.peer_fuzz import run_readers
from tests.fakes.server_running import running


def test_what_a_device_reads_is_right_or_refused_and_nothing_else_is_touched(bundle: Bundle, tmp_path: Path) -> None:
    tally = run_readers(bundle, tmp_path, 4000, seed=7)
    assert tally.accepted > 500
    for case in ("manifest", "points", "offloads", "codec", "tables", "promise", "arriving bundle", "preprocess"):
        assert tally.errors[f"{case}: bundle"] > 10, case
    assert tally.errors["toml: config"] > 100
    assert tally.errors["grant: protocol"] > 20


async def test_a_client_survives_a_hostile_server(bundle: Bundle, tmp_path: Path) -> None:
    tally = await run_clients(bundle, tmp_path, 400, seed=7)
    assert tally.errors["done"] > 0
    assert tally.accepted > 100


async def test_a_server_survives_hostile_open_inference_requests(bundle: Bundle) -> None:
    async with running(bundle.path) as server:
        tally = await run_open_inference(server.address, 1000, seed=7)
    assert tally.errors["INVALID_ARGUMENT protocol"] > 100
    assert tally.accepted > 50
