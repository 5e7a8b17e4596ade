"""Who decides: ours, and what it is compared with. All run over the same session, credit window and model times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from deploy.testbed.workload import Workload
from edge_client import extensions
from edge_client.control import ControlConfig, Controller, Decision, Local, LocalOption, Offload, Policy, Skip, Split
from protos.errors import ConfigError
from splitters.bundle.offload import OffloadOption, pareto_offloads
from splitters.bundle.operating_point import OperatingPoint

_worth_offering = lru_cache(maxsize=8)(pareto_offloads)  # a thousand cameras have one workload


class Ours(Controller):
    """The project's controller."""

    def __init__(
        self, config: ControlConfig, points: Sequence[OperatingPoint], *, offloads: Sequence[OffloadOption] = (), **more: Any
    ) -> None:
        super().__init__(config, points, offloads=_worth_offering(tuple(offloads)), **more)


class OursByTable(Ours):
    """The same, but it believes the table's payload sizes, whatever payloads cost."""

    def __init__(self, config: ControlConfig, points: Sequence[OperatingPoint], **more: Any) -> None:
        super().__init__(replace(config, learn_sizes=False), points, **more)


class Baseline(Controller):
    """A policy of others inside our session: it has the credit window, so that it does not drown in its own queue."""

    def __init__(
        self,
        config: ControlConfig,
        points: Sequence[OperatingPoint],
        *,
        local: LocalOption | None = None,
        offloads: Sequence[OffloadOption] = (),
        **more: Any,
    ) -> None:
        super().__init__(config, points, local=local, offloads=offloads, **more)
        self.points, self.offloads, self.has_local = points, offloads, local is not None

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:
        """The policy proper, asked when the window is open."""
        raise NotImplementedError

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:  # noqa: ARG002
        """The choice, or a skip where the window is closed."""
        if not self.estimator.connected:
            return Skip(reason="offline")
        return self.choose(now_ns, deadline_ns) if self.allows() else Skip(reason="window")

    def wants_fallback(self, frame_id: int, now_ns: int, deadline_ns: int) -> bool:  # noqa: ARG002
        """Never: what was sent is waited for."""
        return False

    def on_grant(self, now_ns: int, **grant: float) -> None:
        """Grants are an invention of ours; the others do not know them."""


class LocalOnly(Baseline):
    """Nothing is ever sent."""

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:  # noqa: ARG002
        """Local."""
        return Local() if self.has_local else Skip(reason="nolocal")


class FixedSplit(Baseline):
    """The most accurate operating point, always."""

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:  # noqa: ARG002
        """That point."""
        best = max(self.points, key=lambda p: (p.accuracy, -p.payload_bytes.p50))
        return Split(point_id=best.id)


class FixedOffload(Baseline):
    """One JPEG quality, the middle one of the table, always."""

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:  # noqa: ARG002
        """That quality."""
        o = self.offloads[len(self.offloads) // 2]
        return Offload(format=o.format, quality=o.quality, size_px=o.size_px)


class _MeanThroughput(Baseline):
    """Keeps the exponential mean of bytes over the whole round trip, as the published controllers do."""

    alpha = 0.4

    def __init__(self, config: ControlConfig, points: Sequence[OperatingPoint], **more: Any) -> None:
        super().__init__(config, points, **more)
        self.mean_bps = config.initial_bps
        self._sent: dict[int, tuple[int, int]] = {}

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        """Notes when how much left."""
        super().on_sent(frame_id, n_bytes, now_ns)
        self._sent[frame_id] = (n_bytes, now_ns)

    def on_ack(self, frame_id: int, now_ns: int, server_ns: int = 0) -> None:
        """Updates the mean."""
        super().on_ack(frame_id, now_ns, server_ns)
        n_bytes, sent_ns = self._sent.pop(frame_id, (0, 0))
        if n_bytes:
            sample = 8e9 * n_bytes / max(1, now_ns - server_ns - sent_ns)
            self.mean_bps += self.alpha * (sample - self.mean_bps)


class AdaptiveOffload(_MeanThroughput):
    """The best JPEG quality whose mean transfer fits the deadline."""

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:
        """That quality, or the smallest."""
        fits = [
            o for o in self.offloads if o.encode_ms.p50 * 1e6 + 8e9 * o.payload_bytes.p50 / self.mean_bps <= deadline_ns - now_ns
        ]
        smallest = min(self.offloads, key=lambda o: o.payload_bytes.p50)
        o = max(fits, key=lambda o: o.accuracy, default=smallest)
        return Offload(format=o.format, quality=o.quality, size_px=o.size_px)


class Reference(_MeanThroughput):
    """The published on-device controller: exponential mean, table look-up, the server's time ignored."""

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:
        """The most accurate point whose mean time fits, or the smallest."""
        points = self.points
        fits = [p for p in points if p.head_ms.p50 * 1e6 + 8e9 * p.payload_bytes.p50 / self.mean_bps <= deadline_ns - now_ns]
        return Split(point_id=max(fits, key=lambda p: p.accuracy, default=min(points, key=lambda p: p.payload_bytes.p50)).id)


POLICIES: dict[str, Callable[..., Policy]] = {
    "ours": Ours,
    "ours_table": OursByTable,
    "local": LocalOnly,
    "offload_fixed": FixedOffload,
    "offload_adaptive": AdaptiveOffload,
    "split_fixed": FixedSplit,
    "reference": Reference,
}


def make_policy(name: str, workload: Workload, config: ControlConfig) -> Policy:
    """A fresh policy: one of these, a registered one, or ``module:Class``.

    Raises:
        ConfigError: no such policy, or the workload lacks what it needs.
    """
    if name not in POLICIES and ":" not in name and name not in extensions.POLICIES:
        raise ConfigError(f"no policy {name!r}; there are {', '.join(POLICIES)} and oracle, or module:Class")
    if name.startswith("offload") and not workload.offloads:
        raise ConfigError(f"policy {name} needs offload options; workload {workload.name!r} has none")
    given = {"local": workload.local, "offloads": workload.offloads, "head_ms": {p.id: p.head_ms for p in workload.points}}
    if name in POLICIES:
        return POLICIES[name](config, workload.points, **given)
    made: Policy = extensions.make(extensions.POLICIES, Policy, name, config, workload.points, **given)
    return made
