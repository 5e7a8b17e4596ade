"""The sink that turns reports into events, and events into messages for each target."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import cv2

from edge_client.events.courier import Courier, Target
from edge_client.events.queue import DiskQueue, Message
from edge_client.events.rules import EventRule, slug
from edge_client.events.watch import Event, Kind, Watch
from edge_client.frames import FrameReport
from edge_client.sinks.base import Labels
from protos.errors import MissingDependencyError
from splitters.tasks.preprocess import Frame

_LONGEST_PX = 640
_QUALITY = 80
_OBJECTS = (Kind.APPEARED, Kind.STILL, Kind.LEFT)


class EventSink:
    """A sink; everything that may take time is a courier's.

    Args:
        rules: the tables ``[[events]]``.
        camera: its name.
        labels: of the model that runs.
        up: whether the server is there.
        folder: where queues lie.

    Raises:
        MissingDependencyError: what a target needs is not installed.
        ConfigError: a target's settings are wrong.
    """

    def __init__(
        self, rules: tuple[EventRule, ...], camera: str, labels: Labels, up: Callable[[], bool], *, folder: Path
    ) -> None:  # fmt: skip
        self._camera, self._labels, self._up = camera, labels, up
        self._was_up: bool | None = None
        self._watches = [Watch(rule, camera) for rule in rules]
        by_target: dict[tuple[str, str, str], list[EventRule]] = {}
        for rule in rules:
            by_target.setdefault((rule.to, rule.ca, rule.prefix), []).append(rule)
        targets = {key: _open_target(group, camera) for key, group in by_target.items()}
        self.couriers = {
            key: Courier(target, functools.partial(_queue, folder, camera, by_target[key])) for key, target in targets.items()
        }

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        up = self._up()
        if up != self._was_up:
            self._was_up = up
            told: set[tuple[str, str, str]] = set()
            for watch in self._watches:
                if (key := _key(watch.rule)) not in told:  # once a target, whatever rules it has
                    told.add(key)
                    self._give(watch.rule, _server_event(report, self._camera, up=up), None)
        labels = self._labels()
        for watch in self._watches:
            for event in watch.take(report, labels):
                image = report.frame.image if watch.rule.snapshot and event.kind in _OBJECTS else None
                self._give(watch.rule, event, image)

    def _give(self, rule: EventRule, event: Event, image: Frame | None) -> None:
        make = _mqtt_messages if rule.scheme.startswith("mqtt") else _plain_messages
        self.couriers[_key(rule)].give(functools.partial(make, rule, event, image))

    def close(self) -> None:
        """See ``sinks.Sink``; what nobody takes now waits on disk."""
        for courier in self.couriers.values():
            courier.close()


def _key(rule: EventRule) -> tuple[str, str, str]:
    return rule.to, rule.ca, rule.prefix


def _server_event(report: FrameReport, camera: str, *, up: bool) -> Event:
    frame = report.frame
    return Event(kind=Kind.SERVER, camera=camera, rule="", at_unix_ns=frame.captured_unix_ns, frame=frame.index, up=up)


def _queue(folder: Path, camera: str, rules: list[EventRule]) -> DiskQueue:
    name = hashlib.sha256("\0".join((camera, *_key(rules[0]))).encode()).hexdigest()[:24]
    return DiskQueue(folder / f"{name}.sqlite3", limit=max(rule.queue for rule in rules))


def _open_target(rules: list[EventRule], camera: str) -> Target:
    first = rules[0]
    try:
        if first.scheme.startswith("mqtt"):
            from edge_client.events.mqtt import MqttTarget, base_topic, discovery

            base = base_topic(first.prefix, camera)
            announce = discovery(base, camera, [r for r in rules if r.discovery]) if any(r.discovery for r in rules) else ()
            return MqttTarget(first.to, base=base, ca=first.ca, announce=announce)
        if first.scheme == "apprise":
            from edge_client.events.notify import AppriseTarget

            return AppriseTarget()
        from edge_client.events.webhook import WebhookTarget

        return WebhookTarget(first.to, ca=first.ca)
    except ImportError as error:
        raise MissingDependencyError(f"events to {first.scheme} need more packages: pip install 'headtail[events]'") from error


def _body(event: Event, image: Frame | None) -> bytes:
    line = {"id": uuid.uuid4().hex, **event.as_json()}
    if image is not None:
        scale = min(1.0, _LONGEST_PX / max(image.shape[:2]))
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
        _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        line["snapshot_jpeg"] = base64.b64encode(data.tobytes()).decode()
    return json.dumps(line, separators=(",", ":")).encode()


def _plain_messages(_rule: EventRule, event: Event, image: Frame | None) -> list[Message]:
    return [Message(body=_body(event, image))]


def _mqtt_messages(rule: EventRule, event: Event, image: Frame | None) -> list[Message]:
    """The event itself, and as retained topics what is true from now on."""
    base = f"{rule.prefix}/{slug(event.camera)}"
    messages = [Message(topic=f"{base}/events", body=_body(event, image))]
    if event.kind is Kind.SERVER:
        messages.append(Message(topic=f"{base}/server", body=b"ON" if event.up else b"OFF", retain=True))
    elif event.kind is Kind.COUNTS:
        topic, total = f"{base}/{slug(rule.name)}", sum(event.counts.values())
        counts = json.dumps({"total": total, **event.counts}).encode()
        messages.append(Message(topic=f"{topic}/counts", body=counts, retain=True))
        messages.append(Message(topic=f"{topic}/occupancy", body=b"ON" if total else b"OFF", retain=True))
    return messages
