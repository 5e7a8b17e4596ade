"""``--server embedded``: the server as a child process, which ends with its client however that ends.

The child is started by its command line and never imported: the client stays without torch. It holds the read end of a
pipe whose write end only we have; when we are gone, even by SIGKILL, it reads end-of-file and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from protos.errors import BY_CODE, HeadtailError, MissingDependencyError, UnreachableError

log = logging.getLogger(__name__)

_LONG_S = 5.0
_START_S = 600.0  # an export on a busy or small machine takes minutes; a server that dies is noticed at once
_STOP_S = 10.0


class EmbeddedServer:
    """A child ``edge-server`` on a free loopback port."""

    def __init__(self, model: str) -> None:
        self.address = ""
        self._model = model
        self._process: subprocess.Popen[bytes] | None = None
        self._dir = tempfile.TemporaryDirectory(prefix="headtail-")

    async def start(self) -> str:
        """Starts it and returns its address; a first start exports the default bundle, which takes a while.

        Raises:
            MissingDependencyError: torch is not installed.
            HeadtailError: it ended at once; the message is its own.
        """
        if find_spec("torch") is None:
            raise MissingDependencyError("--server embedded needs the server's packages: pip install 'headtail[server]'")
        port_file, log_file = Path(self._dir.name) / "port", Path(self._dir.name) / "log"
        command = [sys.executable, "-m", "edge_server.cli", "--listen", "127.0.0.1:0", "--port-file", str(port_file)]
        command += ["--parent-pid", str(os.getpid()), *(["--model", self._model] if self._model else [])]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        begin_s, told = time.monotonic(), False
        while (waited_s := time.monotonic() - begin_s) < _START_S:
            if waited_s >= _LONG_S and not told:
                log.warning("the server is still starting; the first time it exports the model, which takes a minute or two")
                told = True
            text = port_file.read_text(encoding="utf-8").strip() if port_file.is_file() else ""
            if text:
                self.address = text if ":" in text else f"127.0.0.1:{text}"
                return self.address
            code = self._process.poll()
            if code is not None:
                raise _own_error(code, log_file.read_text(encoding="utf-8", errors="replace"))
            await asyncio.sleep(0.05)
        self.stop()
        raise UnreachableError(f"the embedded server was not ready within {_START_S:g} s")

    def stop(self) -> None:
        """Asks it to drain, and ends it when it does not."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.send_signal(signal.SIGTERM)
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._dir.cleanup()


def _own_error(code: int, log: str) -> HeadtailError:
    lines = [line for line in log.splitlines() if line.strip()]
    text = re.sub(r"^edge-server: (error: )?", "", lines[-1]) if lines else f"it ended with code {code}"
    kinds: dict[int, type[HeadtailError]] = {}
    for kind in BY_CODE.values():
        kinds.setdefault(kind.exit_code, kind)
    make: Callable[[str], HeadtailError] = kinds.get(code, HeadtailError)
    return make(f"the embedded server did not start: {text}")
