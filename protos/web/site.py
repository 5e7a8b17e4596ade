"""A small web server on the program's own event loop: static files, some handlers, and headers that let nothing else in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from aiohttp import web

from protos.errors import ConfigError
from protos.web.address import token_for
from protos.web.door import LOGIN, Door, Handler

log = logging.getLogger(__name__)

_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "headtail",
}
_END_S = 1.0
_MAX_REQUEST_BYTES = 4096


class Site:
    """One page and what it asks for.

    Args:
        static: the folder of the page's own files; ``page.html`` is the page.
        routes: further paths (GET), each with its handler.
        host: where it listens; others than this machine need the token of ``HEADTAIL_WEB_TOKEN``.
        port: 0: any free one.

    Raises:
        ConfigError: others can reach the address and no token is set.
    """

    def __init__(self, static: Traversable, routes: Mapping[str, Handler], *, host: str, port: int) -> None:
        shared = files(__package__) / "static"
        self._files = {
            entry.name: entry.read_bytes() for folder in (shared, static) for entry in folder.iterdir() if _type_of(entry.name)
        }
        door = Door(token_for(host), self._files["login.html"])
        app = web.Application(middlewares=[door.guard], client_max_size=_MAX_REQUEST_BYTES)
        app.router.add_get("/", self._page)
        app.router.add_get("/static/{name}", self._static)
        app.router.add_get(LOGIN, self._home)
        app.router.add_post(LOGIN, self._home)
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        app.on_response_prepare.append(_harden)
        self._host, self._port = host, port
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_END_S)

    async def start(self) -> int:
        """Listens; the port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(f"--web {self._host}:{self._port}: cannot listen there: {error.strerror or error}") from error
        port = int(self._runner.addresses[0][1])
        log.info("page on http://%s:%d", self._host, port)
        return port

    async def close(self) -> None:
        """Ends it, whoever looks."""
        await self._runner.cleanup()

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return self._file("page.html") if request.path == "/" else web.Response(status=404)

    async def _home(self, _request: web.Request) -> web.StreamResponse:
        raise web.HTTPSeeOther("/")

    async def _static(self, request: web.Request) -> web.StreamResponse:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        if name not in self._files:
            return web.Response(status=404, text="there is no such file")
        return web.Response(body=self._files[name], content_type=_type_of(name), charset="utf-8")


def _type_of(name: str) -> str:
    return _TYPES.get("." + name.rpartition(".")[2], "")


async def _harden(_request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers[name] = value
