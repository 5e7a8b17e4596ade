"""Events delivered for real: a mosquitto that is restarted, a web server that stalls, fails and lies."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edge_client.events.courier import Courier
from edge_client.events.mqtt import MqttTarget
from edge_client.events.queue import DiskQueue, Message
from edge_client.events.webhook import WebhookTarget, sign
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import run_client, standby, write_clip
from tests.fakes.mosquitto import MOSQUITTO, Broker

pytestmark = pytest.mark.timeout(240)
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def wait_for(what: Callable[[], bool], *, seconds: float = 120.0) -> None:
    until_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    folder = tmp_path / "broker"
    folder.mkdir()
    running = Broker(folder)
    running.start()
    yield running
    running.stop()


class Listener:
    """Subscribes with a session that the broker keeps over a restart, as Home Assistant may."""

    def __init__(self, port: int) -> None:
        self.got: list[tuple[str, bytes, bool]] = []
        self.ready = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="listener", clean_session=False)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self.ready.set()
        self._client.on_message = lambda _c, _u, m: self.got.append((m.topic, m.payload, m.retain))
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def last(self, topic: str) -> bytes | None:
        found = [body for t, body, _ in self.got if t == topic]
        return found[-1] if found else None


def message(number: int) -> list[Message]:
    return [Message(body=json.dumps({"id": str(number)}).encode(), topic="headtail/cam/events")]


@needs_mosquitto
def test_ten_thousand_events_survive_a_restart_of_the_broker(tmp_path: Path, broker: Broker) -> None:
    listener = Listener(broker.port)
    assert listener.ready.wait(30)
    target = MqttTarget(f"mqtt://127.0.0.1:{broker.port}", base="headtail/cam")
    courier = Courier(target, lambda: DiskQueue(tmp_path / "q.sqlite3", limit=20_000), back_off_s=(0.1, 1.0), end_s=60.0)
    for number in range(10_000):
        courier.give(functools.partial(message, number))
        if number == 4_000:
            wait_for(lambda: courier.delivered >= 1_000)
            broker.stop()
        if number == 8_000:
            time.sleep(1)
            broker.start()
        if number % 2_000 == 0:
            time.sleep(0.05)
    wait_for(lambda: courier.delivered >= 10_000)
    events = lambda: [json.loads(body)["id"] for topic, body, _ in listener.got if topic.endswith("/events")]  # noqa: E731
    wait_for(lambda: len(set(events())) == 10_000)
    courier.close()
    wait_for(lambda: listener.last("headtail/cam/availability") == b"offline")
    listener.close()
    assert courier.lost == 0
    assert set(events()) == {str(n) for n in range(10_000)}


@needs_mosquitto
def test_the_will_says_that_a_camera_is_gone(broker: Broker) -> None:
    listener = Listener(broker.port)
    assert listener.ready.wait(30)
    target = MqttTarget(f"mqtt://127.0.0.1:{broker.port}", base="headtail/cam")
    assert target.send(message(1)) == 1
    wait_for(lambda: listener.last("headtail/cam/availability") == b"online")
    target._client.socket().close()  # the power is cut: no goodbye
    wait_for(lambda: listener.last("headtail/cam/availability") == b"offline")
    target.close()
    listener.close()


@needs_mosquitto
def test_a_client_on_a_clip_is_found_by_home_assistant_and_tells_its_events(tmp_path: Path, broker: Broker) -> None:
    listener = Listener(broker.port)
    assert listener.ready.wait(30)
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    config = tmp_path / "client.toml"
    config.write_text(f"""camera = "{write_clip(tmp_path / "clip.avi", frames=20)}"
camera_id = "front door"
[[events]]
name = "anything"
to = "mqtt://127.0.0.1:{broker.port}"
seconds_min = 0
""")
    with standby(tmp_path, bundle) as server:
        done = run_client(tmp_path, "--config", str(config), "--server", server.serve(), "--json")
    assert done.code == 0, done.err
    assert done.summary["outcomes"]["result"] == 20
    wait_for(lambda: listener.last("headtail/front_door/availability") == b"offline")
    listener.close()
    events = [json.loads(body) for topic, body, _ in listener.got if topic == "headtail/front_door/events"]
    kinds = Counter(e["event"] for e in events)
    assert kinds["appeared"] >= 1
    assert kinds["server"] >= 1
    assert all(e["camera"] == "front door" and len(e["id"]) == 32 and "snapshot_jpeg" not in e for e in events)
    assert listener.last("headtail/front_door/anything/occupancy") in (b"ON", b"OFF")
    found = {topic: json.loads(body) for topic, body, _ in listener.got if topic.startswith("homeassistant/")}
    assert len(found) == 3
    for entity in found.values():
        assert entity["device"]["name"] == "front door"
        assert entity["availability_topic"] == "headtail/front_door/availability"
    assert listener.last(found["homeassistant/binary_sensor/headtail_headtail_front_door_server/config"]["state_topic"]) in (
        b"ON",
        b"OFF",
    )


class Hook:
    """A web server that does, request by request, what it is told."""

    def __init__(self, script: list[Any]) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.taken: list[str] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.got.append((dict(self.headers), body))
                step = script.pop(0) if script else 200
                if step == "stall":
                    time.sleep(1.5)
                    self.close_connection = True
                    return
                if step == "cut":
                    self.connection.close()
                    self.close_connection = True
                    return
                if step == "lie":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: zzz\r\n\r\n")
                    self.close_connection = True
                    return
                if step == "garbage":
                    self.wfile.write(b"\x00\xff not http\r\n\r\n")
                    self.close_connection = True
                    return
                if 200 <= step < 300:
                    hook.taken.append(json.loads(body)["id"])
                self.send_response(step)
                if step == 302:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/secret-path"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_web_server_that_stalls_fails_and_lies_gets_every_event_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HEADTAIL_WEBHOOK_SECRET", "shared")
    hook = Hook([200, "stall", 500, "cut", "lie", "garbage", 429, 302, 503, 200])
    target = WebhookTarget(hook.url, whole_s=0.5)
    courier = Courier(target, lambda: DiskQueue(tmp_path / "q.sqlite3", limit=100), back_off_s=(0.01, 0.05), end_s=30.0)
    for number in range(6):
        courier.give(functools.partial(message, number))
    wait_for(lambda: courier.delivered == 6)
    courier.close()
    hook.close()
    assert hook.taken == [str(n) for n in range(6)]
    headers, body = hook.got[0]
    assert headers["X-Headtail-Signature"] == sign("shared", body)
    assert headers["X-Headtail-Event"] == "0"
    assert "secret-path" not in caplog.text


def test_an_event_that_is_refused_for_good_does_not_hold_up_the_others(tmp_path: Path) -> None:
    hook = Hook([400, 200])
    courier = Courier(WebhookTarget(hook.url), lambda: DiskQueue(tmp_path / "q.sqlite3", limit=100), end_s=30.0)
    for number in range(2):
        courier.give(functools.partial(message, number))
    courier.close()
    hook.close()
    assert hook.taken == ["1"]


def test_what_nobody_took_waits_for_the_next_start(tmp_path: Path) -> None:
    queue = lambda: DiskQueue(tmp_path / "q.sqlite3", limit=100)  # noqa: E731
    courier = Courier(WebhookTarget("http://127.0.0.1:1/"), queue, back_off_s=(0.01, 0.05), end_s=0.2)
    for number in range(3):
        courier.give(functools.partial(message, number))
    courier.close()
    assert courier.delivered == 0
    hook = Hook([])
    again = Courier(WebhookTarget(hook.url), queue, end_s=30.0)
    wait_for(lambda: len(hook.taken) == 3)
    again.close()
    hook.close()
    assert hook.taken == ["0", "1", "2"]


async def test_giving_an_event_never_waits(tmp_path: Path) -> None:
    """A target that hangs, and a queue that cannot be opened, are the courier's business alone."""
    entered, release = threading.Event(), threading.Event()

    class Hanging:
        shown = "hanging"

        def send(self, messages: list[Message]) -> int:
            entered.set()
            release.wait(60)
            return len(messages)

        def close(self) -> None: ...

    courier = Courier(Hanging(), lambda: DiskQueue(tmp_path / "q.sqlite3", limit=10**6), end_s=0.1)
    courier.give(functools.partial(message, 0))
    assert await asyncio.to_thread(entered.wait, 60)
    for number in range(1, 30_000):
        courier.give(functools.partial(message, number))
    assert courier.lost > 0  # memory is bounded, too, and what was lost is counted
    release.set()
    await asyncio.to_thread(courier.close)
