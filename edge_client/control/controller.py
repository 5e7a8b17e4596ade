"""Chooses, frame by frame, how much is said to the server. Over 400 lines: what a `Policy` is told and asked, in one state.

The objective is the expected accuracy of the frames captured: a frame without an answer before its deadline counts
zero. P(on time), the local fallback included, should reach the target. A choice that falls short of the target loses value
in proportion to the shortfall (``miss_price``), so the target is kept unless keeping it would cost a much worse answer. A
choice that leaves the device busy when the next frame comes is charged for what the frames to come lose by it (``backlog``).
So the controller lowers the frame rate where that pays. See ``scoring``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from edge_client.control.backlog import Backlog
from edge_client.control.budget import GrantBudget
from edge_client.control.config import ControlConfig
from edge_client.control.decision import Decision, Local, LocalOption, Offload, Skip, Split, with_terms
from edge_client.control.estimating.estimator import Estimator
from edge_client.control.estimating.sizes import PayloadSizes
from edge_client.control.estimating.window import CreditWindow
from edge_client.control.explain import explanation
from edge_client.control.lossy import LossyPath
from edge_client.control.options import KEY, Option, led_by, useful
from edge_client.control.scoring import LEAST_GAIN, Moment, Score, most_hopeful
from protos.errors import ConfigError
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles

# A frame worth less than this is not sent: it would only stand in the next one's way.
_WORTHLESS = 0.02
# What has less hope than this of an answer in time is sent once in a while only, to learn whether that is still so.
_HOPELESS, _HOPE_INTERVAL_NS = 0.05, 1_000_000_000
# On a device that may be busy when the next frame comes, the frames to come are thought about at every fourth decision.
_SWEEP_EVERY, _FIRST_SWEEPS, _PICKS = 4, 8, 2
# A size that is learnt to differ by less than this share leaves the choices as they are.
_SAME_SIZE = 0.08
_NOTHING = Quantiles(p50=0.0, p95=0.0)


class Controller:
    """The device's decisions for one session.

    It is a ``Policy``: told by ``on_...`` what happens on the wire and how long the device took, and asked ``decide`` once
    a frame, ``may_send`` once a layer, ``wants_fallback`` when a fallback is due. Nothing here reads a clock or blocks.
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
        self._interval_ns = 1e9 / config.fps
        self._backlog = Backlog(self._interval_ns)
        self._crowded = 0  # decisions on a device that may be busy when the next frame comes
        self._ahead: Moment | None = None
        self._picks: deque[Option] = deque(maxlen=_PICKS)  # what was sent lately
        own = head_ms or {}
        remote = [
            Option(Split(point_id=p.id), p.accuracy, p.payload_bytes, own.get(p.id, p.head_ms)) for p in points if p.pareto
        ] + [Option.of(o) for o in offloads]
        self._local = Option(Local(), local.accuracy, _NOTHING, local.ms) if local else None
        if not remote and self._local is None:
            raise ConfigError("the controller has nothing to choose from: give it operating points, offloads or a local model")
        self._all = remote
        self._sizes: PayloadSizes | None = None
        if config.learn_sizes:
            known = [(o.name, o.kind, o.table_bytes) for o in remote] + [
                (o.name + KEY, o.kind + KEY, o.key_bytes) for o in remote if o.key_bytes is not None
            ]
            self._sizes = PayloadSizes({name: size for name, _, size in known}, {name: kind for name, kind, _ in known})
        self._age, self._resize = 0, False
        self._video_px: int | None = None  # of the H.264 stream that stands
        self._least_ns = self._longest_ns = 0.0
        self._bytes = (0.0, 0.0)
        self._consider()
        self._by_name = {o.name: o for o in [*remote, *([self._local] if self._local else [])]}
        self._lossy = LossyPath()
        self._learnt = 0
        self._stretch = 1.0  # of a job, on a device that were this camera's alone and as much slower as its share is small
        self._free_ns = 0.0  # when that device is free
        self._last: Option | None = None
        self._hoped_ns = -_HOPE_INTERVAL_NS
        self._span_ns = 0  # capture to deadline: the longest seen
        self._captured_ns = 0.0  # of the frame decided last
        # Margins and fines are in units of the best accuracy there is: a detector's .08 AP is as good as a classifier's .7.
        self._unit = max(o.accuracy for o in self._by_name.values()) or 1.0
        self._fine = config.miss_price * self._unit
        self._margin = config.switch_margin * self._unit

    # ------------------------------------------------------------------ events

    def on_connect(self, now_ns: int) -> None:
        """A session with our bundle stands."""
        self.estimator.on_connect(now_ns)

    def on_disconnect(self, now_ns: int) -> None:
        """The session is gone, or takes no more frames."""
        self.estimator.on_disconnect(now_ns)

    def on_grant(
        self, now_ns: int, *, bitrate_bps: float = 0.0, max_in_flight: int = 0, queue_ns: int = 0, tail_ns: int = 0
    ) -> None:
        """A grant from the server; 0 means no limit, or not known."""
        self.budget.set_bitrate(bitrate_bps, now_ns)
        self.estimator.on_grant(now_ns, max_in_flight=max_in_flight, queue_ns=queue_ns, tail_ns=tail_ns)

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        """Bytes of a layer were handed to the transport."""
        self.budget.spend(max(0, n_bytes), now_ns)
        self.estimator.on_sent(frame_id, self._lossy.sent(n_bytes, self.frame_bytes()), now_ns)
        self._look_ahead()
        if self._resize:  # now, with the frame on its way, rather than in the next decision
            self._believe_sizes(now_ns)

    def on_ack(self, frame_id: int, now_ns: int, server_ns: int = 0) -> None:
        """A result arrived, late or not; see ``Estimator.on_ack``."""
        self.estimator.on_ack(frame_id, now_ns, server_ns)

    def on_refused(self, frame_id: int, now_ns: int) -> None:
        """The server was too busy for the frame; the way there and back is learnt from it all the same."""
        self.estimator.on_refused(frame_id, now_ns)

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        """No answer will come for the frame: it no longer fills the window. Losses beyond what the path explains are news."""
        self.estimator.on_lost(frame_id, now_ns, explained=self._lossy.explains())

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """A ping came back."""
        self.estimator.on_pong(rtt_ns, now_ns)

    def ping_due(self, now_ns: int) -> bool:
        """Whether the round trip should be measured now."""
        return self.estimator.ping_due(now_ns)

    def on_transport(self, *, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        """From now on frames go by a stream, or by datagrams: how late answers come is learnt for each."""
        self.estimator.set_reliable(reliable)
        self._lossy.set_lost(None if reliable else lost)

    def frame_bytes(self) -> float:
        """See ``Policy``."""
        return self._lossy.frame_bytes(self._interval_ns / self.estimator.ns_per_byte)

    def set_limit(self, max_in_flight: int) -> None:
        """Frames that may be unanswered by the server's welcome; 0: no limit of its own."""
        self.window.set_limit(max_in_flight)

    def allows(self) -> bool:
        """Whether a frame may enter the network now."""
        return self.window.allows()

    @property
    def granted_in_flight(self) -> int:
        """Frames that may be unanswered by the last grant; 0: no limit."""
        return self.estimator.grant_max_in_flight

    def on_device(self, decision: Decision, elapsed_ns: int, now_ns: int) -> None:
        """How long the device worked: decision to payload (split, offload) or to answer (local, fallback: pass ``Local()``)."""
        option = self._by_name.get(decision.name)
        self._free_ns = max(self._free_ns, now_ns - elapsed_ns) + elapsed_ns * self._stretch
        if option is self._local:
            self._look_ahead()
        if option is not None:
            option.learn(elapsed_ns, now_ns)
            self._learnt += 1
            if self._learnt % 64 == 0:
                self._consider()
            elif option is not self._local:
                self._least_ns = min(self._least_ns, option.mid_ns)
                self._longest_ns = max(self._longest_ns, option.high_ns)

    def on_share(self, share: float) -> None:
        """Which part of the device's time this camera may take; what it takes beyond is the other cameras' loss."""
        self._stretch = 1.0 / share
        if self._stretch > 1.0 and self._local is not None:  # a share too small for the local model is still for the local model
            self._stretch = max(1.0, min(self._stretch, self._interval_ns / max(1.0, self._local.high_ns)))

    def on_reference(self, age: int) -> None:
        """How many frame intervals old the newest reference is that the next frame could be predicted from; 0: there is none."""
        if age != self._age:
            self._age, self._resize = age, True

    def on_video(self, size_px: int | None) -> None:
        """Of which size setting the H.264 stream is that the next frame could continue; None: it would begin with a key frame."""
        if size_px != self._video_px:
            self._video_px, self._resize = size_px, True

    def on_payload(self, decision: Decision, n_bytes: int, now_ns: int) -> None:
        """What a frame's payload is, all its layers together, sent or not; with the reference told last."""
        option = self._by_name.get(decision.name)
        if option is None or self._sizes is None:
            return
        name, age = self._sized(option)
        self._sizes.learn(name, age, n_bytes, now_ns)
        _, p95 = self._sizes.expect_all(((name, age),), now_ns)[0]
        self._resize |= abs(p95 - option.n_bytes) > _SAME_SIZE * option.n_bytes

    def set_device_ms(self, decision: Decision, ms: Quantiles) -> None:
        """Overrides what is believed of a choice's device time (the measurement at start)."""
        if decision.name in self._by_name:
            self._by_name[decision.name].set_ms(ms)
            self._consider()

    def withdraw_offloads(self, form: str = "") -> bool:
        """The server takes no offloads any more, or none of one format. Whether there were any."""
        kept = [o for o in self._all if not isinstance(o.decision, Offload) or form not in ("", o.decision.format)]
        gone, self._all = len(kept) < len(self._all), kept
        self._consider()
        return gone

    # ------------------------------------------------------------------ decisions

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:
        """What to do with this frame.

        ``now_ns`` is when the device is free to begin; ``deadline_ns`` when the answer is worthless. Both are of the
        caller's monotonic clock.
        """
        if self._resize:
            self._believe_sizes(now_ns)
        self._look_ahead()  # should the last frame not have left the device
        tokens = self.budget.tokens_bytes(now_ns)
        scores, reason = self._scores(now_ns, deadline_ns, tokens)
        best = self._choose(scores, now_ns) or self._probe(scores)
        explain = None
        if self.config.explain:
            explain = explanation(
                self.estimator, scores, frame_id=frame_id, now_ns=now_ns, deadline_ns=deadline_ns, window_frames=self.window.frames,
                grant_bps=self.budget.bitrate_bps, tokens=tokens, choice=best.option.name if best else f"skip {reason}",
            )  # fmt: skip
        if best is None:
            return Skip(reason=reason, explain=explain)
        self._last = best.option
        if best.option is not self._local and best.option not in self._picks:
            self._picks.append(best.option)
        if best.p < _HOPELESS:
            self._hoped_ns = now_ns
        hold = best.fallback_ns is not None and self._local is not None and best.option.accuracy > self._local.accuracy
        return with_terms(best.option.decision, fallback_ns=best.fallback_ns, tokens_bytes=tokens, hold=hold, explain=explain)

    def may_send(self, frame_id: int, n_bytes: int, now_ns: int, deadline_ns: int, *, layer: int = 0) -> bool:  # noqa: ARG002
        """Whether this layer may enter the network now.

        The base goes if the credit window and the grant allow it; a refining layer only while it would still arrive
        in time. Of a frame whose base may not go, nothing goes: fall back, or drop it.
        """
        e = self.estimator
        if not e.connected or n_bytes > self.budget.tokens_bytes(now_ns):
            return False
        if layer == 0:
            return self.window.allows()
        done_ns = max(now_ns + e.base_rtt_ns, e.drained_ns(now_ns)) + e.service_ns(n_bytes) + e.server_ns
        return done_ns <= deadline_ns

    def wants_fallback(self, frame_id: int, now_ns: int, deadline_ns: int) -> bool:
        """Whether the local model should answer this frame now, at its ``fallback_ns``, its own answer not being there.

        False when the answer is likely enough to come in time, or the device's time is worth more to other frames.
        """
        local = self._local
        if local is None or now_ns + local.mid_ns > deadline_ns:
            return False
        gain = (1 - self.estimator.p_still(frame_id, now_ns, deadline_ns)) * local.accuracy
        since_ns = max(0.0, now_ns - self._captured_ns) % self._interval_ns
        mid_ns, high_ns = local.mid_ns * self._stretch, local.high_ns * self._stretch
        later = self._backlog.expected(since_ns + mid_ns - self._interval_ns, high_ns - mid_ns)
        return gain > later + LEAST_GAIN * local.accuracy

    # ------------------------------------------------------------------ inside

    def _consider(self) -> None:
        """Leaves out what is beaten in everything, and notes what holds for the rest."""
        self._remote = useful(self._all)
        sizes = [o.typical_bytes for o in self._remote] or [0.0]
        self._bytes = min(sizes), max(sizes)
        # Bounds of all device times: what is learnt in between widens them.
        self._least_ns = min((o.mid_ns for o in self._remote), default=0.0)
        self._longest_ns = max((o.high_ns for o in self._remote), default=0.0)

    def _believe_sizes(self, now_ns: int) -> None:
        """Gives every choice the size that was learnt for it."""
        self._resize = False
        if self._sizes is not None:
            for o, size in zip(self._all, self._sizes.expect_all(map(self._sized, self._all), now_ns), strict=True):
                o.set_sizes(*size)
        else:
            for o in self._all:
                if o.key_bytes is not None:
                    o.set_bytes(o.table_bytes if self._continues(o) else o.key_bytes)
        self._consider()

    def _sized(self, o: Option) -> tuple[str, int]:
        """Under which name and reference age an option's next payload is known by size."""
        if o.key_bytes is not None:
            return (o.name if self._continues(o) else o.name + KEY), 0
        return o.name, self._age if isinstance(o.decision, Split) else 0

    def _continues(self, o: Option) -> bool:
        """Whether a video option's next frame can depend on the one before."""
        return isinstance(o.decision, Offload) and o.decision.size_px == self._video_px

    def _scores(self, now_ns: int, deadline_ns: int, tokens: float) -> tuple[list[Score], str]:
        """Every option's score, and the word for a skip should none be worth it."""
        if deadline_ns <= now_ns:
            return [], "late"
        e = self.estimator
        self._span_ns = max(self._span_ns, deadline_ns - now_ns)
        self._captured_ns = deadline_ns - self._span_ns
        since_ns = now_ns - self._captured_ns
        late_ns = since_ns if self._stretch == 1.0 else max(0.0, self._free_ns - self._captured_ns)
        local_ns = self._local.mid_ns if self._local else 0.0
        roomy = (self._longest_ns + 2 * local_ns) * self._stretch <= self._interval_ns
        usual_ns = self._last.mid_ns if self._last is not None else local_ns
        moment = Moment(
            e, self._local, now_ns, deadline_ns, self._backlog, late_ns,
            target=self.config.target_on_time, fine=self._fine, usual_ns=usual_ns, roomy=roomy,
            since_ns=since_ns, stretch=self._stretch, redundancy=self._lossy.redundancy, frame_bytes=self.frame_bytes(),
        )  # fmt: skip
        scores = [moment.score_local(self._local)] if self._local else []
        closed = e.connected and self._score_remotes(scores, moment, tokens)
        if not roomy:
            self._crowded += 1
            if self._crowded % _SWEEP_EVERY == 1:
                self._ahead = moment
        if not e.connected:
            return scores, "offline"
        return scores, "window" if closed else "worthless"

    def _look_ahead(self) -> None:
        """Thinks about the frames to come, once the frame at hand is on its way."""
        if self._ahead is None:
            return
        moment, self._ahead = self._ahead, None
        rows = moment.rows([o for o in self._picks if o in self._remote])
        for _ in range(_FIRST_SWEEPS if self._crowded <= _SWEEP_EVERY else 1):
            self._backlog.sweep(rows, -moment.fine * moment.target)

    def _score_remotes(self, scores: list[Score], moment: Moment, tokens: float) -> bool:
        """Adds what can be sent; whether the window kept something out.

        What was chosen last comes first, then the most accurate. What cannot pass the best so far is not looked at any further.
        """
        e, now_ns = self.estimator, moment.now_ns
        frames, room = self.window.limits() if e.in_flight else (0, inf)
        room -= e.backlog_bytes
        full = 0 < frames <= e.in_flight
        closed, last, margin, options, everything = False, self._last, self._margin, self._remote, self.config.explain
        best = scores[0].net if scores and not everything else -inf
        if moment.roomy and best > -inf and moment.too_late(self._least_ns, self._longest_ns, self._bytes):
            options = [last] if last in options else []
        elif last is not None and last in options:
            options = led_by(last, options)
        # The smallest there is may always be tried: a model whose frames are all large would else never be.
        untried = max(e.room_to_try_bytes, self._bytes[0])
        for o in options:
            least = best if o is not last else best - margin
            if o.accuracy <= least:
                if o is last:
                    continue
                break  # the most accurate came first
            if o.n_bytes > tokens or o.typical_bytes > untried:
                scores.append(Score(o, refused="grant" if o.n_bytes > tokens else "untried"))
                continue
            if (full or o.typical_bytes > room) and e.in_flight_at(now_ns + o.mid_ns, now_ns) >= (frames if full else 1):
                closed = True
                scores.append(Score(o, refused="window"))
                continue
            score = moment.score_remote(o, least)
            if score is not None:
                scores.append(score)
                if score.net > best and score.p >= _HOPELESS and not everything:
                    best = score.net
        return closed

    def _choose(self, scores: list[Score], now_ns: int) -> Score | None:
        best, last = None, None
        least = -self._fine * self.config.target_on_time  # that of no answer
        for score in scores:
            hopeless = score.p < _HOPELESS and now_ns - self._hoped_ns < _HOPE_INTERVAL_NS
            worth = score.value > _WORTHLESS * self._unit and score.net > least
            if worth and not score.refused and not hopeless:
                if best is None or score.net > best.net:
                    best = score
                if score.option is self._last:
                    last = score
        return last if last is not None and best is not None and best.net - last.net < self._margin else best

    def _probe(self, scores: list[Score]) -> Score | None:
        """A frame that nothing can be done with is a free probe: without it, a bad estimate would never be corrected."""
        e = self.estimator
        return most_hopeful(scores) if e.connected and not e.in_flight and self._remote else None
