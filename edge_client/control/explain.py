"""The record that explains a decision, made of what the controller weighed."""

from __future__ import annotations

from collections.abc import Sequence

from edge_client.control.decision import Candidate, Explanation
from edge_client.control.estimating.estimator import Estimator
from edge_client.control.scoring import Score


def explanation(
    e: Estimator,
    scores: Sequence[Score],
    *,
    frame_id: int,
    now_ns: int,
    deadline_ns: int,
    window_frames: int,
    grant_bps: float,
    tokens: float,
    choice: str,
) -> Explanation:
    """One decision's inputs, candidates and choice."""
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
        window_frames=window_frames,
        grant_bps=grant_bps,
        grant_tokens_bytes=tokens,
        candidates=tuple(
            Candidate(
                name=s.option.name,
                payload_bytes=int(s.option.n_bytes),
                expected_ms=s.expected_ns / 1e6,
                p_on_time=s.p,
                value=s.net,
                refused=s.refused,
            )
            for s in scores
        ),
        choice=choice,
    )
