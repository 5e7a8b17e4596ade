"""Relay mode: two network namespaces joined by a pair of TUN devices, whose packets this process delays, paces and drops.

The kernel's own TCP runs over it, so this is what the TCP model is checked against. Needs root, ``ip`` and
``/dev/net/tun``; touches nothing outside of its two namespaces, and removes them at the end.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import struct
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.testbed.link.model import LOST, Link, LinkConfig
from deploy.testbed.real.netem import NetemRelay, has_netem, ip
from deploy.testbed.real.realtime import RealTime
from protos.errors import ConfigError

log = logging.getLogger(__name__)

CLIENT_ADDRESS, SERVER_ADDRESS = "10.77.0.1", "10.77.0.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU_BYTES = 1500


def why_not() -> str:
    """Why the relay cannot run here; empty: it can."""
    if os.geteuid() != 0:
        return "the relay needs root"
    if not Path("/dev/net/tun").exists():
        return "the kernel offers no /dev/net/tun"
    try:
        if subprocess.run(["ip", "netns", "list"], capture_output=True, check=False, timeout=10).returncode:
            return "`ip netns` does not work here"
    except (OSError, subprocess.TimeoutExpired):
        return "the command `ip` (iproute2) is not installed"
    return ""


class Relay:
    """An async context manager; inside it ``command`` prefixes programs so that they run at one end of the link.

    Args:
        up: from the client's end to the server's.
        down: back.
        seed: of loss and jitter.
        congestion: the kernel's congestion control at both ends, e.g. ``cubic``.

    Raises:
        ConfigError: on entering, where it cannot run.
    """

    name = "tun"

    def __init__(self, up: LinkConfig, down: LinkConfig, *, seed: int = 0, congestion: str = "cubic") -> None:
        self._configs, self._seed = (up, down), seed
        self.up, self.down = Link(up, f"up/{seed}"), Link(down, f"down/{seed}")
        self._congestion = congestion
        self._tag = f"ht{os.getpid() % 100_000}"
        self._spaces = (f"{self._tag}c", f"{self._tag}s")
        self._fds: list[int] = []
        self._running: RealTime | None = None
        self._made: list[str] = []
        self.late_ns: deque[int] = deque(maxlen=20_000)  # how much later than the link says packets lately left here

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
        reason = why_not()
        if reason:
            raise ConfigError(f"relay mode is not possible here: {reason}; use --mode shape")
        _sweep()
        try:
            for space, device, own, other in (
                (self._spaces[0], f"{self._tag}a", CLIENT_ADDRESS, SERVER_ADDRESS),
                (self._spaces[1], f"{self._tag}b", SERVER_ADDRESS, CLIENT_ADDRESS),
            ):
                self._add(space, device, own, other)
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            raise ConfigError(f"relay mode is not possible here: {error}") from error
        self._running = RealTime()
        loop = asyncio.get_running_loop()
        client, server = self._fds
        loop.add_reader(client, self._forward, client, server)
        loop.add_reader(server, self._forward, server, client)
        return self

    def restart(self) -> None:
        """Starts the link's time again from zero. To be called when both programs are ready and nothing is under way."""
        self.time.stop()
        self.up, self.down = (
            Link(config, f"{name}/{self._seed}") for name, config in zip(("up", "down"), self._configs, strict=True)
        )
        self._running = RealTime()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        loop = asyncio.get_running_loop()
        for fd in self._fds:
            loop.remove_reader(fd)
        if self._running is not None:
            self._running.stop()
        self._remove()

    def _add(self, space: str, device: str, own: str, other: str) -> None:
        ip("netns", "add", space)
        self._made.append(space)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._fds.append(fd)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        ip("link", "set", device, "netns", space)
        ip("-n", space, "addr", "add", own, "peer", other, "dev", device)
        ip("-n", space, "link", "set", device, "mtu", str(_MTU_BYTES), "txqueuelen", "1000", "up")
        ip("-n", space, "link", "set", "lo", "up")
        # Not the sysctl: a namespace may set that only to what the whole machine allows everyone; a route may name any.
        try:
            ip("-n", space, "route", "replace", other, "dev", device, "src", own, "congctl", self._congestion)
        except subprocess.CalledProcessError as error:
            log.warning("the kernel keeps its own congestion control: %s", error.stderr.decode(errors="replace").strip())

    def _remove(self) -> None:
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)
        for space in self._made:
            with suppress(OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
                ip("netns", "del", space)
        self._fds, self._made = [], []

    def _forward(self, source: int, target: int) -> None:
        real = self._running
        if real is None:
            return
        link = self.up if source == self._fds[0] else self.down
        real.catch_up()
        for _ in range(64):
            try:
                packet = os.read(source, 65_536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                log.debug("the device is gone: %s", error)
                break
            arrival_ns = link.send(len(packet), real.loop.now_ns)
            if arrival_ns != LOST:
                real.loop.at(arrival_ns, self._deliver, (target, packet, arrival_ns))
        real.catch_up()

    def _deliver(self, row: tuple[int, bytes, int]) -> None:
        target, packet, due_ns = row
        with suppress(OSError):  # a device that is full or gone drops, as a wire would
            os.write(target, packet)
        self.late_ns.append(self.time.since_ns() - due_ns)
        if target == self._fds[-1]:
            self.delivered(packet)

    def delivered(self, packet: bytes) -> None:
        """A packet was handed to the server's end; for who wants to listen in."""


def _sweep() -> None:
    """Removes what relays left behind that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False, timeout=10).stdout
    for line in listed.splitlines():
        space = line.split()[0]
        if (found := re.fullmatch(r"ht(\d+)[cs]", space)) and not any(
            Path(f"/proc/{pid}").exists() for pid in _pids(int(found[1]))
        ):
            with suppress(OSError, subprocess.SubprocessError):
                ip("netns", "del", space)


def _pids(tag: int) -> list[int]:
    """Process ids whose relays carry that tag, up to the largest there can be."""
    return list(range(tag, 1 << 22, 100_000))


def open_relay(up: LinkConfig, down: LinkConfig, *, seed: int = 0) -> Relay | NetemRelay:
    """The kernel's own ``tc netem`` where there is one, else the TUN relay.

    Raises:
        ConfigError: neither can run here.
    """
    if reason := why_not():
        raise ConfigError(f"relay mode is not possible here: {reason}; use --mode shape")
    if has_netem():
        return NetemRelay(up, down, addresses=(CLIENT_ADDRESS, SERVER_ADDRESS))
    return Relay(up, down, seed=seed)
