"""MQTT: QoS 1, a will, TLS, and what Home Assistant needs to find the camera by itself."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import time
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge_client.events.courier import TargetError
from edge_client.events.queue import Message
from edge_client.events.rules import EventRule, slug
from protos.version import package_version

PASSWORD_VARIABLE = "HEADTAIL_MQTT_PASSWORD"  # noqa: S105 - the variable's name
_KEEPALIVE_S = 30
_ANSWER_S = 10.0


class MqttTarget:
    """A broker.

    Args:
        to: ``mqtt://[user@]host[:port]`` or ``mqtts://…``.
        base: the topic that everything of this camera begins with.
        ca: certificate authority's file; empty: the system's.
        announce: retained messages that are published at every connection.
    """

    def __init__(self, to: str, *, base: str, ca: str = "", announce: tuple[Message, ...] = ()) -> None:
        parts = urlsplit(to)
        secure = parts.scheme == "mqtts"
        self._host, self._port = parts.hostname or "", parts.port or (8883 if secure else 1883)
        self.shown = f"{parts.scheme}://{self._host}:{self._port}"
        self._availability = f"{base}/availability"
        self._announce = announce
        name = hashlib.sha256(f"{base} {os.getpid()}".encode()).hexdigest()[:12]
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"headtail-{name}")
        self._client.will_set(self._availability, "offline", qos=1, retain=True)
        self._client.max_queued_messages_set(0)
        self._client.reconnect_delay_set(1, 10)
        if secure:
            self._client.tls_set_context(ssl.create_default_context(cafile=ca or None))
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), os.environ.get(PASSWORD_VARIABLE))
        self._client.on_connect = self._on_connect
        self._refusal = ""
        self._begun = False

    def _on_connect(self, client: paho.Client, _data: object, _flags: object, reason: object, _properties: object) -> None:
        self._refusal = str(reason) if getattr(reason, "is_failure", False) else ""
        if self._refusal:
            return
        client.publish(self._availability, "online", qos=1, retain=True)
        for message in self._announce:
            client.publish(message.topic, message.body, qos=1, retain=True)

    def _connect(self) -> None:
        try:
            if not self._begun:
                self._client.connect(self._host, self._port, keepalive=_KEEPALIVE_S)
                self._client.loop_start()  # from here on it reconnects by itself
                self._begun = True
        except (OSError, ValueError) as error:
            raise TargetError(str(error)) from error
        until_s = time.monotonic() + _ANSWER_S
        while not self._client.is_connected():
            if self._refusal or time.monotonic() > until_s:
                raise TargetError(self._refusal or "not connected")
            time.sleep(0.02)

    def send(self, messages: list[Message]) -> int:
        """See ``Target``: taken is what the broker has acknowledged."""
        self._connect()
        infos = []
        for message in messages:
            info = self._client.publish(message.topic, message.body, qos=1, retain=message.retain)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            infos.append(info)
        until_s = time.monotonic() + _ANSWER_S
        taken = 0
        for info in infos:
            while not info.is_published() and time.monotonic() < until_s and self._client.is_connected():
                info.wait_for_publish(0.1)
            if not info.is_published():
                break
            taken += 1
        if not taken:
            raise TargetError("the broker acknowledged nothing")
        return taken

    def close(self) -> None:
        """See ``Target``; says that the camera is off, as the will would."""
        if self._begun:
            if self._client.is_connected():
                info = self._client.publish(self._availability, "offline", qos=1, retain=True)
                until_s = time.monotonic() + 1
                while not info.is_published() and time.monotonic() < until_s:
                    time.sleep(0.01)
            self._client.disconnect()
            self._client.loop_stop()


def base_topic(prefix: str, camera: str) -> str:
    """What every topic of a camera begins with."""
    return f"{prefix}/{slug(camera)}"


def discovery(base: str, camera: str, rules: list[EventRule]) -> tuple[Message, ...]:
    """Home Assistant's configuration messages: the camera as a device with its entities."""
    unique = f"headtail_{slug(base)}"
    device = {"identifiers": [unique], "name": camera, "manufacturer": "headtail", "sw_version": package_version()}
    common = {
        "device": device, "availability_topic": f"{base}/availability", "origin": {"name": "headtail", "sw": package_version()},
    }  # fmt: skip
    found = [
        _entity(
            "binary_sensor", f"{unique}_server", common, name="Server", state_topic=f"{base}/server", device_class="connectivity"
        )
    ]
    for rule in rules:
        key, topic = slug(rule.name), f"{base}/{slug(rule.name)}"
        found.append(
            _entity(
                "binary_sensor", f"{unique}_{key}_occupancy", common, name=rule.name, state_topic=f"{topic}/occupancy",
                device_class="occupancy",
            )
        )  # fmt: skip
        found.append(
            _entity(
                "sensor", f"{unique}_{key}_count", common, name=f"{rule.name} count", state_topic=f"{topic}/counts",
                value_template="{{ value_json.total }}", json_attributes_topic=f"{topic}/counts", state_class="measurement",
            )
        )  # fmt: skip
    return tuple(found)


def _entity(component: str, unique: str, common: Mapping[str, object], **settings: str) -> Message:
    body = json.dumps({**common, **settings, "unique_id": unique}).encode()
    return Message(topic=f"homeassistant/{component}/{unique}/config", body=body, retain=True)
