"""Frigate's protocol over a poor link: bytes, latency and answers of 100 detections on vtest.avi.

    HEADTAIL_DATA=... python -m tests.bench.frigate [--model yolox-nano] [--rtt-ms 80] [--mbps 1] [--detections 100]

A stand-in for Frigate's zmq detector sends square regions (320 x 320, uint8) to a real ``edge-client --frigate``, five a second;
its server answers behind a shaped link. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deploy.testbed.link.model import LinkConfig
from deploy.testbed.link.trace import constant
from deploy.testbed.real.shape import Shaper
from splitters.evaluation.gating.scene import read_video
from tests.fakes.frigate import Detector
from tests.fakes.server_running import child, environment

SIDE_PX = 320


def ask(endpoint: str, frames: list[np.ndarray[Any, Any]], period_s: float) -> dict[str, Any]:
    """All detections, one after the other at their pace."""
    detector = Detector(endpoint, timeout_ms=60_000)
    detector.ask_for_model()
    detector.detect(np.zeros((1, SIDE_PX, SIDE_PX, 3), np.uint8))  # the first one meets a link that nobody knows yet
    detector.close()
    detector = Detector(endpoint)
    took_ms, found = [], 0
    for frame in frames:
        begin_s = time.monotonic()
        rows = detector.detect(frame)
        took_ms.append((time.monotonic() - begin_s) * 1e3)
        found += int(rows.any())
        time.sleep(max(0.0, period_s - (time.monotonic() - begin_s)))
    detector.close()
    return {
        "timeouts": detector.timeouts, "with_boxes": found, "seen_ms_p50": round(float(np.quantile(took_ms, 0.5)), 1),
        "seen_ms_p95": round(float(np.quantile(took_ms, 0.95)), 1), "seen_ms_max": round(max(took_ms), 1),
    }  # fmt: skip


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """One sitting."""
    video = Path(os.environ["HEADTAIL_DATA"]) / "video" / "vtest.avi"
    frames = []
    for picture in list(read_video(video)[0])[: 2 * args.detections : 2]:
        square = cv2.resize(picture[:, 96 : 96 + picture.shape[0]], (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        frames.append(np.ascontiguousarray(square[None, :, :, ::-1]))
    link = LinkConfig(trace=constant(args.mbps * 1e6), delay_ns=int(args.rtt_ms / 2 * 1e6))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as tmp, child(Path(tmp), Path(args.model)) as server:
        host, port = server.address.rsplit(":", 1)
        # The model is fetched once, before the link is shaped: a download of megabytes is not what is measured.
        fetch = [sys.executable, "-m", "edge_client.cli", "--camera", "synthetic:", "--frames", "2", "--server", server.address]
        cache = {**environment(), "HEADTAIL_CACHE": args.cache}
        await asyncio.to_thread(subprocess.run, fetch, env=cache, check=True, capture_output=True)
        shaper = Shaper(link, link)
        address = f"127.0.0.1:{await shaper.start(host, int(port))}"
        command = [sys.executable, "-m", "edge_client.cli", "--frigate", endpoint, "--server", address, "--json"]
        client = subprocess.Popen(command, env=cache, stdout=subprocess.PIPE, text=True)
        try:
            seen = await asyncio.to_thread(ask, endpoint, frames, args.period_s)
        finally:
            client.send_signal(signal.SIGTERM)
            out, _ = await asyncio.to_thread(client.communicate, timeout=60)
            await shaper.close()
    summary = json.loads(out.strip().splitlines()[-1])
    raw = SIDE_PX * SIDE_PX * 3
    return {
        **seen, "outcomes": summary["outcomes"], "bytes_a_detection": round(summary["payload_bytes_total"] / summary["frames"]),
        "share_of_tensor": round(summary["payload_bytes_total"] / summary["tensor_bytes_total"], 4), "tensor_bytes": raw,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="detector")
    parser.add_argument("--rtt-ms", type=float, default=80)
    parser.add_argument("--mbps", type=float, default=1)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--period-s", type=float, default=0.2)
    parser.add_argument("--cache", default="/tmp/headtail-bench-frigate")
    print(json.dumps(asyncio.run(run(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
