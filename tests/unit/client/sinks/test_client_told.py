"""What people are told of a frame, and what nobody is told: answers, labels in pictures, scores that count, secrets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edge_client.capture.masking import hide_secrets
from edge_client.capture.sources import parse_source
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.gates.floor import DEFAULT, bundle_floor, read_floor
from edge_client.observe.told import AnswerCounts, in_words, line_of
from edge_client.sinks import annotate as drawing
from protos.errors import ConfigError, SourceError
from protos.messages import Box, Classification, ClassScore, Detection
from splitters.tasks import canvas

LABELS = {1: "person", 3: "car", 7: "\x1b[2Jtrain"}


def box(class_id: int, score: float, *corners: float) -> Box:
    return Box(class_id=class_id, score=score, box_px=tuple(corners) or (0, 0, 10, 10))  # type: ignore[arg-type]


def report(answer: Any, *, width: int = 640, height: int = 480) -> FrameReport:
    frame = CapturedFrame(index=4, image=None, captured_ns=0, captured_unix_ns=0, source="a.jpg", width_px=width, height_px=height)
    return FrameReport(frame=frame, model="m", bundle_sha256="", outcome=Outcome.RESULT, answer=answer)


def test_answers_in_words() -> None:
    boxes = Detection(boxes=(box(1, 0.9), box(3, 0.8), box(1, 0.7)))
    assert in_words(boxes, LABELS) == "person 2, car 1"
    assert in_words(Detection(boxes=()), LABELS) == "nothing"
    assert in_words(Classification(top=(ClassScore(class_id=3, score=0.75),)), LABELS) == "car 0.75"
    assert line_of(report(boxes), LABELS).startswith("a.jpg: person 2, car 1")
    assert "\x1b" not in line_of(report(Detection(boxes=(box(7, 0.5), box(99, 0.4)))), LABELS)
    assert "class 99" in line_of(report(Detection(boxes=(box(99, 0.4),))), LABELS)


def test_classes_are_counted() -> None:
    counts = AnswerCounts()
    for answer in (
        Detection(boxes=(box(1, 0.9), box(1, 0.8), box(3, 0.5))),
        Detection(boxes=(box(1, 0.9),)),
        Detection(boxes=()),
        None,
    ):
        counts.take(answer, LABELS)
    assert counts.as_json() == {"person": {"objects": 3, "frames": 2}, "car": {"objects": 1, "frames": 1}}
    assert counts.as_text() == "person 3 in 2 frames, car 1 in 1 frame"


def test_labels_of_neighbours_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd, boxes at the edges, and boxes that reach far outside: each label in the picture, none over another."""
    crowd = [box(1, 0.9 - 0.01 * i, 60 + 9 * i, 150 + 3 * (i % 3), 130 + 9 * i, 300) for i in range(14)]
    odd = [box(3, 0.4, 600, 2, 640, 40), box(3, 0.3, -400, 470, 9000, 9000), box(1, 0.2, 0, 0, 640, 480)]
    drawn: list[tuple[int, int, int, int]] = []
    label = canvas._label

    def watch(picture: Any, text: str, corner: tuple[int, int], size: float, *colours: Any) -> None:
        width, height = canvas._text_size(text, size)
        drawn.append((corner[0], corner[1], corner[0] + width, corner[1] + height))
        label(picture, text, corner, size, *colours)

    monkeypatch.setattr(canvas, "_label", watch)
    drawing.annotate(np.full((480, 640, 3), 90, np.uint8), report(Detection(boxes=(*crowd, *odd))), LABELS)
    assert len(drawn) == 18
    assert all(left >= 0 and top >= 0 and right <= 640 and bottom <= 480 for left, top, right, bottom in drawn)
    for a, b in itertools.combinations(drawn, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


@pytest.mark.parametrize("size", [(9000, 3), (3, 9000), (1, 1), (2000, 3000)])
def test_a_drawing_is_no_larger_than_its_picture_or_a_screen(size: tuple[int, int]) -> None:
    answer = Detection(boxes=(box(1, 0.9, 0, 0, size[1], size[0]),))
    drawn = drawing.annotate(np.zeros((*size, 3), np.uint8), report(answer, width=size[1], height=size[0]), LABELS)
    assert drawn.size <= max(3 * size[0] * size[1], 3 * 1280 * 1280)


class Bundle:
    """What the floor asks of a bundle."""

    def __init__(self, **said: Any) -> None:
        score_min = said.pop("score_min", None)
        manifest = {"name": "m", "labels": LABELS, "postprocess": said, "score_min": score_min}
        self.manifest = type("Manifest", (), manifest)()


def test_which_boxes_count() -> None:
    answer = Detection(boxes=(box(1, 0.7), box(3, 0.5), box(1, 0.3), box(3, 0.01)))
    bundle: Any = Bundle()

    def kept(text: str) -> list[float]:
        cut = read_floor(text).cut(answer, bundle)
        assert isinstance(cut, Detection)
        return [b.score for b in cut.boxes]

    assert kept("") == [0.7, 0.5, 0.3]
    assert kept("0") == [0.7, 0.5, 0.3, 0.01]
    assert kept("0.4") == [0.7, 0.5]
    assert kept("0.4,person=0.75") == [0.5]
    assert kept("car=0") == [0.7, 0.5, 0.3, 0.01]
    assert read_floor("0.9").cut(Classification(top=()), bundle) == Classification(top=())
    assert bundle_floor(bundle) == DEFAULT
    assert bundle_floor(Bundle(score_min=0.37)) == 0.37  # type: ignore[arg-type]
    for bad in ("high", "1.2", "person=", "person=x", "-1", "nan"):
        with pytest.raises(ConfigError, match="--score-min"):
            read_floor(bad)
    with pytest.raises(ConfigError, match="zebra"):
        read_floor("zebra=0.5").check(bundle)


SECRETS = [
    "rtsp://admin:Zq7secretX@127.0.0.1:9/s", "rtsp://admin:Zq7/secretX@127.0.0.1:9/s", "rtsp://admin:Zq7?secretX@127.0.0.1:9/s",
    "rtsp://admin:Zq7#secretX@127.0.0.1:9/s", "rtsp://admin:Zq7@secretX@127.0.0.1:9/s", "rtsp://admin:Zq7\\secretX@127.0.0.1:9/s",
    "rtsp://admin:Zq7 secretX@127.0.0.1:9/s", "rtsp://admin:Zq7%40secretX@127.0.0.1/s", "rtsp://Zq7secretX@127.0.0.1",
    "http://127.0.0.1:9/snap.cgi?user=a&pwd=Zq7secretX", "http://127.0.0.1:9/snap/Zq7;pwd=secretX", "RTSP://admin:Zq7secretX@h:9/s",
    "rtsp://127.0.0.1/user=admin_password=Zq7secretX_channel=1.sdp", "http://127.0.0.1/live/admin/Zq7secretX/1.ts",
    "http://127.0.0.1/snap?pwd=Zq7@secretX/", "rtsp://admin:Zq7secretX@", "rtsp://admin:Zq7secretX@[::1",
    "rtsp:/admin:Zq7secretX@h",
    "admin:Zq7secretX@h/s", "rtsp//admin:Zq7secretX@h", "127.0.0.1/snap?pwd=Zq7secretX", "http:127.0.0.1/Zq7secretX",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_a_password_is_never_shown_however_malformed_its_url(url: str) -> None:
    try:
        shown = parse_source(url).shown
    except (SourceError, ConfigError) as error:
        shown = error.message
    assert "Zq7" not in shown
    assert "secretX" not in shown
    if "://" in url and " " not in url:
        assert "secretX" not in hide_secrets(f"unrecognized arguments: {url}")


def test_hosts_are_shown() -> None:
    assert parse_source("rtsp://user:pw@cam.example:554/1?x=1").shown == "rtsp://cam.example:554/…"
    assert parse_source("rtsp://[fe80::1]:554/1").shown == "rtsp://[fe80::1]:554/…"
    assert parse_source("http://cam").shown == "http://cam"
