"""A camera on loopback: GStreamer's own RTSP server as a child process of the system's Python.

Debian has it as ``python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good
gstreamer1.0-plugins-ugly``.
"""

from __future__ import annotations

import functools
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

_SERVER = Path(__file__).with_name("rtsp_server.py")
_PROBE = """
import gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
assert all(Gst.ElementFactory.find(n) for n in ("videotestsrc", "x264enc", "rtph264pay", "videorate"))
"""


@functools.cache
def python_with_gstreamer() -> str | None:
    """A Python that can run the camera; None: there is none here."""
    for python in ("/usr/bin/python3", shutil.which("python3")):
        if python and Path(python).exists():
            try:
                if subprocess.run([python, "-c", _PROBE], capture_output=True, timeout=60, check=False).returncode == 0:
                    return python
            except (OSError, subprocess.TimeoutExpired):
                continue
    return None


class RtspCamera:
    """A running camera that can be killed, brought back, stalled, slowed and changed."""

    def __init__(self, port: int = 0) -> None:
        python = python_with_gstreamer()
        if python is None:
            pytest.skip(
                "GStreamer's RTSP server is not installed: apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-ugly"
            )
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port = port
        self.url = f"rtsp://127.0.0.1:{port}/cam"
        self._python = python
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Begins, or begins again on the same port."""
        self._process = subprocess.Popen(
            [self._python, str(_SERVER), str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"
        until = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                assert time.monotonic() < until, "the camera does not listen"
                time.sleep(0.05)

    def tell(self, line: str) -> None:
        """``stall``, ``go``, or ``form WIDTH HEIGHT FPS``."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """As if its plug were pulled."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
