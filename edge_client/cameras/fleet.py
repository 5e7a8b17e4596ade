"""Runs the cameras side by side, and begins one again that has failed while the others go on."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from dataclasses import replace
from typing import Any

from edge_client.app import App, Shared
from edge_client.cameras.metrics import CamerasMetrics
from edge_client.cameras.tables import CamerasConfig
from edge_client.capture.sources import parse_source
from edge_client.config import EMBEDDED, ClientConfig
from edge_client.console import Console, Ending
from edge_client.device.worker import Lanes, ThreadExecutor
from edge_client.observe.fairness import jain
from edge_client.transport.embedded import EmbeddedServer
from edge_client.web.opening import open_page
from protos.errors import HeadtailError

log = logging.getLogger(__name__)

_TELL_S = 10.0
_BACK_OFF_S = (2.0, 60.0)


class Fleet:
    """One run of ``edge-client`` with tables ``[[camera]]``. Has the methods of ``App``.

    Args:
        config: the cameras.
        console: whom it speaks to.
        back_off_s: (first, longest) wait before a camera that failed is begun again.
    """

    def __init__(self, config: CamerasConfig, console: Console, *, back_off_s: tuple[float, float] = _BACK_OFF_S) -> None:
        self._config, self._console, self._back_off_s = config, console, back_off_s
        self._apps: dict[str, App] = {}
        self._endings: dict[str, Ending] = {}
        self._stop = asyncio.Event()
        self._first: dict[tuple[str, str], asyncio.Event] = {}

    async def run(self) -> Ending:
        """Runs until every camera has ended, or to the interrupt."""
        config = self._config
        lanes = _lanes(config)
        executor = ThreadExecutor(lanes)
        servers: dict[str, EmbeddedServer] = {}
        page = metrics = None
        ending = Ending()
        try:
            if config.web is not None:
                page = open_page(config.web)
                await page.start()
            if config.metrics_listen is not None:
                metrics = CamerasMetrics()
                log.info("metrics on port %d", metrics.serve(*config.metrics_address()))
            cameras = [await self._with_server(camera, servers) for camera in config.cameras]
            shared = Shared(lanes=Lanes(executor, lanes), page=page, metrics=metrics.camera if metrics else None)
            telling = asyncio.create_task(self._tell())
            try:
                await asyncio.gather(*(self._keep(camera, shared) for camera in cameras))
            finally:
                telling.cancel()
        except HeadtailError as error:
            ending.error = error
        finally:
            if page is not None:
                await page.close()
            if metrics is not None:
                metrics.close()
            for server in servers.values():
                await asyncio.to_thread(server.stop)
            executor.close()
        ending.interrupted = self._stop.is_set()
        ending.error = ending.error or next((e.error for e in self._endings.values() if e.error is not None), None)
        ending.summary, ending.text = self._summary(), self._text()
        return ending

    def interrupt(self) -> None:
        """Ends every camera in order."""
        self._stop.set()
        for app in self._apps.values():
            app.interrupt()

    async def _with_server(self, camera: ClientConfig, servers: dict[str, EmbeddedServer]) -> ClientConfig:
        """A camera whose server is started here meets the one child that serves its model."""
        if camera.server != EMBEDDED:
            return camera
        if camera.model not in servers:
            server = servers[camera.model] = EmbeddedServer(camera.model)
            await server.start()
        return replace(camera, server=servers[camera.model].address, model="")

    # ------------------------------------------------------------------ one camera

    async def _keep(self, config: ClientConfig, shared: Shared) -> None:
        """A camera's runs, one after the other: a file's end is the end, a camera that fails begins again."""
        wait_s, longest_s = self._back_off_s
        await self._wait_for_the_first(config)
        while not self._stop.is_set():
            app = self._apps[config.camera_id] = App(config, self._quiet(), shared=shared)
            opening = asyncio.create_task(self._open_the_way(config, app))
            try:
                ending = await app.run()
            finally:
                opening.cancel()
                self._first[config.server, config.model].set()
            self._endings[config.camera_id] = _added(self._endings.get(config.camera_id), ending)
            if ending.error is None or not self._worth_another(config, ending.error):
                if ending.error is not None:
                    log.error("camera %s has ended: %s", config.camera_id, ending.error.message)
                return
            log.warning("camera %s: %s; it begins again in %.0f s", config.camera_id, ending.error.message, wait_s)
            self._endings[config.camera_id].error = None
            try:
                await asyncio.wait_for(self._stop.wait(), wait_s)
            except TimeoutError:
                wait_s = min(2 * wait_s, longest_s)

    def _worth_another(self, config: ClientConfig, error: HeadtailError) -> bool:
        try:
            live = parse_source(config.camera).camera
        except HeadtailError:
            return False
        return live and not config.frames and (error.retryable or error.code == "source")

    async def _wait_for_the_first(self, config: ClientConfig) -> None:
        """One camera fetches and measures a model; the others, which then find it, wait for it."""
        key = (config.server, config.model)
        if key in self._first:
            await self._first[key].wait()
        else:
            self._first[key] = asyncio.Event()

    async def _open_the_way(self, config: ClientConfig, app: App) -> None:
        await app.ready.wait()
        self._first[config.server, config.model].set()

    # ------------------------------------------------------------------ what people see

    def _quiet(self) -> Console:
        return replace(self._console, status=lambda _text: None, terminal=False)

    async def _tell(self) -> None:
        before: Counter[str] = Counter()
        while True:
            await asyncio.sleep(_TELL_S)
            now: Counter[str] = Counter()
            for app in self._apps.values():
                now += Counter({outcome.value: n for outcome, n in app.outcomes.items()})
            news = {name: n - before[name] for name, n in now.items() if n > before[name]}
            before = now
            down = [name for name, app in self._apps.items() if not app.up]
            text = f"{len(self._apps)} cameras | {sum(news.values()) / _TELL_S:.1f} frames/s"
            text += "".join(f" {name} {n}" for name, n in news.items())
            self._console.status(text + (f" | no server: {', '.join(down)}" if down else "") + "\n")

    def _summary(self) -> dict[str, Any]:
        cameras = {name: dict(ending.summary) for name, ending in self._endings.items()}
        outcomes: Counter[str] = Counter()
        for summary in cameras.values():
            outcomes.update(summary.get("outcomes", {}))
        shares = [_answered(s) / s["frames"] for s in cameras.values() if s.get("frames")]
        return {
            "frames": sum(s.get("frames", 0) for s in cameras.values()), "outcomes": dict(outcomes),
            "balanced": all(s.get("balanced", True) for s in cameras.values()),
            "payload_bytes_total": sum(s.get("payload_bytes_total", 0) for s in cameras.values()),
            "jain_answered": round(jain(shares), 4) if any(shares) else None,
            "cameras": cameras,
        }  # fmt: skip

    def _text(self) -> str:
        return "\n".join(f"camera   {name}\n{ending.text}" for name, ending in self._endings.items() if ending.text)


def _lanes(config: CamerasConfig) -> int:
    """Heads side by side: two for each core that this process may use, and no more than there are cameras.

    Beside other work the kernel divides the cores among the threads that stand ready, and a lane stands empty between two jobs:
    with one lane a core, one process gets a fraction of what a process for each camera gets.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(2 * cores // max(camera.threads for camera in config.cameras), len(config.cameras)))


def _answered(summary: dict[str, Any]) -> int:
    return sum(summary["outcomes"].get(name, 0) for name in ("result", "local", "unchanged", "filtered"))


def _added(before: Ending | None, ending: Ending) -> Ending:
    """A camera's runs as one: frames and outcomes add up, everything else is the last run's."""
    if before is None or not before.summary.get("frames"):
        return ending
    if not ending.summary.get("frames"):
        return Ending(summary=before.summary, text=before.text, error=ending.error, interrupted=ending.interrupted)
    both = dict(ending.summary)
    for name in ("frames", "payload_bytes_total"):
        both[name] = before.summary[name] + ending.summary[name]
    both["outcomes"] = {name: n + before.summary["outcomes"][name] for name, n in ending.summary["outcomes"].items()}
    both["balanced"] = before.summary["balanced"] and ending.summary["balanced"]
    return Ending(summary=both, text=ending.text, error=ending.error, interrupted=ending.interrupted)
