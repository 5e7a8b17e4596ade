"""The program of ``rtsp_camera``, for a Python that has GStreamer: ``python3 rtsp_server.py PORT``.

It is told by lines on standard input what to do: ``stall``, ``go``, ``form WIDTH HEIGHT FPS``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

_LAUNCH = (
    "( videotestsrc is-live=true pattern=ball ! videorate "
    "! capsfilter name=form caps=video/x-raw,width=320,height=240,framerate=20/1 "
    "! identity name=gate ! x264enc tune=zerolatency key-int-max=10 bitrate=500 ! h264parse config-interval=1 "
    "! rtph264pay name=pay0 pt=96 )"
)


class Camera:
    """What is served, and what was told."""

    def __init__(self) -> None:
        self.media: Any = None
        self.stalled = False
        self.loop = GLib.MainLoop()

    def configured(self, _factory: Any, media: Any) -> None:
        """A client came: its pipeline can be steered."""
        self.media = media.get_element()
        self.media.get_by_name("gate").get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, self.watch)

    def watch(self, _pad: Any, _info: Any) -> Any:
        """Every frame."""
        return Gst.PadProbeReturn.DROP if self.stalled else Gst.PadProbeReturn.OK

    def told(self, _channel: Any, _condition: Any) -> bool:
        """Lines came, perhaps several at once: Python's own buffer would keep the later ones to itself."""
        data = os.read(sys.stdin.fileno(), 4096)
        for line in data.decode().splitlines():
            self.obey(line)
        if not data:
            self.loop.quit()
        return bool(data)

    def obey(self, line: str) -> None:
        """One line."""
        word, _, rest = line.partition(" ")
        if word in ("stall", "go"):
            self.stalled = word == "stall"
        elif word == "form":
            width, height, fps = rest.split()
            caps = f"video/x-raw,width={width},height={height},framerate={fps}/1"
            self.media.get_by_name("form").set_property("caps", Gst.Caps.from_string(caps))


def main(port: str) -> None:
    """Serves until standard input ends."""
    Gst.init(None)
    camera = Camera()
    server = GstRtspServer.RTSPServer()
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_shared(True)
    factory.set_launch(_LAUNCH)
    factory.connect("media-configure", camera.configured)
    server.get_mount_points().add_factory("/cam", factory)
    server.get_mount_points().add_factory("/stream1", factory)
    server.attach(None)
    GLib.io_add_watch(sys.stdin, GLib.IO_IN | GLib.IO_HUP, camera.told)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    camera.loop.run()


if __name__ == "__main__":
    main(sys.argv[1])
