"""The server as a process of its own: signals, the parent process, the port file, and an end that comes in any case."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from pathlib import Path

from edge_server.config import ServerConfig
from edge_server.server import CLOSE_S, Server
from protos.errors import ConfigError, DrainingError
from protos.process import leave

log = logging.getLogger(__name__)

_POLL_S = 0.5


async def serve(config: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT, or until the parent process is gone; then drains. SIGHUP reads the bundles again.

    The process's signals are this server's from here on, while it starts as well.

    Raises:
        HeadtailError: it cannot start, or a part without which it cannot serve has died.
    """
    watchdog = threading.Timer(config.grace_s + 2 * CLOSE_S, leave, (0,))  # should the event loop itself be held up
    watchdog.daemon = True
    server = Server(config, on_ending=watchdog.start)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, server)
    loop.add_signal_handler(signal.SIGHUP, server.reload_soon)
    parent = asyncio.create_task(_watch_parent(server, config.parent_pid)) if config.parent_pid is not None else None
    try:
        await server.open()
        if config.port_file is not None:
            _write_whole(config.port_file, server.address + "\n")
        await server.wait()
    except DrainingError:
        log.info("told to stop before the start was complete")
    finally:
        await server.stop()
        watchdog.cancel()
        if config.port_file is not None:
            _remove_own(config.port_file, server.address)
        if parent is not None:
            parent.cancel()


def _stop(server: Server) -> None:
    """At a signal: begins the end; a second time ends at once."""
    if server.ending.is_set():
        log.warning("stopping at once")
        leave(130)
    server.stop_soon()


async def _watch_parent(server: Server, pid: int) -> None:
    first = os.getppid()
    while os.getppid() == first and _alive(pid):
        await asyncio.sleep(_POLL_S)
    log.info("process %d, which started this server, is gone", pid)
    server.stop_soon()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_whole(path: Path, text: str) -> None:
    """A reader sees nothing or all of it."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write the port file {path}: {error.strerror}") from error


def _remove_own(path: Path, address: str) -> None:
    """Removes a port file, unless it names another server by now."""
    with contextlib.suppress(OSError):
        if address and path.read_text(encoding="utf-8").strip() == address:
            path.unlink()
