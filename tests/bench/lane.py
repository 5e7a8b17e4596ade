"""Frames as datagrams on links that lose packets, in virtual time: the same figures on any machine, however busy.

    python -m tests.bench.lane --seeds 8

The client's lane, the server's path, parity, the window and aioquic are the real ones; link, device and server take virtual time
(round trip 80 ms, 10 Mbit/s, 15 ms a frame on the device and 12 in the server). The link begins to lose, both ways alike, when the
session has stood for eight seconds, and the ten seconds from then on count: on time is an answer within 200 ms of the capture.
"""

from __future__ import annotations

import argparse
import json
import logging

import numpy as np

from deploy.testbed.link.model import LinkConfig, LossModel
from deploy.testbed.link.trace import constant
from tests.bench.datagrams import DEADLINE_MS, LEAD_S, LOSSES, MBPS, RTT_MS
from tests.fakes.lanes import answered

SIZES = (200, 2300)  # of a frame of the detector and of the classifier, bytes


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: dict[str, list[float]] = {}
    for loss, burst in LOSSES:
        model = LossModel(loss=loss, burst_packets=burst)
        config = LinkConfig(trace=constant(MBPS * 1e6), delay_ns=RTT_MS * 500_000, loss=model, loss_from_ns=int(LEAD_S * 1e9))
        for size in SIZES:
            found = [
                float(np.mean(answered(config, size, seed=seed, seconds=args.seconds, deadline_s=DEADLINE_MS / 1e3)))
                for seed in range(args.seeds)
            ]
            name = f"{loss:g} in runs of {burst:g}, {size} bytes"
            rows[name] = [round(float(np.mean(found)), 4), round(min(found), 4)]
            print(name, *rows[name], flush=True)
    print(json.dumps({"lane": rows}))


if __name__ == "__main__":
    main()
