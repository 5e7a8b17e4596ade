"""The page's server: the cameras' names, each one's state as JSON and its picture as MJPEG."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Final

from aiohttp import web

from edge_client.web.view import CameraView
from protos.web.site import Site

MAX_STREAMS: Final = 32
_STALLED_S = 10.0
_NEXT = b"\r\n--picture\r\nContent-Type: image/jpeg\r\n\r\n"


class LivePage:
    """``edge-client --web``.

    Attributes:
        draw: the one thread that draws for every camera.
        views: the cameras, by name.

    Raises:
        ConfigError: see ``protos.web.site.Site``.
    """

    def __init__(self, host: str, port: int) -> None:
        self.draw = ThreadPoolExecutor(max_workers=1, thread_name_prefix="page")
        self.views: dict[str, CameraView] = {}
        self._streams: set[asyncio.Task[None] | None] = set()
        routes = {
            "/api/cameras": self._cameras,
            "/api/state": self._state,
            "/stream.mjpg": self._stream,
            "/picture.jpg": self._still,
        }
        self._site = Site(files(__package__) / "static", routes, host=host, port=port)

    def add(self, view: CameraView) -> None:
        """One more camera."""
        self.views[view.name] = view

    async def start(self) -> int:
        """Listens; the port. Raises ``ConfigError`` where it cannot."""
        return await self._site.start()

    async def close(self) -> None:
        """Ends it."""
        for task in self._streams:
            if task is not None:
                task.cancel()
        await self._site.close()
        self.draw.shutdown(wait=False, cancel_futures=True)

    def _view(self, request: web.Request) -> CameraView:
        if not self.views:
            raise web.HTTPServiceUnavailable(text="no camera has begun yet")
        name = request.query.get("camera", next(iter(self.views)))
        if name not in self.views:
            raise web.HTTPNotFound(text="there is no such camera")
        return self.views[name]

    async def _cameras(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(list(self.views))

    async def _state(self, request: web.Request) -> web.StreamResponse:
        since = request.query.get("since", "0")
        return web.json_response(self._view(request).state(int(since) if since.isdecimal() and len(since) <= 15 else 0))

    async def _still(self, request: web.Request) -> web.StreamResponse:
        view = self._view(request)
        with view.watching():
            try:
                _, jpeg = await asyncio.wait_for(view.picture(-1), _STALLED_S)
            except TimeoutError:
                raise web.HTTPServiceUnavailable(text="the camera gives no picture") from None
        return web.Response(body=jpeg, content_type="image/jpeg")

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The newest picture whenever the browser has taken the last one: a slow one sees fewer, and none is queued."""
        view = self._view(request)
        if len(self._streams) >= MAX_STREAMS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_STREAMS} browsers watch already")
        response = web.StreamResponse(headers={"Content-Type": "multipart/x-mixed-replace; boundary=picture"})
        await response.prepare(request)
        self._streams.add(asyncio.current_task())
        try:
            with view.watching():
                await response.write(_NEXT[2:])
                number = -1
                while True:
                    number, jpeg = await view.picture(number)
                    # The next part's head goes with the picture before: Chromium shows a picture only when it has read that.
                    await asyncio.wait_for(response.write(jpeg + _NEXT), _STALLED_S)
        except (ConnectionError, TimeoutError):
            return response
        finally:
            self._streams.discard(asyncio.current_task())
