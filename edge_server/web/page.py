"""The page of ``edge-server --web``, and what it asks for as JSON."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from aiohttp import web

from edge_server.doors.grpc import Ingress
from edge_server.observe.tally import Tally
from protos.text import printable
from protos.web.site import Site

_SHOWN_SESSIONS = 200


class ServerPage:
    """One page of one server. It asks only when a browser does, and keeps nothing of its own.

    Args:
        tally: the counters.
        ingress: the sessions, and what they share.
        backend: the backend's name.
        host: where it listens; others than this machine need the token of ``HEADTAIL_WEB_TOKEN``.
        port: 0: any free one.

    Raises:
        ConfigError: others can reach the address and no token is set.
    """

    def __init__(self, tally: Tally, ingress: Ingress, *, backend: str, host: str, port: int) -> None:
        self._tally, self._ingress, self._backend = tally, ingress, backend
        self._site = Site(files(__package__) / "static", {"/api/state": self._state}, host=host, port=port)

    async def start(self) -> int:
        """Listens; the port. Raises ``ConfigError`` where it cannot."""
        return await self._site.start()

    async def close(self) -> None:
        """Ends it."""
        await self._site.close()

    async def _state(self, request: web.Request) -> web.StreamResponse:
        since = request.query.get("since", "0")
        return web.json_response(self.state(int(since) if since.isdecimal() and len(since) <= 15 else 0))

    def state(self, since: int) -> dict[str, Any]:
        """What the page shows; the strip's seconds from ``since`` on."""
        services = self._ingress.services
        load = services.backend.load_now()
        sessions = sorted((session.facts() for session in self._ingress.sessions), key=lambda facts: str(facts["who"]))
        state = self._tally.state(since)
        return {
            **state,
            "refusals": [[ago, code, printable(text)] for ago, code, text in state["refusals"]],
            "version": services.version,
            "backend": self._backend,
            "draining": self._ingress.draining,
            "load": {"waiting": load.waiting, "queue_ms": load.queue_ns / 1e6, "tail_ms": load.tail_ns / 1e6},
            "models": [
                {
                    "name": printable(model.name), "sha256": model.sha256[:12], "task": model.bundle.manifest.task,
                    "device_bytes": model.device_bytes, **self._tally.model(model.name),
                }
                for model in services.store.all()
            ],
            "session_count": len(sessions),
            "sessions": sessions[:_SHOWN_SESSIONS],
        }  # fmt: skip
