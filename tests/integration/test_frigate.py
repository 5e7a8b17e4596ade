"""Frigate's protocol end to end: a stand-in for its detector, a real client, a real server that goes away."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_client import Client
from tests.fakes.client_process import standby
from tests.fakes.detector_bundle import write_cell_detector
from tests.fakes.frigate import Detector
from tests.fakes.server_running import environment

pytestmark = pytest.mark.timeout(240)


def test_frigate_gets_the_bundles_boxes_and_zeros_on_trouble(tmp_path: Path) -> None:
    bundle = write_cell_detector(tmp_path / "bundle").path
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with standby(tmp_path, bundle) as server:
        address = server.serve()
        command = [
            sys.executable,
            "-m",
            "edge_client.cli",
            "--frigate",
            endpoint,
            "--server",
            address,
            "--json",
            "--deadline-ms",
            "20000",
        ]
        process = subprocess.Popen(
            command, env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        detector = Detector(endpoint, timeout_ms=60_000)
        try:
            assert detector.ask_for_model()["model_loaded"] is True
            image = np.zeros((64, 64, 3), np.uint8)
            image[8:16, 16:24] = (200, 180, 220)
            image[40:48, 48:56] = 255
            found = detector.detect(np.ascontiguousarray(image[None, :, :, ::-1]))
            with Client.open(server=address) as client:
                wanted = client.infer(image).answer
            assert wanted is not None
            assert len(wanted.boxes) >= 2  # type: ignore[union-attr]
            boxes = sorted(wanted.boxes, key=lambda b: -b.score)  # type: ignore[union-attr]
            for row, box in zip(found, boxes, strict=False):
                x1, y1, x2, y2 = box.box_px
                np.testing.assert_allclose(row[2:], np.clip([y1 / 64, x1 / 64, y2 / 64, x2 / 64], 0, 1), atol=1e-6)
                assert row[0] == box.class_id
                np.testing.assert_allclose(row[1], box.score, atol=0.05)  # another operating point may have been chosen
            assert not found[len(boxes) :].any()
            for parts in ([b"{", b""], [b"{}"], [json.dumps({"shape": [1, 9, 9, 3], "dtype": "uint8"}).encode(), b"short"]):
                assert not detector.send(parts).any()
            server.kill()
            again = detector.detect(image[None])  # no server, and this bundle has no local model: zeros, and at once
            assert again.shape == (20, 6)
            assert detector.timeouts == 0
        finally:
            detector.close()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
    summary = json.loads(out.strip().splitlines()[-1])
    assert (process.returncode, summary["exit_code"]) == (0, 0), err
    assert summary["outcomes"]["result"] >= 1
    assert summary["outcomes"]["refused"] == 3
    assert summary["frames"] == 5


def test_an_address_that_is_taken_is_said(tmp_path: Path) -> None:
    bundle = write_cell_detector(tmp_path / "bundle").path
    with socket.create_server(("127.0.0.1", 0)) as taken, standby(tmp_path, bundle) as server:
        command = [
            sys.executable, "-m", "edge_client.cli", "--server", server.serve(),
            "--frigate", f"tcp://127.0.0.1:{taken.getsockname()[1]}",
        ]  # fmt: skip
        done = subprocess.run(
            command, env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "cannot listen there" in done.stderr
