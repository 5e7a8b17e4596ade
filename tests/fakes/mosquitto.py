"""A real MQTT broker on loopback, for tests that are skipped where mosquitto is not installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


class Broker:
    """``mosquitto`` with persistence, which may be stopped and started again on the same port."""

    def __init__(self, folder: Path, *lines: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        settings = [
            f"listener {self.port} 127.0.0.1", "persistence true", f"persistence_location {folder}/", "max_queued_messages 0",
            *(("user root",) if os.geteuid() == 0 else ()),  # as "mosquitto" it could not write into pytest's folders
            *(lines or ("allow_anonymous true",)),
        ]  # fmt: skip
        self._config.write_text("\n".join(settings) + "\n")
        self._log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it listens."""
        assert MOSQUITTO is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stdout=log, stderr=log)
        until_s = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < until_s
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Ends it, in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None
