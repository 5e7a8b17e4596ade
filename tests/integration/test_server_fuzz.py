"""A short campaign of hostile input; the long one is ``python -m tests.bench.fuzz``."""

from pathlib import Path

import pytest

from splitters.bundle import Bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_fuzz import run_decoders, run_socket
from tests.fakes.server_running import running


def test_decoders_answer_or_refuse(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    tally = run_decoders(bundle, 12_000, seed=7)
    capfd.readouterr()  # libjpeg comments on damage
    assert tally.sealed >= 0.3 * tally.inputs
    assert tally.accepted > 100  # sealed mutations do reach the decoders' insides
    assert tally.errors["payload"] > 1000


async def test_a_server_survives_hostile_clients(bundle: Bundle, tmp_path: Path) -> None:
    async with running(bundle.path) as server:
        tally = await run_socket(server.address, bundle, 600, seed=7, workers=4)
        assert tally.inputs >= 600
        assert tally.errors["payload"] > 10
        async with session(server.address, bundle.sha256) as stream:
            assert (await stream.frame(Device(bundle).layers(picture(), 0))).error is None
