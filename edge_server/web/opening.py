"""Opens the page where ``--web`` asks for one; the only module of this room that the rest of the server needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_server.doors.grpc import Ingress
from edge_server.observe.tally import Tally
from protos.web.address import needing_aiohttp, page_address

if TYPE_CHECKING:
    from edge_server.web.page import ServerPage


def open_page(listen: str, tally: Tally, ingress: Ingress, *, backend: str) -> ServerPage:
    """The page of ``--web``, not yet listening.

    Raises:
        MissingDependencyError: aiohttp is not installed.
        ConfigError: no address; or others can reach it and no token is set.
    """
    with needing_aiohttp():
        from edge_server.web.page import ServerPage
    host, port = page_address(listen)
    return ServerPage(tally, ingress, backend=backend, host=host, port=port)
