"""Chooses, frame by frame, how much is said to the server.

The objective is the expected accuracy of the frames captured: a frame without an answer before its deadline counts
zero. Among the choices whose P(on time), the local fallback included, reaches the target, the one of the highest
value is taken; where none reaches it, the highest value altogether. A choice that takes the device or the link longer
than a frame interval displaces other frames, and its value is divided accordingly: that is how the controller turns
the frame rate as a knob.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from edge_client.control.budget import GrantBudget
from edge_client.control.config import ControlConfig
from edge_client.control.decision import Candidate, Decision, Explanation, Local, LocalOption, Offload, OffloadOption, Skip, Split
from edge_client.control.estimator import Estimator
from edge_client.control.quantile import SlidingQuantile
from edge_client.control.window import CreditWindow
from protos.errors import ConfigError
from splitters.operating_point import OperatingPoint, Quantiles

# The local model's p95 fits, so it makes it that often (other work on the device may stand in its way).
_LOCAL_SURE = 0.98
# Share of a frame interval the link may be busy in the long run.
_LINK_SHARE = 0.95
# A frame worth less than this is not sent: it would only stand in the next one's way.
_WORTHLESS = 0.02


class _Option:
    """One thing that can be done with a frame, its times kept as integers ready for use."""

    __slots__ = ("accuracy", "decision", "high_ns", "mid_ns", "n_bytes", "name", "samples", "typical_bytes")

    def __init__(self, name: str, decision: Decision, accuracy: float, payload: Quantiles, ms: Quantiles) -> None:
        self.name = name
        self.decision = decision
        self.accuracy = accuracy
        self.typical_bytes = payload.p50
        self.n_bytes = max(payload.p50, payload.p95)
        self.samples = SlidingQuantile(size=64, age_ns=60_000_000_000)
        self.set_ms(ms)

    def set_ms(self, ms: Quantiles) -> None:
        self.mid_ns = ms.p50 * 1e6
        self.high_ns = max(ms.p50, ms.p95) * 1e6

    def learn(self, elapsed_ns: int, now_ns: int) -> None:
        self.samples.add(max(0, elapsed_ns), now_ns)
        if len(self.samples) >= 8:
            self.mid_ns = self.samples.quantile(0.5, self.mid_ns)
            self.high_ns = max(self.mid_ns, self.samples.quantile(0.95, self.high_ns))


class Controller:
    """The device's decisions for one session.

    The caller reports to ``estimator`` what happens on the wire, to ``on_device`` how long the device took, and asks
    ``decide`` once a frame and ``may_send`` once a layer. Nothing here reads a clock or blocks.
    """

    def __init__(
        self,
        config: ControlConfig,
        points: Iterable[OperatingPoint],
        *,
        local: LocalOption | None = None,
        offloads: Sequence[OffloadOption] = (),
        head_ms: Mapping[int, Quantiles] | None = None,
        max_in_flight: int = 0,
    ) -> None:
        """``head_ms``: this device's own measurement by point id, decision to payload; else the table's prior.

        Raises:
            ConfigError: nothing to choose from.
        """
        self.config = config
        self.estimator = Estimator(config)
        self.window = CreditWindow(self.estimator, fps=config.fps, max_in_flight=max_in_flight)
        self.budget = GrantBudget(burst_ns=config.grant_burst_ns)
        head_ms = head_ms or {}
        self._remote = [
            _Option(f"split {p.id}", Split(point_id=p.id), p.accuracy, p.payload_bytes, head_ms.get(p.id, p.head_ms)) for p in points if p.pareto
        ]
        for o in offloads:
            offload = Offload(format=o.format, quality=o.quality, size_px=o.size_px)
            self._remote.append(_Option(offload.name, offload, o.accuracy, o.payload_bytes, o.encode_ms))
        self._remote.sort(key=lambda o: (o.n_bytes, -o.accuracy))
        self._local = _Option("local", Local(), local.accuracy, Quantiles(p50=0, p95=0), local.ms) if local else None
        if not self._remote and self._local is None:
            raise ConfigError("the controller has nothing to choose from: give it operating points, offload options or a local model")
        self._by_name = {o.name: o for o in [*self._remote, *([self._local] if self._local else [])]}
        self._last = ""

    # ------------------------------------------------------------------ events

    def on_grant(
        self, now_ns: int, *, bitrate_bps: float = 0.0, max_in_flight: int = 0, queue_ns: int = 0, tail_ns: int = 0, delivery_bps: float = 0.0
    ) -> None:
        """A grant from the server; 0 means no limit, or not known."""
        self.budget.set_bitrate(bitrate_bps, now_ns)
        self.estimator.on_grant(now_ns, max_in_flight=max_in_flight, queue_ns=queue_ns, tail_ns=tail_ns)

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        """Bytes of a layer were handed to the transport."""
        self.budget.spend(max(0, n_bytes), now_ns)
        self.estimator.on_sent(frame_id, n_bytes, now_ns)

    def on_device(self, decision: Decision, elapsed_ns: int, now_ns: int) -> None:
        """How long the device worked on a decision: to the payload (split, offload) or to the answer (local, fallback: pass ``Local()``)."""
        option = self._by_name.get(decision.name)
        if option is not None:
            option.learn(elapsed_ns, now_ns)

    def set_device_ms(self, name: str, ms: Quantiles) -> None:
        """Overrides what is believed of a choice's device time (the measurement at start)."""
        if name in self._by_name:
            self._by_name[name].set_ms(ms)

    # ------------------------------------------------------------------ decisions

    def may_send(self, frame_id: int, n_bytes: int, now_ns: int, deadline_ns: int, *, layer: int = 0) -> bool:
        """Whether this layer may enter the network now. The base goes if the grant allows it; a refining layer only
        while it would still arrive in time.
        """
        if not self.estimator.connected or n_bytes > self.budget.tokens_bytes(now_ns):
            return False
        if layer == 0:
            return True
        e = self.estimator
        done_ns = max(now_ns + e.base_rtt_ns, e.drained_ns(now_ns)) + e.service_ns(n_bytes) + e.server_ns
        return done_ns <= deadline_ns

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:
        """What to do with this frame.

        ``now_ns`` is when the device is free to begin; ``deadline_ns`` when the answer is worthless. Both are of the
        caller's monotonic clock.
        """
        e = self.estimator
        budget_ns = deadline_ns - now_ns
        local = self._local
        interval_ns = 1e9 / self.config.fps
        rows: list[Candidate] | None = [] if self.config.explain else None
        best: _Option | None = None
        best_value, best_met, best_fallback = _WORTHLESS, False, None
        last_value, last_met, last_fallback = -inf, False, None
        reason = "late" if budget_ns <= 0 else "worthless"
        local_p = 0.0
        if local is not None and budget_ns > 0:
            local_p = _LOCAL_SURE if local.high_ns <= budget_ns else (0.5 if local.mid_ns <= budget_ns else 0.0)
            value = local.accuracy * local_p / max(1.0, local.mid_ns / interval_ns)
            met = local_p >= self.config.target_on_time
            if value > best_value:
                best, best_value, best_met = local, value, met
            if self._last == local.name:
                last_value, last_met = value, met
            if rows is not None:
                rows.append(_row(local, local.mid_ns, local_p, value))
        tokens = inf
        if not e.connected:
            reason = "offline"
        elif budget_ns > 0 and not self.window.allows():
            reason = "window"
        elif budget_ns > 0:
            tokens = self.budget.tokens_bytes(now_ns)
            base_ns, server_ns, drained_ns = e.base_rtt_ns, e.server_ns, e.drained_ns(now_ns)
            idle = e.in_flight == 0
            room = inf if idle else self.window.limit_bytes - e.backlog_bytes
            for o in self._remote:
                if o.n_bytes > tokens or o.n_bytes > room:
                    if rows is not None:
                        rows.append(_row(o, 0.0, 0.0, 0.0, refused="grant" if o.n_bytes > tokens else "window"))
                    continue
                service_ns = e.service_ns(o.n_bytes)
                scale_ns = e.scale_ns(service_ns)
                done_ns = max(now_ns + o.mid_ns + base_ns, drained_ns) + service_ns + server_ns
                spare_ns = o.high_ns - o.mid_ns
                p = e.p_within(deadline_ns - done_ns - spare_ns, scale_ns)
                p_all, value, fallback_ns, device_ns = p, p * o.accuracy, None, o.mid_ns
                if local is not None:
                    start_ns = deadline_ns - local.high_ns
                    if now_ns + o.high_ns <= start_ns:
                        fallback_ns = int(start_ns)
                        p_early = e.p_within(start_ns - done_ns - spare_ns, scale_ns)
                        device_ns += (1 - p_early) * local.mid_ns
                        p_all += (1 - p) * _LOCAL_SURE
                        value = p_early * o.accuracy + (1 - p_early) * _LOCAL_SURE * local.accuracy
                value /= max(1.0, device_ns / interval_ns)
                share = service_ns / interval_ns / _LINK_SHARE
                if share > 1.0:
                    value /= share
                met = p_all >= self.config.target_on_time
                if (met, value) > (best_met, best_value) and value > _WORTHLESS:
                    best, best_value, best_met, best_fallback = o, value, met, fallback_ns
                if o.name == self._last:
                    last_value, last_met, last_fallback = value, met, fallback_ns
                if rows is not None:
                    rows.append(_row(o, done_ns - now_ns, p, value))
        if best is not None and best.name != self._last and last_met >= best_met and best_value - last_value < self.config.switch_margin:
            best, best_fallback = self._by_name[self._last], last_fallback
        explain = None
        if rows is not None:
            explain = self._explanation(frame_id, now_ns, deadline_ns, tokens, rows, best.name if best else f"skip {reason}")
        return self._answer(best, best_fallback, tokens, reason, explain)

    def _answer(self, best: _Option | None, fallback_ns: int | None, tokens: float, reason: str, explain: Explanation | None) -> Decision:
        if best is None:
            return Skip(reason=reason, explain=explain)
        self._last = best.name
        limit = None if tokens == inf else int(tokens)
        match best.decision:
            case Split(point_id=point_id):
                return Split(point_id=point_id, fallback_ns=fallback_ns, limit_bytes=limit, explain=explain)
            case Offload() as o:
                return Offload(format=o.format, quality=o.quality, size_px=o.size_px, fallback_ns=fallback_ns, limit_bytes=limit, explain=explain)
            case _:
                return Local(explain=explain)

    def _explanation(self, frame_id: int, now_ns: int, deadline_ns: int, tokens: float, rows: list[Candidate], choice: str) -> Explanation:
        e = self.estimator
        return Explanation(
            frame_id=frame_id,
            now_ns=now_ns,
            deadline_ns=deadline_ns,
            connected=e.connected,
            delivery_bps=e.delivery_bps,
            base_rtt_ms=e.base_rtt_ns / 1e6,
            server_ms=e.server_ns / 1e6,
            backlog_bytes=e.backlog_bytes,
            overdue_ms=e.overdue_ns(now_ns) / 1e6,
            in_flight=e.in_flight,
            window_frames=self.window.frames,
            grant_bps=self.budget.bitrate_bps,
            grant_tokens_bytes=tokens,
            candidates=tuple(rows),
            choice=choice,
        )


def _row(o: _Option, done_ns: float, p: float, value: float, refused: str = "") -> Candidate:
    return Candidate(name=o.name, payload_bytes=int(o.n_bytes), expected_ms=done_ns / 1e6, p_on_time=p, value=value, refused=refused)
