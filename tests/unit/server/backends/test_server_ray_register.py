"""What doors of one cluster agree on: turns, who uses what, bundles for other nodes, and why replicas do not start."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

from edge_server.backends.ray.register import LEASE_S, TURN_S, Register

USE = ("headtail-a-0011", "00" * 32)


@pytest.fixture
def at() -> SimpleNamespace:
    return SimpleNamespace(now_s=1000.0)


@pytest.fixture
def register(at: SimpleNamespace) -> Register:
    return Register(clock=lambda: at.now_s)


def test_one_door_at_a_time_has_a_turn(register: Register) -> None:
    assert register.take_turn("app", "one")
    assert not register.take_turn("app", "other")
    assert register.take_turn("another app", "other")
    register.end_turn("app", "other")  # whose it is not
    assert not register.take_turn("app", "other")
    register.end_turn("app", "one")
    assert register.take_turn("app", "other")


def test_a_turn_of_a_door_that_died_goes_on_to_the_next(register: Register, at: SimpleNamespace) -> None:
    assert register.take_turn("app", "one")
    at.now_s += TURN_S - 1
    assert register.take_turn("app", "one")  # still at it
    at.now_s += TURN_S - 1
    assert not register.take_turn("app", "other")
    at.now_s += 2
    assert register.take_turn("app", "other")
    register.end_turn("app", "one")  # awake again, too late
    assert not register.take_turn("app", "one")


def test_an_application_is_free_when_its_last_door_has_left(register: Register, at: SimpleNamespace) -> None:
    at.now_s += LEASE_S
    register.renew("one", [USE])
    register.renew("other", [USE])
    assert register.leave(USE, "one", True) is False
    assert register.leave(USE, "other", True) is True


def test_a_door_that_fell_silent_uses_nothing(register: Register, at: SimpleNamespace) -> None:
    register.renew("dead", [USE])
    at.now_s += LEASE_S + 1
    register.renew("alive", [USE])
    assert register.leave(USE, "alive", True) is True


def test_a_new_register_has_not_heard_of_everyone_yet(register: Register, at: SimpleNamespace) -> None:
    assert register.leave(USE, "one", True) is None
    register.renew("other", [USE])
    at.now_s += LEASE_S - 1
    register.renew("other", [USE])
    at.now_s += 1
    assert register.leave(USE, "one", True) is False


def test_bundles_are_kept_until_nobody_wants_them(register: Register, at: SimpleNamespace) -> None:
    at.now_s += LEASE_S
    assert register.renew("one", [USE]) == [USE[1]]
    register.keep(USE[1], {"manifest.json": b"{}"})
    assert register.renew("one", [USE]) == []
    register.leave(USE, "one", False)
    assert register.bundle(USE[1]) == {"manifest.json": b"{}"}
    register.leave(USE, "one", True)
    assert register.bundle(USE[1]) is None


def test_a_node_on_which_nothing_starts_is_tried_ever_more_seldom(register: Register) -> None:
    pauses = [register.failed("app", "10.0.0.2", "no space") for _ in range(9)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 10 < pauses[-1] < 60
    assert register.failed("app", "10.0.0.3", "another") == 0
    assert register.failures("app") == {"10.0.0.2": (9, "no space"), "10.0.0.3": (1, "another")}
    register.started("app", "10.0.0.2")
    assert list(register.failures("app")) == ["10.0.0.3"]
