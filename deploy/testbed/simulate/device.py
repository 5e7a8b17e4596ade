"""The real client as a slower device, and with any of the testbed's policies in its controller's place.

    python -m deploy.testbed.simulate.device --workload BUNDLE --policy reference --slowdown 10 -- --camera photos/ --realtime

The device is stretched, not loaded: the real work is done, and then waited until the time is over that the same work takes in
simulation, drawn from the same measured times and slowed as much. So one machine holds a slow device and a fast server, neither
takes processor time from the other, and what shape and relay mode add to simulation is everything but the device's times.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from deploy.testbed.simulate.camera import log_normal
from deploy.testbed.simulate.policies import make_policy
from deploy.testbed.workload import Workload, find_workload, workload_of
from edge_client.app import App
from edge_client.cli import main as run_client
from edge_client.config import ClientConfig
from edge_client.console import Console
from edge_client.control import ControlConfig, Policy
from edge_client.device.choices import DeviceTimes, make_controller, name_of
from edge_client.device.engine import NO_REFERENCE, Encoded, Engine, Features, Reference
from edge_client.frames import NS_PER_MS, NS_PER_S
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.runtime.inputs import Raw
from splitters.runtime.local import Local
from splitters.tasks.preprocess import Frame


class Pace:
    """How long this device takes: each job at least as long as drawn from a workload's measured times, slowed."""

    def __init__(self, workload: Workload, slowdown: float, seed: int = 0) -> None:
        self.workload = workload.slowed(slowdown)
        self._rng = random.Random(f"device/{seed}")  # noqa: S311
        self._begin_ns = 0

    def begin(self) -> None:
        """A frame's work begins."""
        self._begin_ns = time.monotonic_ns()

    def end(self, ms: Quantiles) -> float:
        """Waits until the work has taken as long as it should; the milliseconds it took."""
        wanted_ns = int(log_normal(self._rng, ms) * NS_PER_MS)
        time.sleep(max(0, self._begin_ns + wanted_ns - time.monotonic_ns()) / NS_PER_S)
        return (time.monotonic_ns() - self._begin_ns) / NS_PER_MS


class SlowLocal(Local):
    """The local model of such a device."""

    def __init__(self, local: Local, pace: Pace) -> None:
        vars(self).update(vars(local))
        self._pace = pace

    def answer(self, image: Frame, size_px: tuple[int, int]) -> tuple[Answer, float]:
        """See ``Local``."""
        self._pace.begin()
        answer, elapsed_ms = super().answer(image, size_px)
        option = self._pace.workload.local
        return answer, self._pace.end(option.ms) if option is not None else elapsed_ms


class SlowEngine(Engine):
    """The engine of such a device."""

    def __init__(self, bundle: Bundle, *, clock: Callable[[], int], threads: int, pace: Pace) -> None:
        super().__init__(bundle, clock=clock, threads=threads)
        self._pace = pace
        self._points = {p.id: p.head_ms for p in pace.workload.points}
        self._offloads = {(o.format, o.quality, o.size_px): o.encode_ms for o in pace.workload.offloads}
        if self.local is not None:
            self.local = SlowLocal(self.local, pace)

    def features(self, frame: Frame, raw: Raw | None = None) -> Features:
        """See ``Engine``."""
        self._pace.begin()
        return super().features(frame, raw)

    def picture(self, frame: Frame) -> Features:
        """See ``Engine``."""
        self._pace.begin()
        return super().picture(frame)

    def encode(self, features: Features, point: OperatingPoint, reference: Reference = NO_REFERENCE) -> Encoded:
        """See ``Engine``."""
        return self._slow(super().encode(features, point, reference), self._points[point.id])

    def compress(self, features: Features, image_format: str, quality: int, size_px: int = 0) -> Encoded:
        """See ``Engine``."""
        encoded = super().compress(features, image_format, quality, size_px)
        return self._slow(encoded, self._offloads[image_format, quality, size_px])

    def _slow(self, encoded: Encoded, ms: Quantiles) -> Encoded:
        took_ms = self._pace.end(ms)
        real_ms = sum(encoded.stages_ms.values())
        return replace(encoded, stages_ms={name: took_ms * part / real_ms for name, part in encoded.stages_ms.items()})


def device_app(config: ClientConfig, console: Console, *, policy: str, pace: Pace, begin_unix_ns: int = 0) -> App:
    """``edge-client`` on such a device, asking ``policy`` what to do.

    It loads everything, waits for ``begin_unix_ns``, and only then connects and captures.
    """

    async def load(bundle: Bundle) -> tuple[Engine, DeviceTimes]:
        engine = SlowEngine(bundle, clock=time.monotonic_ns, threads=config.threads, pace=pace)
        workload = pace.workload
        times = DeviceTimes(
            head_ms={p.id: p.head_ms for p in workload.points},
            local_ms=workload.local.ms if workload.local is not None else None,
            offload_ms={name_of(o): o.encode_ms for o in workload.offloads},
        )
        await asyncio.sleep(max(0.0, (begin_unix_ns - time.time_ns()) * 1e-9))
        return engine, times

    def choose(engine: Engine, times: DeviceTimes, fps: float) -> Policy:
        if policy in ("ours", "ours_table"):
            return make_controller(engine, times, fps=fps, explain=config.explain, learn_sizes=policy == "ours")
        settings = ControlConfig(fps=min(max(fps, 1.0), 1000.0) if fps else 30.0)
        made = make_policy(policy, workload_of(engine, times), settings)
        if policy != "local":
            engine.local = None  # they wait for what they sent, and have nothing else to say
        return made

    return App(config, console, load=load, policy=choose)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the client and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, help="whose device times: a bundle, or a workload's JSON file")
    parser.add_argument("--policy", default="ours")
    parser.add_argument("--slowdown", type=float, default=1.0)
    parser.add_argument("--begin-unix-ns", type=int, default=0, help="when to connect and begin to capture")
    parser.add_argument("client", nargs="+", help="edge-client's own arguments, after --")
    args = parser.parse_args(argv)
    pace = Pace(find_workload(args.workload), args.slowdown)
    make = partial(device_app, policy=args.policy, pace=pace, begin_unix_ns=args.begin_unix_ns)
    return run_client(args.client, make)


if __name__ == "__main__":
    sys.exit(main())
