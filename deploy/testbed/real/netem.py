"""The relay on kernels that have ``tc netem``: a pair of virtual cables, each end delayed, paced and dropped by the kernel.

It costs no processor time of ours, so it carries rates the TUN relay cannot. What it cannot do the same: an outage drops
packets instead of holding them, jitter is normal instead of half-normal, and its coins are the kernel's own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Self

from deploy.testbed.link.model import LinkConfig
from deploy.testbed.real.realtime import RealTime
from protos.errors import ConfigError

log = logging.getLogger(__name__)

_PACKET_BYTES = 1514
_STEPS_NS = 3600 * 1_000_000_000


def has_netem() -> bool:
    """Whether this kernel knows the discipline, tried in a namespace of its own."""
    space = f"htn{os.getpid() % 100_000}"
    try:
        ip("netns", "add", space)
    except (OSError, subprocess.SubprocessError):
        return False
    try:
        ip("netns", "exec", space, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except (OSError, subprocess.SubprocessError):
        return False
    else:
        return True
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            ip("netns", "del", space)


def discipline(config: LinkConfig, bps: float) -> list[str]:
    """What ``tc qdisc add dev DEVICE root`` is given for a link whose capacity just now is ``bps``; 0: an outage."""
    words = ["netem", "delay", f"{config.delay_ns / 1e6:.3f}ms"]
    if config.jitter_ns:
        words += [f"{config.jitter_ns / 1e6:.3f}ms", "distribution", "normal"]
    m = config.loss
    if bps <= 0:
        words += ["loss", "100%"]
    elif m.loss and m.burst_packets > 1:
        share_bad = m.loss / m.loss_in_bad
        to_good = 1 / m.burst_packets
        to_bad = to_good * share_bad / (1 - share_bad)
        words += ["loss", "gemodel", *(f"{100 * x:.6g}%" for x in (to_bad, to_good, m.loss_in_bad, 0.0))]
    elif m.loss:
        words += ["loss", f"{100 * m.loss:.6g}%"]
    if bps > 0:
        words += ["rate", f"{max(1, round(bps))}bit"]
    # Its limit counts what waits for capacity and what is under way alike.
    queue_bytes = config.queue_bytes or max(30_000.0, config.trace.mean_bps() / 8 * 0.2)
    under_way_bytes = bps / 8 * config.delay_ns / 1e9
    return [*words, "limit", str(max(2, math.ceil((queue_bytes + under_way_bytes) / _PACKET_BYTES)))]


class NetemRelay:
    """Like ``Relay``, by the kernel. An async context manager; ``command`` prefixes what runs at one end of the link.

    Args:
        up: from the client's end to the server's.
        down: back.
        addresses: of the client's end and of the server's.
        congestion: the kernel's congestion control at both ends.
        discipline: what ``tc qdisc add dev DEVICE root`` is given, as ``discipline`` below.

    Raises:
        ConfigError: on entering, where it cannot run.
    """

    name = "netem"

    def __init__(
        self,
        up: LinkConfig,
        down: LinkConfig,
        *,
        addresses: tuple[str, str],
        congestion: str = "cubic",
        discipline: Callable[[LinkConfig, float], list[str]] = discipline,
    ) -> None:
        self.discipline = discipline
        self._links = (up, down)
        self._addresses = addresses
        self._congestion = congestion
        tag = f"ht{os.getpid() % 100_000}"
        self._spaces = (f"{tag}c", f"{tag}s")
        self._devices = (f"{tag}a", f"{tag}b")
        self._made: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._running: RealTime | None = None

    @property
    def time(self) -> RealTime:
        """The link's clock, which began when the context was entered."""
        if self._running is None:
            raise ConfigError("the relay has not been entered")
        return self._running

    def command(self, end: str, program: Sequence[str]) -> list[str]:
        """``program`` run at ``end``, ``client`` or ``server``."""
        return ["ip", "netns", "exec", self._spaces[end == "server"], *program]

    async def __aenter__(self) -> Self:
        try:
            self._build()
        except (OSError, subprocess.SubprocessError) as error:
            self._remove()
            raise ConfigError(f"tc netem is not possible here: {error}") from error
        self._begin()
        return self

    def _begin(self) -> None:
        self._running = RealTime()
        self._tasks = [asyncio.create_task(self._follow(i)) for i in (0, 1)]

    def restart(self) -> None:
        """Starts the link's time again from zero. To be called when both programs are ready and nothing is under way."""
        for task in self._tasks:
            task.cancel()
        for i in (0, 1):
            self._set(i, "change", self._links[i].trace.steps(_STEPS_NS)[0][1])
        self._begin()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._remove()

    def _build(self) -> None:
        for space in self._spaces:
            ip("netns", "add", space)
            self._made.append(space)
        ip("-n", self._spaces[0], "link", "add", self._devices[0], "type", "veth", "peer", "name", self._devices[1])
        ip("-n", self._spaces[0], "link", "set", self._devices[1], "netns", self._spaces[1])
        for i in (0, 1):
            space, device, own, other = self._spaces[i], self._devices[i], self._addresses[i], self._addresses[1 - i]
            ip("-n", space, "addr", "add", own, "peer", other, "dev", device)
            ip("-n", space, "link", "set", device, "up")
            ip("-n", space, "link", "set", "lo", "up")
            # Else 64 kB would count as one packet of the queue, and be lost as one.
            ip("-n", space, "link", "set", device, "gso_max_segs", "1")
            ip("-n", space, "route", "replace", other, "dev", device, "src", own, "congctl", self._congestion)
            self._set(i, "add", self._links[i].trace.steps(_STEPS_NS)[0][1])

    def _set(self, i: int, verb: str, bps: float) -> None:
        words = self.discipline(self._links[i], bps)
        ip("netns", "exec", self._spaces[i], "tc", "qdisc", verb, "dev", self._devices[i], "root", *words)

    async def _follow(self, i: int) -> None:
        """Sets the capacity at every step of the trace."""
        steps = self._links[i].trace.steps(_STEPS_NS)
        for at_ns, bps in (step for before, step in pairwise(steps) if step[1] != before[1]):
            await asyncio.sleep(max(0.0, (at_ns - self.time.since_ns()) / 1e9))
            try:
                self._set(i, "change", bps)
            except (OSError, subprocess.SubprocessError) as error:
                log.warning("the capacity could not be changed: %s", error)

    def _remove(self) -> None:
        for space in self._made:
            with suppress(OSError, subprocess.SubprocessError):
                ip("netns", "del", space)
        self._made = []


def ip(*arguments: str) -> None:
    """Runs the command ``ip``.

    Raises:
        OSError, subprocess.SubprocessError: it is missing, or failed.
    """
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
