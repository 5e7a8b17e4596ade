"""What Prometheus reads from a device."""

from __future__ import annotations

import sys
import urllib.request
from types import SimpleNamespace

import pytest

from edge_client.config import ClientConfig
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.observe.metrics import Metrics
from protos.errors import ConfigError, MissingDependencyError

pytest.importorskip("prometheus_client")


def report(outcome: Outcome, reason: str = "", **stages_ms: float) -> FrameReport:
    frame = CapturedFrame(index=0, image=None, captured_ns=0, captured_unix_ns=0, width_px=1, height_px=1)
    return FrameReport(
        frame=frame, model="tiny", bundle_sha256="a" * 64, outcome=outcome, reason=reason, payload_bytes=100, stages_ms=stages_ms
    )


def test_frames_bytes_and_times_are_counted() -> None:
    session = SimpleNamespace(up=True, reconnects=2)
    metrics = Metrics(session)
    metrics.take(report(Outcome.RESULT, head=8.0, total=40.0))
    metrics.take(report(Outcome.LOCAL, total=70.0))
    metrics.take(report(Outcome.DROPPED, "superseded", total=900.0))
    value = metrics.registry.get_sample_value
    frames = {"model": "tiny", "outcome": "dropped", "reason": "superseded"}
    assert value("headtail_client_frames_total", frames) == 1
    assert value("headtail_client_frames_total", {"model": "tiny", "outcome": "result", "reason": ""}) == 1
    assert value("headtail_client_payload_bytes_total", {"model": "tiny"}) == 300
    assert value("headtail_client_stage_seconds_count", {"model": "tiny", "stage": "total"}) == 2  # answered frames only
    assert value("headtail_client_stage_seconds_sum", {"model": "tiny", "stage": "head"}) == pytest.approx(0.008)
    assert (value("headtail_client_connected"), value("headtail_client_reconnects")) == (1, 2)
    session.up = False
    assert value("headtail_client_connected") == 0


def test_they_are_served_and_the_port_is_given_back() -> None:
    metrics = Metrics(SimpleNamespace(up=True, reconnects=0))
    port = metrics.serve("127.0.0.1", 0)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    assert "headtail_client_connected 1.0" in text
    with pytest.raises(ConfigError, match="cannot listen"):
        Metrics(SimpleNamespace(up=True, reconnects=0)).serve("127.0.0.1", port)
    metrics.close()
    again = Metrics(SimpleNamespace(up=True, reconnects=0))
    assert again.serve("127.0.0.1", port) == port
    again.close()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"headtail\[metrics\]"):
        Metrics(SimpleNamespace(up=True, reconnects=0))


def test_the_address_is_checked_at_the_start() -> None:
    assert ClientConfig(camera="0", metrics_listen="[::1]:9465").metrics_address() == ("::1", 9465)
    for wrong in ("9465", "host:", "host:x", "host:99999"):
        with pytest.raises(ConfigError, match="metrics-listen"):
            ClientConfig(camera="0", metrics_listen=wrong)
