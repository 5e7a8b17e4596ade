"""Quotas on a virtual clock, and token files."""

import pytest

from edge_server.auth import Client, parse_tokens
from edge_server.config import SecurityConfig
from protos.errors import ConfigError, LimitError

S = 1_000_000_000


def client(tmp_path, **quotas: float) -> Client:
    return Client(name="a", config=SecurityConfig(token_file=tmp_path / "t", **quotas))


def test_frames_per_second_hold_over_any_window(tmp_path) -> None:
    c = client(tmp_path, frames_per_s_per_token=10)
    admitted = [t for t in range(0, 5 * S, S // 100) if c.admit_frame(1, t) is None]
    assert 50 <= len(admitted) <= 61
    for start in range(0, 4 * S, S // 4):
        assert sum(start <= t < start + S for t in admitted) <= 20  # a second's worth and the bucket


def test_a_frame_larger_than_a_seconds_worth_passes_once_and_is_paid_for(tmp_path) -> None:
    c = client(tmp_path, bytes_per_s_per_token=100)
    assert c.admit_frame(350, 0) is None
    refusal = c.admit_frame(1, S)
    assert isinstance(refusal, LimitError)
    assert refusal.retryable
    assert c.admit_frame(1, 4 * S) is None


def test_a_clock_that_steps_back_earns_nothing(tmp_path) -> None:
    c = client(tmp_path, frames_per_s_per_token=1)
    assert c.admit_frame(1, 10 * S) is None
    assert c.admit_frame(1, 0) is not None


def test_sessions_are_given_back(tmp_path) -> None:
    c = client(tmp_path, max_sessions_per_token=1)
    with c.session(), pytest.raises(LimitError), c.session():
        pass
    with c.session():
        pass
    assert c.sessions == 0


def test_token_files() -> None:
    assert parse_tokens("# x\n\na 0123456789abcdef\n b\tfedcba9876543210 \n") == {
        "a": b"0123456789abcdef",
        "b": b"fedcba9876543210",
    }
    for text in ("", "a", "a short", "a 0123456789abcdef x", "a 0123456789abcdef\na 0123456789abcdef"):
        with pytest.raises(ConfigError) as caught:
            parse_tokens(text)
        assert "0123456789abcdef" not in caught.value.message
