"""The page's figures, its address and its files; no sockets."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.web.history import KEPT_S, History, LinkEstimate
from protos.errors import ConfigError
from protos.web.address import is_loopback, page_address, token_for

LINK = LinkEstimate(bitrate_bps=1e6, rtt_ms=80.0)


def report(outcome: Outcome, *, ms: float = 100.0, reason: str = "", n_bytes: int = 0, decision: str = "") -> FrameReport:
    frame = CapturedFrame(index=0, image=None, captured_ns=0, captured_unix_ns=0, width_px=64, height_px=48)
    return FrameReport(
        frame=frame, model="m", bundle_sha256="0" * 64, outcome=outcome, reason=reason, payload_bytes=n_bytes,
        stages_ms={"total": ms}, decision=decision,
    )  # fmt: skip


def test_on_time_counts_frames_that_needed_an_answer_and_no_others() -> None:
    history = History(deadline_ms=200)
    for given in (
        report(Outcome.RESULT, ms=150), report(Outcome.LOCAL, ms=190), report(Outcome.RESULT, ms=250), report(Outcome.EXPIRED),
        report(Outcome.UNCHANGED), report(Outcome.FILTERED), report(Outcome.DROPPED, reason="superseded"),
    ):  # fmt: skip
        history.add(given, 10, LINK)
    assert history.recent(10)["on_time"] == 0.5  # two of four: one came late, one not at all
    assert history.since(0)[0][1] == [2, 1, 1, 1, 1, 1]


def test_without_a_deadline_every_answer_is_on_time() -> None:
    history = History(deadline_ms=0)
    history.add(report(Outcome.RESULT, ms=9000), 3, None)
    assert history.recent(3) == {"frames_per_s": 1.0, "on_time": 1.0, "bytes_mean": None}


def test_a_second_says_mean_bytes_the_usual_choice_and_both_latencies() -> None:
    history = History(deadline_ms=500)
    history.add(report(Outcome.RESULT, ms=10, n_bytes=100, decision="split 1"), 7, LINK)
    history.add(report(Outcome.RESULT, ms=30, n_bytes=300, decision="split 2"), 7, LINK)
    history.add(report(Outcome.LOCAL, ms=20, decision="split 2"), 7, LINK)
    assert history.since(7) == [[7, [2, 1, 0, 0, 0, 0], 200, "split 2", 20, 30, 1_000_000, 80.0]]
    assert history.since(8) == []


def test_what_is_older_than_the_strip_is_forgotten() -> None:
    history = History(deadline_ms=500)
    for second in range(2 * KEPT_S):
        history.add(report(Outcome.RESULT), second, None)
    assert [row[0] for row in history.since(0)] == list(range(KEPT_S, 2 * KEPT_S))


@pytest.mark.parametrize("text", ["", "8080", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", ":8080", "127.0.0.1:٣"])
def test_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="--web must be host:port"):
        page_address(text)


def test_addresses() -> None:
    assert page_address("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert page_address("[::1]:0") == ("::1", 0)
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"))


def test_others_need_a_token_and_a_token_is_not_soon_guessed() -> None:
    assert token_for("127.0.0.1", {}) == ""
    with pytest.raises(ConfigError, match="set HEADTAIL_WEB_TOKEN"):
        token_for("0.0.0.0", {})
    with pytest.raises(ConfigError, match="at least 12 characters"):
        token_for("0.0.0.0", {"HEADTAIL_WEB_TOKEN": "short"})
    assert token_for("0.0.0.0", {"HEADTAIL_WEB_TOKEN": "long-enough-1"}) == "long-enough-1"


def test_the_pages_load_nothing_from_elsewhere_and_put_in_text_only_as_text() -> None:
    texts = {f.name: f.read_text() for where in ("edge_client.web", "protos.web") for f in (files(where) / "static").iterdir()}
    assert {"page.html", "page.js", "login.html"} <= texts.keys()
    for name, text in texts.items():
        outside = [u for u in re.findall(r"(?:https?:)?//[a-z0-9.]+\.[a-z]+", text) if u != "http://www.w3.org"]
        assert outside == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), name
        assert not re.search(r"<[^>]+\s(style|on[a-z]+)=", text), f"{name}: the policy allows no inline style or handler"
