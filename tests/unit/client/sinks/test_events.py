"""Events from frames: zones, debounce, identity, counts; the queue's promises. No sockets, no threads; time is the frames'."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_client.config import read_config
from edge_client.events.objects import Objects, Seen
from edge_client.events.queue import DiskQueue, Message
from edge_client.events.rules import EventRule, Zone, inside, slug
from edge_client.events.sink import _mqtt_messages, _plain_messages
from edge_client.events.watch import Event, Kind, Watch
from edge_client.frames import NS_PER_S, CapturedFrame, FrameReport, Outcome
from protos.errors import ConfigError
from protos.messages import Box, Classification, ClassScore, Detection

LABELS = {0: "person", 1: "car"}
Xyxy = tuple[float, float, float, float]


def rule(**settings: Any) -> EventRule:
    fields = {"name": "yard", "to": "mqtt://broker", "seconds_min": 0.0, "left_s": 1.0, **settings}
    return EventRule(**fields)


def report(at_s: float, *boxes: tuple[int, float, Xyxy], outcome: Outcome = Outcome.RESULT, known: bool = True) -> FrameReport:
    frame = CapturedFrame(
        index=round(at_s * 10), image=None, captured_ns=round(at_s * NS_PER_S), captured_unix_ns=0, width_px=100, height_px=100
    )
    answer = Detection(boxes=tuple(Box(class_id=c, score=s, box_px=b) for c, s, b in boxes))
    return FrameReport(frame=frame, model="m", bundle_sha256="0" * 64, outcome=outcome, answer=answer if known else None)


def kinds(events: list[Event]) -> list[str]:
    return [e.kind.value for e in events]


PERSON = (0, 0.9, (10.0, 10.0, 30.0, 60.0))


def test_an_object_appears_once_is_still_there_and_leaves_once() -> None:
    watch = Watch(rule(still_s=2.0), "cam")
    told = [kinds(watch.take(report(i / 2, PERSON), LABELS)) for i in range(6)]
    assert told == [["appeared", "counts"], [], [], [], ["still"], []]
    assert kinds(watch.take(report(3.0), LABELS)) == []  # a gap shorter than left_s
    left = watch.take(report(4.0), LABELS)
    assert kinds(left) == ["left", "counts"]
    assert left[0].thing is not None
    assert left[0].thing["seconds"] == 2.5
    assert left[1].counts == {}
    assert watch.take(report(5.0), LABELS) == []


def test_a_flicker_is_no_event() -> None:
    watch = Watch(rule(seconds_min=1.0), "cam")
    assert kinds(watch.take(report(0.0, PERSON), LABELS)) == ["counts"]  # nobody is there, for whoever begins to listen
    for at_s in (0.5, 2.0, 2.5):
        assert watch.take(report(at_s), LABELS) == []
    assert [kinds(watch.take(report(at_s, PERSON), LABELS)) for at_s in (3.0, 3.5, 4.0)] == [[], [], ["appeared", "counts"]]


def test_what_is_not_known_is_no_absence_and_what_is_filtered_is() -> None:
    watch = Watch(rule(), "cam")
    watch.take(report(0.0, PERSON), LABELS)
    for at_s in (1.0, 2.0, 9.0):
        assert watch.take(report(at_s, outcome=Outcome.DROPPED, known=False), LABELS) == []
    assert kinds(watch.take(report(9.5, outcome=Outcome.FILTERED, known=False), LABELS)) == ["left", "counts"]


def test_identity_goes_with_the_box_and_two_that_cross_stay_two() -> None:
    objects = Objects(left_s=1.0)
    for step in range(11):
        a = Seen(label="person", score=0.9, box_px=(step * 8.0, 10.0, step * 8.0 + 20, 60.0))
        b = Seen(label="person", score=0.9, box_px=(80 - step * 8.0, 40.0, 100 - step * 8.0, 90.0))
        assert objects.update([b, a] if step % 2 else [a, b], step / 10) == []
    assert sorted((t.number, t.seen.box_px[0]) for t in objects.known if t.seen.box_px) == [(1, 80.0), (2, 0.0)]


def test_a_small_thing_that_moves_by_more_than_its_width_is_still_the_same() -> None:
    objects = Objects(left_s=1.0)
    for step in range(5):
        objects.update([Seen(label="car", score=0.9, box_px=(step * 6.0, 0.0, step * 6.0 + 5, 8.0))], step / 10)
    assert [t.number for t in objects.known] == [1]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, {"car": 1, "person": 2}), ({"classes": ("person",)}, {"person": 2}), ({"score_min": 0.5}, {"car": 1, "person": 1}),
        ({"area_min": 0.05}, {"person": 2}), ({"masks": (((0, 0), (0.5, 0), (0.5, 1), (0, 1)),)}, {"car": 1, "person": 1}),
        ({"zones": (Zone(name="gate", polygon=((0, 0.5), (0.5, 0.5), (0.5, 1), (0, 1))),)}, {"person": 1}),
    ],
)  # fmt: skip
def test_filters(settings: dict[str, Any], counts: dict[str, int]) -> None:
    things = [(0, 0.9, (10.0, 10.0, 30.0, 60.0)), (0, 0.3, (60.0, 10.0, 80.0, 60.0)), (1, 0.9, (60.0, 80.0, 70.0, 90.0))]
    events = Watch(rule(**settings), "cam").take(report(0.0, *things), LABELS)
    assert events[-1].counts == counts


def test_who_stands_beyond_the_lower_edge_stands_in_the_zone_there() -> None:
    low = Zone(name="low", polygon=((0, 0.5), (1, 0.5), (1, 1), (0, 1)))
    (appeared, _) = Watch(rule(zones=(low,)), "cam").take(report(0.0, (0, 0.9, (-5.0, 60.0, 30.0, 130.0))), LABELS)
    assert appeared.thing is not None
    assert appeared.thing["zones"] == ["low"]


def test_a_classification_is_an_object_of_its_class() -> None:
    frame = report(0.0).frame
    answer = Classification(top=(ClassScore(class_id=1, score=0.8), ClassScore(class_id=0, score=0.1)))
    given = FrameReport(frame=frame, model="m", bundle_sha256="", outcome=Outcome.LOCAL, answer=answer)
    (appeared, counts) = Watch(rule(), "cam").take(given, LABELS)
    assert appeared.thing == {"number": 1, "label": "car", "score": 0.8, "seconds": 0.0}
    assert counts.counts == {"car": 1}


def test_a_polygon_may_be_hollow() -> None:
    u = ((0.0, 0.0), (0.9, 0.0), (0.9, 0.9), (0.6, 0.9), (0.6, 0.3), (0.3, 0.3), (0.3, 0.9), (0.0, 0.9))
    assert inside((0.1, 0.5), u)
    assert not inside((0.45, 0.6), u)
    assert inside((0.45, 0.1), u)


@pytest.mark.parametrize(
    "wrong",
    [
        {"to": "ftp://host"}, {"to": "mqtt://"}, {"to": "mqtt://user:secret@host"}, {"to": "http://host:99999999"}, {"name": ""},
        {"score_min": 1.5}, {"left_s": float("nan")}, {"queue": 0}, {"prefix": "a//b"}, {"prefix": "#"},
        {"masks": (((0, 0), (1, 1)),)}, {"masks": (((0, 0), (1, 1), (2, 0)),)},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_and_no_address_is_shown(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        rule(**wrong)
    assert "secret" not in str(caught.value)


def test_the_tables_are_read_from_toml(tmp_path: Path) -> None:
    text = """camera = "0"
[[events]]
name = "gate"
to = "mqtts://me@broker:8883"
classes = ["person"]
zones = [{name = "gate", polygon = [[0, 0], [1, 0], [1, 0.5]]}]
[[events]]
name = "all"
to = "https://hooks.example/x"
"""
    path = tmp_path / "client.toml"
    path.write_text(text)
    config = read_config(path, {})
    assert [r.name for r in config.events] == ["gate", "all"]
    assert config.events[0].zones[0].polygon == ((0, 0), (1, 0), (1, 0.5))
    path.write_text(text.replace("classes", "clases"))
    with pytest.raises(ConfigError, match="clases"):
        read_config(path, {})


def test_mqtt_says_counts_and_occupancy_as_state() -> None:
    event = Event(kind=Kind.COUNTS, camera="front door", rule="yard", at_unix_ns=5, frame=1, counts={"person": 2})
    told, counts, occupancy = _mqtt_messages(rule(), event, None)
    assert (told.topic, told.retain) == ("headtail/front_door/events", False)
    assert (counts.topic, json.loads(counts.body), counts.retain) == (
        "headtail/front_door/yard/counts", {"total": 2, "person": 2}, True,
    )  # fmt: skip
    assert (occupancy.topic, occupancy.body) == ("headtail/front_door/yard/occupancy", b"ON")


def test_a_picture_goes_only_where_it_was_asked_for() -> None:
    event = Event(kind=Kind.APPEARED, camera="c", rule="r", at_unix_ns=5, frame=1, thing={"label": "person"})
    (without,) = _plain_messages(rule(), event, None)
    assert "snapshot_jpeg" not in json.loads(without.body)
    (with_one,) = _plain_messages(rule(snapshot=True), event, np.zeros((1000, 1280, 3), np.uint8))
    data = np.frombuffer(base64.b64decode(json.loads(with_one.body)["snapshot_jpeg"]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (500, 640, 3)


def test_no_label_of_a_peer_becomes_a_topic() -> None:
    assert slug("../#/+ \x00 gate") == "gate"
    assert slug("###") == "camera"


def test_the_queue_keeps_order_outlives_its_process_and_gives_up_the_oldest(tmp_path: Path) -> None:
    queue = DiskQueue(tmp_path / "q" / "a.sqlite3", limit=5)
    queue.add([Message(body=b"%d" % i, topic="t", retain=bool(i % 2)) for i in range(4)])
    queue.delivered(queue.oldest(2))
    queue.close()
    queue = DiskQueue(tmp_path / "q" / "a.sqlite3", limit=5)
    assert [(m.body, m.retain) for m in queue.oldest(9)] == [(b"2", False), (b"3", True)]
    queue.add([Message(body=b"%d" % i) for i in range(4, 9)])
    assert ([m.body for m in queue.oldest(9)], queue.lost, len(queue)) == ([b"4", b"5", b"6", b"7", b"8"], 2, 5)
