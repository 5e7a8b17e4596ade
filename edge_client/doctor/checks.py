"""The checks; each says one line, and none stops the others."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from urllib.parse import urlsplit

from edge_client.bundles.fetch import choose_model, list_models
from edge_client.bundles.loader import ModelLoader, loads_here
from edge_client.bundles.store import BundleStore
from edge_client.capture.capture import Capture, CaptureConfig
from edge_client.capture.sources import parse_source
from edge_client.config import EMBEDDED, ClientConfig
from edge_client.device.choices import DeviceTimes
from edge_client.device.engine import Engine
from protos.errors import HeadtailError
from protos.text import printable

_ROOM_BYTES = 500 << 20
_EARLIEST_UNIX_S = 1_750_000_000  # a clock before this (June 2025) was never set
_SLOW_RTT_MS = 150
_EXTRAS = {"aiohttp": "web", "paho": "events", "zmq": "frigate", "prometheus_client": "metrics", "aioquic": "quic"}
_TRIES_S = 10.0
_PATHS = (
    "/stream1", "/Streaming/Channels/101", "/cam/realmonitor?channel=1&subtype=0", "/axis-media/media.amp", "/h264Preview_01_main",
    "/live", "/onvif1",
)  # fmt: skip
_PARTS = ("onnxruntime", "opencv-python-headless", "av", "grpcio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line. ``error``: the reason of a failure; ``advice``: what to do, also where nothing failed."""

    what: str
    said: str
    error: HeadtailError | None = None
    advice: str = ""


async def examine(config: ClientConfig, *, with_camera: bool) -> list[Finding]:
    """All checks, in the order in which a run would meet them."""
    checks: list[tuple[str, Callable[[], Awaitable[list[Finding]]]]] = [
        ("software", _software), ("clock", _clock), ("cache", _cache), ("server", lambda: _server(config)),
        ("device", lambda: _device(config)),
    ]  # fmt: skip
    if with_camera:
        checks.insert(3, ("camera", lambda: _camera(config)))
    found: list[Finding] = []
    for what, check in checks:
        try:
            found += await check()
        except HeadtailError as error:
            found.append(Finding(what=what, said=error.message, error=error, advice=_advice(what, config, error)))
    return found


async def _software() -> list[Finding]:
    parts = []
    for name in _PARTS:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # another distribution of the same module
            parts.append(f"{name} of another package")
    missing = [extra for module, extra in _EXTRAS.items() if find_spec(module) is None]
    advice = f"not installed, and needed only where asked for: headtail[{','.join(missing)}]" if missing else ""
    return [Finding(what="software", said=", ".join(parts), advice=advice)]


async def _clock() -> list[Finding]:
    now_s = time.time()
    if now_s < _EARLIEST_UNIX_S:
        text = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        return [Finding(what="clock", said=f"it says {text}", advice="set it, or certificates and time stamps are wrong")]
    return [Finding(what="clock", said=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s)))]


async def _cache() -> list[Finding]:
    root = BundleStore().root
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    advice = "a bundle may take tens of megabytes, results more" if free < _ROOM_BYTES else ""
    if not os.access(root, os.W_OK):
        advice = "it cannot be written; HEADTAIL_CACHE names another place"
    return [Finding(what="cache", said=f"{root}, {free / 2**30:.1f} GiB free", advice=advice)]


async def _camera(config: ClientConfig) -> list[Finding]:
    try:
        return await _opened(config.camera)
    except HeadtailError:
        if not _is_bare(config.camera):
            raise
        begin_s = time.monotonic()
        for path in _PATHS:
            if time.monotonic() - begin_s > _TRIES_S:  # a camera that is there refuses a wrong path at once
                break
            with suppress(HeadtailError):
                (found,) = await _opened(config.camera.rstrip("/") + path)
                return [replace(found, advice=f"the address as given does not open, with {path} behind it it does: use that")]
        raise


def _is_bare(camera: str) -> bool:
    """Whether it is the address of a network camera without a path."""
    parts = urlsplit(camera)
    return parts.scheme.lower() in ("rtsp", "rtsps") and not parts.path.strip("/")


async def _opened(camera: str) -> list[Finding]:
    source = parse_source(camera)
    capture = Capture(CaptureConfig(source=source, frames=10 if not source.camera else 0))
    begin_s = time.monotonic()
    try:
        await capture.start()
        delivery = await asyncio.wait_for(capture.next(), 5)
    except TimeoutError:
        delivery = None
    finally:
        capture.close()
    if delivery is None:
        return [Finding(what="camera", said=f"{source.shown} opened, and gave no frame", advice="try another resolution or stream")]
    frame = delivery.frame
    pace = f", {capture.fps:g} frames a second" if capture.fps else ""
    took_s = time.monotonic() - begin_s
    return [
        Finding(what="camera", said=f"{source.shown}: {frame.width_px}x{frame.height_px}{pace}, first frame after {took_s:.1f} s")
    ]


async def _server(config: ClientConfig) -> list[Finding]:
    if config.server == EMBEDDED:
        torch = find_spec("torch") is not None
        advice = "" if torch else "it needs the server's packages: pip install 'headtail[server]'"
        return [Finding(what="server", said="started as a child of the client", advice=advice)]
    endpoint = config.endpoint(config.server)
    models = await list_models(endpoint)
    choose_model(models, config.model, config.server)
    begin_s = time.monotonic()
    await list_models(endpoint)
    ms = (time.monotonic() - begin_s) * 1e3
    names = ", ".join(printable(m.name) for m in models)
    advice = "a deadline below twice that leaves little time for the server" if ms > _SLOW_RTT_MS else ""
    found = [
        Finding(
            what="server", said=f"{config.server} answers in {ms:.0f} ms, with a new connection; models: {names}", advice=advice
        )
    ]
    loopback = config.server.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")
    if endpoint.secure:
        found.append(Finding(what="encryption", said="TLS, and the server's certificate is trusted"))
    else:
        advice = "" if loopback else "latents travel unencrypted; --tls or --tls-ca encrypts"
        found.append(Finding(what="encryption", said="none", advice=advice))
    return found


async def _device(config: ClientConfig) -> list[Finding]:
    """Fetches and measures the model, as a first start would."""
    if config.server == EMBEDDED:
        return []
    store = BundleStore()
    try:
        load = loads_here(store, clock=time.monotonic_ns, threads=config.threads)
        loader = ModelLoader(config.endpoint(config.server), config.model, store=store, load=load)
        engine = await loader.first(live=False, wait_s=0)
        return _choices(engine, loader.times(engine), config.effective_deadline_ms(live=True))
    finally:
        store.close()


def _choices(engine: Engine, times: DeviceTimes, deadline_ms: float) -> list[Finding]:
    found = []
    sizes = {f"split {p.id}": (p.payload_bytes.p50, p.accuracy) for p in engine.bundle.points}
    for decision, ms in times.choices().items():
        size, accuracy = sizes.get(decision.name, (0.0, 0.0))
        said = f"{decision.name}: {ms.p50:.1f} ms here (p95 {ms.p95:.1f})"
        said += f", {size:,.0f} bytes, accuracy {accuracy:.3f}" if size else ""
        slow = deadline_ms and ms.p95 > deadline_ms / 2
        found.append(
            Finding(what="device", said=said, advice=f"more than half of the deadline of {deadline_ms:g} ms" if slow else "")
        )
    if engine.local is None:
        found.append(Finding(what="device", said="the model has no local part", advice="without a server no frame is answered"))
    return found


def _advice(what: str, config: ClientConfig, error: HeadtailError) -> str:
    if what == "camera":
        return _camera_advice(config.camera)
    if what == "server" and error.code == "unauthenticated":
        return "set HEADTAIL_TOKEN to this device's token"
    if what == "server":
        return "is edge-server running there, does its --listen say more than 127.0.0.1, does a firewall stand between?"
    return ""


def _camera_advice(camera: str) -> str:
    if camera.lower().startswith("rtsp"):
        bare = " The address has no path, most cameras want one, and none of the usual opened: " if _is_bare(camera) else ""
        makers = "Hikvision /Streaming/Channels/101, Dahua /cam/realmonitor?channel=1&subtype=0, Axis /axis-media/media.amp, "
        return (
            (bare or " Paths differ: ") + makers + "Reolink /h264Preview_01_main, others /stream1; user and password go before the "
            "host, with %40 for @; the camera's own page says whether RTSP is switched on."
        ).strip()
    if camera.isdecimal() or camera.startswith("/dev/"):
        return "is it plugged in, is another program using it, and is this user in the group video?"
    return ""
