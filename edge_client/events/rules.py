"""What ``[[events]]`` in a TOML file may say: which objects count, where, for how long, and who is told."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from protos.errors import ConfigError

Point = tuple[float, float]
Polygon = tuple[Point, ...]
"""Corners as shares of the picture's width and height, 0..1."""

SCHEMES = ("mqtt", "mqtts", "http", "https", "apprise")
_MIN_CORNERS = 3
_MAX_TEXT = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Zone:
    """A part of the picture that has a name."""

    name: str
    polygon: Polygon

    def __post_init__(self) -> None:
        _check_name("a zone", self.name)
        _check_polygon(f"zone {self.name!r}", self.polygon)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRule:
    """One table ``[[events]]``.

    Attributes:
        name: of the rule; topics and events carry it.
        to: ``mqtt://[user@]host[:port]``, ``mqtts://…``, ``http(s)://…``, or ``apprise`` (its address from the environment).
        classes: labels that count; empty: all.
        score_min: from which score on.
        zones: only objects that stand in one of them (the middle of a box's lower edge); empty: everywhere.
        masks: polygons whose objects do not count (the middle of the box).
        area_min: least share of the picture that a box covers.
        seconds_min: an object is reported once it has been there for so long.
        left_s: it has left when it was not seen for so long; shorter gaps are no event.
        still_s: every so many seconds an object that is still there is reported again; 0: never.
        snapshot: events carry the picture (JPEG, in base64); else no pixel leaves the device.
        ca: file of the certificate authority (PEM) that ``mqtts`` and ``https`` trust; empty: the system's.
        discovery: Home Assistant finds the camera by itself (MQTT).
        prefix: what MQTT topics begin with.
        queue: events kept on disk while nobody takes them; the oldest are given up first.
    """

    name: str
    to: str
    classes: tuple[str, ...] = ()
    score_min: float = 0.0
    zones: tuple[Zone, ...] = ()
    masks: tuple[Polygon, ...] = ()
    area_min: float = 0.0
    seconds_min: float = 0.5
    left_s: float = 2.0
    still_s: float = 0.0
    snapshot: bool = False
    ca: str = ""
    discovery: bool = True
    prefix: str = "headtail"
    queue: int = 20_000

    def __post_init__(self) -> None:
        _check_name("events", self.name)
        for name, low, high in (
            ("score_min", 0, 1), ("area_min", 0, 1), ("seconds_min", 0, 3600), ("left_s", 0, 86_400), ("still_s", 0, 86_400),
            ("queue", 1, 10_000_000),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:  # false for NaN, too
                raise ConfigError(f"events {self.name!r}: {name} must be {low}..{high}, got {getattr(self, name)}")
        for polygon in self.masks:
            _check_polygon(f"events {self.name!r}, a mask", polygon)
        if not re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", self.prefix):
            raise ConfigError(f"events {self.name!r}: prefix takes letters, digits, - and _ with / between, got {self.prefix!r}")
        self._check_target()

    @property
    def scheme(self) -> str:
        """Which kind of target it is."""
        return self.to.partition(":")[0]

    def check_classes(self, labels: Collection[str], model: str) -> None:
        """Refuses classes that the model does not have.

        Raises:
            ConfigError: one is unknown.
        """
        for name in self.classes:
            if labels and name not in labels:
                raise ConfigError(f"events {self.name!r} names the class {name!r}, which {model!r} does not have")

    def _check_target(self) -> None:
        # The address may hold a token: no message shows it.
        try:
            parts = urlsplit(self.to)
            _ = parts.port
        except ValueError:
            raise ConfigError(f"events {self.name!r}: the address in 'to' cannot be read") from None
        if self.scheme not in SCHEMES or (self.scheme != "apprise" and not parts.hostname):
            known = "mqtt://host:1883, mqtts://host:8883, http(s)://host/path or apprise"
            raise ConfigError(f"events {self.name!r}: 'to' must be {known}")
        if parts.password is not None:
            raise ConfigError(f"events {self.name!r}: no password in 'to'; set HEADTAIL_MQTT_PASSWORD, or a token in the path")


def _check_name(what: str, name: str) -> None:
    if not name or not name.isprintable() or len(name) > _MAX_TEXT:
        raise ConfigError(f"{what} needs a name of 1 to {_MAX_TEXT} printable characters, got {name!r}")


def _check_polygon(what: str, polygon: Polygon) -> None:
    if len(polygon) < _MIN_CORNERS or not all(0 <= v <= 1 for point in polygon for v in point):
        raise ConfigError(f"{what}: a polygon has at least three corners [x, y], each number a share 0..1 of the picture")


def inside(point: Point, polygon: Polygon) -> bool:
    """Whether a point lies in a polygon (even-odd rule)."""
    x, y = point
    odd = False
    for (x1, y1), (x2, y2) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) / (y2 - y1) * (x2 - x1):
            odd = not odd
    return odd


def slug(text: str) -> str:
    """A name as a level of an MQTT topic."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:64] or "camera"
