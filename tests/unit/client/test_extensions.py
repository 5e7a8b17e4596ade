"""A part of somebody else's that lacks methods is refused by name before the first frame."""

from __future__ import annotations

from typing import Any

import pytest

from edge_client.control import Policy, Skip
from edge_client.extensions import POLICIES, SINKS, make
from edge_client.sinks.base import Sink
from protos.errors import ConfigError

GIVEN: dict[str, Any] = {"local": None, "offloads": [], "head_ms": {}}


class OnlyDecides:
    def __init__(self, config: Any, points: Any, **options: Any) -> None: ...

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Skip:
        return Skip(reason="never")


class Derived(Policy):
    def __init__(self, config: Any, points: Any, **options: Any) -> None: ...

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Skip:
        return Skip(reason="never")


class Whole(Derived):
    granted_in_flight = 0

    def may_send(self, *given: Any, **named: Any) -> bool:
        return False

    def allows(self) -> bool:
        return False

    def wants_fallback(self, *given: Any) -> bool:
        return False

    def ping_due(self, now_ns: int) -> bool:
        return False

    def withdraw_offloads(self, form: str = "") -> bool:
        return False


class NeverClosed:
    def __init__(self, where: str, labels: Any) -> None: ...

    def take(self, report: Any) -> None: ...


def test_a_policy_says_all_that_it_lacks() -> None:
    with pytest.raises(ConfigError) as lacking:
        make(POLICIES, Policy, f"{__name__}:OnlyDecides", None, (), **GIVEN)
    for method in ("may_send", "granted_in_flight", "on_transport", "on_grant"):
        assert method in lacking.value.message
    assert "decide" not in lacking.value.message
    assert "edge_client.control.policy.Policy says what each does" in lacking.value.message


def test_one_that_derives_lacks_only_what_it_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="lacks allows, granted_in_flight, may_send, ping_due, wants_fallback, withdraw"):
        make(POLICIES, Policy, f"{__name__}:Derived", None, (), **GIVEN)


def test_one_that_answers_all_it_is_asked_may_ignore_what_it_is_told() -> None:
    made = make(POLICIES, Policy, f"{__name__}:Whole", None, (), **GIVEN)
    made.on_transport(reliable=True)
    made.on_grant(0, bitrate_bps=1e6)
    assert made.decide(0, 0, 0) == Skip(reason="never")


def test_a_sink_too() -> None:
    with pytest.raises(ConfigError, match=r"NeverClosed lacks close; edge_client\.sinks\.base\.Sink says what each does"):
        make(SINKS, Sink, f"{__name__}:NeverClosed", "there", dict)
