"""What people and programs get to see: results.jsonl, the summary, the status line, settings and help."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.capture.sources import parse_source
from edge_client.cli import build_parser, parse
from edge_client.config import ClientConfig
from edge_client.control import Split
from edge_client.device.timings import DevicePace, Recent
from edge_client.frames import CapturedFrame, FrameReport, Ledger, Outcome
from edge_client.observe.status import Status
from edge_client.observe.summary import JpegSampler, Summary
from edge_client.pipeline.flights import Flight, next_turn
from edge_client.sinks import InOrder, JsonLines, open_json_file, to_json
from edge_client.sinks.annotate import annotate
from edge_client.transport.rpc import Endpoint
from protos.errors import ConfigError, StorageError
from protos.messages import Box, Classification, ClassScore, Detection

MS = 1_000_000
LABELS = {1: "person", 7: "train"}


def frame(index: int, image: Any = None) -> CapturedFrame:
    return CapturedFrame(
        index=index, image=image, captured_ns=index * 33 * MS, captured_unix_ns=1, source="a.jpg", width_px=640, height_px=480
    )


def report(index: int, outcome: Outcome = Outcome.RESULT, **fields: Any) -> FrameReport:
    base: dict[str, Any] = {"model": "m", "bundle_sha256": "c" * 64, "stages_ms": {"head": 2.0, "total": 20.0 + index}}
    return FrameReport(frame=frame(index), outcome=outcome, **{**base, **fields})


DETECTION = Detection(boxes=(Box(class_id=1, score=0.5, box_px=(10.123, 20, 30, 40)),))
CLASSES = Classification(top=(ClassScore(class_id=7, score=0.75), ClassScore(class_id=99, score=0.1)))


def test_a_line_of_results_is_as_documented() -> None:
    line = to_json(report(3, answer=DETECTION, payload_bytes=1234, operating_point=2), LABELS)
    assert list(line)[:12] == [
        "frame", "camera", "source", "captured_ns", "captured_unix_ns", "model", "bundle_sha256", "outcome", "reason",
        "operating_point",
        "payload_bytes", "latency_ms",
    ]  # fmt: skip
    assert line["detections"] == [{"class_id": 1, "label": "person", "score": 0.5, "box_px": [10.12, 20, 30, 40]}]
    assert line["latency_ms"] == {"head": 2.0, "total": 23.0}
    line = to_json(report(0, answer=CLASSES), LABELS)
    assert line["predictions"] == [{"class_id": 7, "label": "train", "score": 0.75}, {"class_id": 99, "label": "99", "score": 0.1}]
    dropped = to_json(report(0, Outcome.DROPPED, reason="superseded"), LABELS)
    assert (dropped["outcome"], dropped["reason"]) == ("dropped", "superseded")
    assert "predictions" not in dropped


def test_reports_are_handed_on_in_the_order_of_capture() -> None:
    stream = io.StringIO()
    order = InOrder([JsonLines(stream, lambda: LABELS)])
    for index in (2, 0, 1, 4, 3, 6):
        order.take(report(index))
    order.close()
    assert [json.loads(line)["frame"] for line in stream.getvalue().splitlines()] == [0, 1, 2, 3, 4, 6]


def test_the_summary_adds_up_and_says_when_ours_is_larger() -> None:
    ledger = Ledger()
    now = [0]
    sampler = JpegSampler(clock=lambda: now[0], every_s=0.0)
    sampler.sizes = {"input_75": [500, 500], "input_95": [900, 900], "source_75": [4000], "source_95": [9000]}
    summary = Summary(lambda: ledger, sampler)
    for i in range(100):
        ledger.capture(i)
        outcome = Outcome.LOCAL if i % 10 == 0 else Outcome.RESULT
        ledger.settle(i, outcome)
        summary.take(report(i, outcome, payload_bytes=1000 if outcome is Outcome.RESULT else 0))
    ledger.capture(100)
    ledger.settle(100, Outcome.DROPPED, "superseded")
    data = summary.as_json()
    assert data["frames"] == 101 == sum(data["outcomes"].values())
    assert data["balanced"]
    assert data["payload_bytes_p50"] == 1000
    assert data["jpeg75_bytes_p50"] == 500
    assert data["latency_ms_p95"] == pytest.approx(114.05)
    assert set(data["stages_ms"]["head"]) == {"p50", "p95", "p99"}
    text = summary.as_text()
    assert "101 captured = result 90, local 10, dropped 1 (superseded 1)" in text
    assert "200% of quality 75: larger" in text
    assert "25% of quality 75" in text
    sampler.close()


def test_an_empty_run_has_a_summary_too() -> None:
    sampler = JpegSampler(clock=lambda: 0, every_s=0.0)
    assert Summary(Ledger, sampler).as_json()["latency_ms_p50"] is None
    assert "0 captured = none" in Summary(Ledger, sampler).as_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_status_line(terminal: bool) -> None:
    now, written = [0], []
    note = ["the camera stalled"]
    status = Status(written.append, clock=lambda: now[0], terminal=terminal, note=lambda: note[0], columns=200)
    for i in range(30):
        now[0] = i * 33 * MS
        status.take(report(i, payload_bytes=2000))
    status.show()
    assert "result 30" in written[0]
    assert "[the camera stalled]" in written[0]
    assert "2.0 kB/frame" in written[0]
    assert written[0].startswith("\r") is terminal
    now[0] += 10_000 * MS
    assert status.line().startswith("no frames")
    status.close()


def test_annotations_are_drawn_on_a_copy() -> None:
    image = np.full((120, 160, 3), 90, np.uint8)
    before = image.copy()
    for answer in (DETECTION, CLASSES, None):
        drawn = annotate(image, report(1, answer=answer), LABELS)
        assert drawn.dtype == np.uint8
        assert drawn.shape[1] >= 160
        assert drawn.std() > 0
    assert np.array_equal(image, before)


# ---------------------------------------------------------------- the local model's turn


def flight(deadline_ms: int | None, *, urgent: bool = False) -> Flight:
    deadline_ns = deadline_ms * MS if deadline_ms is not None else None
    return Flight(frame=frame(0), engine=None, deadline_ns=deadline_ns, urgent=urgent)  # type: ignore[arg-type]


def test_the_local_model_starts_early_enough_for_the_frames_behind() -> None:
    first, second, third = flight(500), flight(510), flight(520)
    start, chosen = next_turn([second, third, first], local_ns=40 * MS, margin_ns=5 * MS, wake_ns=0, now_ns=0) or (0, None)
    assert chosen is first
    assert start == (520 - 5 - 3 * 40) * MS
    alone = next_turn([first], local_ns=40 * MS, margin_ns=5 * MS, wake_ns=0, now_ns=0)
    assert alone == (455 * MS, first)


def test_urgent_frames_come_first_and_undated_ones_wait() -> None:
    now = 100 * MS
    urgent = flight(900, urgent=True)
    assert next_turn([flight(500), urgent], local_ns=MS, margin_ns=0, wake_ns=0, now_ns=now) == (now, urgent)
    assert next_turn([flight(None)], local_ns=MS, margin_ns=0, wake_ns=0, now_ns=now) is None
    answering = flight(500)
    answering.answering = True
    assert next_turn([answering], local_ns=MS, margin_ns=0, wake_ns=0, now_ns=now) is None


def test_what_the_controller_said_goes_before_just_in_time_and_who_was_given_up_waits_for_the_deadline() -> None:
    asked, given_up, plain = flight(500), flight(480), flight(490)
    asked.decision = Split(point_id=0, fallback_ns=420 * MS)
    given_up.given_up = True
    turn = partial(next_turn, local_ns=40 * MS, margin_ns=5 * MS, wake_ns=3 * MS, now_ns=0)
    assert turn([asked, given_up, plain]) == (417 * MS, asked), "and plain is not made to begin early for its sake"
    assert turn([given_up, plain]) == (445 * MS, plain)
    assert turn([given_up]) == (480 * MS, given_up)
    asked.urgent = True
    assert turn([asked, given_up, plain]) == (0, asked)


def test_recent_quantiles_forget() -> None:
    recent = Recent(size=4)
    assert recent.quantile(0.5) == 30 * MS
    for value in (1, 2, 3, 100, 100, 100):
        recent.add(value)
    assert recent.quantile(0.0) == 3
    assert recent.quantile(0.95) == 100


def test_a_device_that_was_busy_when_measured_is_believed_to_be_fast_again() -> None:
    pace = DevicePace({"local": 100.0 * MS, "split 0": 200.0 * MS, "split 1": 300.0 * MS})
    factors: dict[str, float] = {}
    for _ in range(16):
        factors = pace.add("local", 10 * MS) or factors
    assert factors == {"split 0": pytest.approx(0.1), "split 1": pytest.approx(0.1)}
    assert DevicePace({}).add("local", 10) == {}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "arguments",
    [
        ["--camera", "0", "--server", "nowhere"], ["--camera", "0", "--server", "host:0"],
        ["--camera", "0", "--server", "host:70000"], ["--camera", "0", "--server", "http://host:50051"],
        ["--camera", "0", "--server", "user@host:50051"],
        ["--camera", "0", "--deadline-ms", "-1"], ["--camera", "0", "--frames", "-2"], ["--camera", "0", "--threads", "0"],
        ["--camera", "0", "--recall", "1.5"], ["--camera", "0", "--tls-cert", "a.pem"], ["--camera", "0", "--deadline-ms", "nan"],
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse(arguments)


def test_defaults_depend_on_whether_the_source_is_live() -> None:
    config = ClientConfig(camera="0")
    assert config.effective_deadline_ms(live=True) == 500
    assert config.effective_deadline_ms(live=False) == 0
    assert config.effective_wait_s(live=True) == 0
    assert config.effective_wait_s(live=False) == 30
    assert ClientConfig(camera="0", deadline_ms=80, wait_for_server_s=3).effective_deadline_ms(live=False) == 80


def test_a_toml_file_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "camera.toml"
    path.write_text('camera = "rtsp://cam"\ndeadline-ms = 250.0\nserver = "edge:50051"\n')
    config, level, form = parse(["--config", str(path), "--server", "other:1"])
    assert (config.camera, config.deadline_ms, config.server) == ("rtsp://cam", 250.0, "other:1")
    assert (level, form) == ("warning", "text")
    path.write_text("colour = 3\n")
    with pytest.raises(ConfigError, match="colour"):
        parse(["--config", str(path), "--camera", "0"])
    path.write_text("this is no toml")
    with pytest.raises(ConfigError, match="TOML"):
        parse(["--config", str(path)])
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(["--config", str(tmp_path / "absent.toml")])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('tls = "false"', "tls"), ("tls = 1", "tls"), ("fps = nan", "nan"), ("deadline_ms = inf", "inf"),
        ('frames = "5"', "frames"), ("frames = 1.5", "frames"), ("frames = 99999999999999999999999", "number"),
        ("camera = 0", "camera"), ("server = 5", "server"), ("threads = -1", "threads"), ("threads = true", "threads"),
        ('change_gate = ["on"]', "change_gate"), ("model = 1979-05-27", "model"), ("recall = {x = 1}", "recall"),
        ("fps = " + "[" * 3000 + "]" * 3000, "deep"), ('model = "a\\u001b"', "printable"),
        (f'server = "h:{"1" * 5000}"', "host:port"), ('server = "h\\u0000:1"', "host:port"), ('server = "h:\u0665"', "host:port"),
        (f'metrics_listen = "h:{"1" * 5000}"', "metrics-listen"), ("loop = true\nlo-op = 2", "lo_op"),
        ("max-in-flight = 1\nmax_in_flight = 1", "twice"),
    ],
)  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_one_clear_error(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "camera.toml"
    path.write_text(("" if line.startswith("camera") else 'camera = "0"\n') + line + "\n")
    with pytest.raises(ConfigError, match=says):
        parse(["--config", str(path)])


@pytest.mark.parametrize("token", ["päss", "a\x1bb", "a\nb", "a b\x7f", "\udc80"])
def test_a_token_that_cannot_travel_is_refused(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr("edge_client.config.token_from_environment", lambda: token)
    with pytest.raises(ConfigError, match="printable ASCII"):
        parse(["--camera", "0"])


def test_the_help_teaches() -> None:
    text = build_parser().format_help()
    for word in ("examples:", "exit codes:", "embedded", "--wait-for-server-s", "synthetic:", "HEADTAIL_TOKEN", "130"):
        assert word in text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://admin:se@cret@cam.example:554/stream/1", "rtsp://cam.example:554/…"),
        ("http://cam/video.mjpg?user=a&pwd=secret", "http://cam/…"),
        ("rtsp://cam", "rtsp://cam"),
    ],
)
def test_a_cameras_password_is_never_shown(url: str, shown: str) -> None:
    assert parse_source(url).shown == shown


def test_a_token_is_not_part_of_what_is_printed() -> None:
    assert "secret" not in repr(Endpoint(address="h:1", token="secret-0123456789"))


def test_an_output_is_gone_on_with_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for run, torn in enumerate(("", '{"frame":99,"sou', "{" + "x" * 200_000)):
        with path.open("a") as file:
            file.write(torn)
        sink = open_json_file(path, lambda: LABELS, append=True)
        for index in range(3):
            sink.take(report(index))
        sink.close()
        frames = [json.loads(line)["frame"] for line in path.read_text().splitlines()]
        assert frames == [0, 1, 2] * (run + 1)
    open_json_file(path, lambda: LABELS).close()
    assert path.read_text() == ""
    path.write_text("a letter to grandmother")
    with pytest.raises(ConfigError, match="no result"):
        open_json_file(path, lambda: LABELS, append=True)
    assert path.read_text() == "a letter to grandmother"


class Failing:
    """A sink whose disk is full from the third frame on."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.closed = 0

    def take(self, report: FrameReport) -> None:
        if report.frame.index >= 2:
            raise OSError(28, "No space left on device")
        self.taken.append(report.frame.index)

    def close(self) -> None:
        self.closed += 1


def test_a_sink_that_fails_is_closed_and_the_others_get_every_frame() -> None:
    failing, stream, told = Failing(), io.StringIO(), []
    order = InOrder([failing, JsonLines(stream, lambda: LABELS)], lambda: told.append(1))
    for index in range(5):
        order.take(report(index))
    order.close()
    assert (failing.taken, failing.closed, told) == ([0, 1], 1, [1])
    assert len(stream.getvalue().splitlines()) == 5
    assert isinstance(order.failure, StorageError)
    assert "No space left" in order.failure.message


def test_every_setting_has_an_option() -> None:
    options = {a.dest for a in build_parser()._actions}
    assert set(ClientConfig.__dataclass_fields__) - options == {"events"}  # tables, in the TOML file alone
