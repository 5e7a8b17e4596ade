"""Quotas on a virtual clock, and token files."""

import hmac

import pytest

from edge_server.access.auth import Tokens, parse_tokens
from edge_server.access.quota import Caller
from edge_server.config import SecurityConfig
from protos.errors import AuthError, ConfigError, HeadtailError, LimitError

S = 1_000_000_000


def client(tmp_path, **quotas: float) -> Caller:
    return Caller(name="a", config=SecurityConfig(token_file=tmp_path / "t", **quotas))


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


def nothing(error: HeadtailError) -> None:
    raise AssertionError(error)


def test_sessions_are_given_back(tmp_path) -> None:
    c = client(tmp_path, max_sessions_per_token=1)
    with c.session(nothing), pytest.raises(LimitError), c.session(nothing):
        pass
    with c.session(nothing):
        pass
    assert c.sessions == 0


def test_frames_of_unary_calls_are_counted_until_they_are_answered() -> None:
    c = Caller(max_unary=3)
    with c.unary_frames():
        with pytest.raises(LimitError, match="unary"), c.unary_frames(3):
            pass
        with c.unary_frames(2):
            assert c.unary == 3
    assert c.unary == 0


def test_token_files() -> None:
    tokens = parse_tokens("# x\n\na 0123456789abcdef\n b\tfedcba9876543210 \n")
    assert list(tokens) == ["a", "b"]
    assert {len(digest) for digest in tokens.values()} == {32}
    assert parse_tokens("# nothing\n") == {}
    assert parse_tokens("# of Windows\r\n\r\na 0123456789abcdef\r\n") == parse_tokens("a 0123456789abcdef")
    for text in ("a", "a short", "a 0123456789abcdef x", "a 0123456789abcdef\na 0123456789abcdef"):
        with pytest.raises(ConfigError) as caught:
            parse_tokens(text)
        assert "0123456789abcdef" not in caught.value.message


ALICE, BOB = "alice-token-0123456789", "bob-token-9876543210xx"


def held(tokens: Tokens, token: str) -> bool:
    try:
        return bool(tokens.client(f"Bearer {token}").name)
    except AuthError:
        return False


def test_a_withdrawn_token_ends_its_sessions_and_no_others(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    file = tmp_path / "tokens"
    file.write_text(f"alice {ALICE}\nbob {BOB}\n")
    tokens = Tokens(SecurityConfig(token_file=file))
    alice, bob = tokens.client(f"Bearer {ALICE}"), tokens.client(f"bearer {BOB}")
    assert alice is tokens.client(f"Bearer {ALICE}")
    first: list[HeadtailError] = []
    second: list[HeadtailError] = []
    with alice.session(first.append), alice.session(second.append), bob.session(nothing):
        file.write_text(f"bob {BOB}\n")
        tokens.refresh()
        assert not first  # the file may still be being written
        tokens.refresh()
        assert [error.code for error in first + second] == ["auth", "auth"]
        assert "withdrawn" in first[0].message
        assert not held(tokens, ALICE)
        assert held(tokens, BOB)
        with pytest.raises(AuthError), alice.session(nothing):  # one that was on its way in
            pass
    assert ALICE not in caplog.text
    assert "alice" in caplog.text


def test_a_token_that_was_exchanged_counts_as_withdrawn(tmp_path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"alice {ALICE}\n")
    tokens = Tokens(SecurityConfig(token_file=file))
    ended: list[HeadtailError] = []
    with tokens.client(f"Bearer {ALICE}").session(ended.append):
        file.write_text(f"alice {BOB}\n")
        tokens.refresh()
        tokens.refresh()
    assert len(ended) == 1
    assert held(tokens, BOB)
    assert not held(tokens, ALICE)


def test_an_emptied_file_shuts_everyone_out_and_a_broken_one_nobody(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"alice {ALICE}\n")
    tokens = Tokens(SecurityConfig(token_file=file))
    file.write_text(f"bob {BOB}\nbroken\n")
    for _ in range(5):
        tokens.refresh()
    assert held(tokens, ALICE)
    assert not held(tokens, BOB)
    file.unlink()
    for _ in range(5):
        tokens.refresh()
    assert held(tokens, ALICE)
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 2  # once each, not every second
    assert BOB not in caplog.text
    file.write_text("# nobody\n")
    tokens.refresh()
    tokens.refresh()
    assert not held(tokens, ALICE)


def test_only_a_whole_token_of_the_right_scheme_opens(tmp_path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"alice {ALICE}\n")
    tokens = Tokens(SecurityConfig(token_file=file))
    for wrong in (
        "",
        ALICE,
        f"Basic {ALICE}",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE}x",
        f"Bearer {ALICE} {ALICE}",
        "Bearer \udcff",
    ):
        with pytest.raises(AuthError):
            tokens.client(wrong)


def test_comparisons_take_constant_time(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Every token's digest is compared, by ``hmac.compare_digest``, on values of one length, whoever matches."""
    file = tmp_path / "tokens"
    file.write_text(f"alice {ALICE}\nbob {BOB}\n")
    tokens = Tokens(SecurityConfig(token_file=file))
    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr("edge_server.access.auth.hmac.compare_digest", spy)
    for token in (ALICE, BOB, "x", "y" * 5000):
        held(tokens, token)
    assert seen == [(32, 32)] * 8
