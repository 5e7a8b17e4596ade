"""A real server killed in the middle of a camera's stream and started again, cold, as a service manager would."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from splitters.bundle import open_bundle
from tests.fakes.client_process import Finished, client, kept_address
from tests.fakes.server_running import START_S, command, environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What was seen.

    Attributes:
        down_s: between the kill and the new start.
        start_s: from the new start to the open port: imports, bundle, tail.
        back_s: from the open port to the first answer of the server that the client wrote down.
        before, down, after: outcomes of the frames up to the kill, until the new start, and from the first answer on.
    """

    down_s: float
    start_s: float
    back_s: float
    before: dict[str, int]
    down: dict[str, int]
    after: dict[str, int]
    latency_local_max_ms: float
    finished: Finished = field(repr=False)

    def as_json(self) -> dict[str, object]:
        """Figures alone."""
        facts = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items() if k != "finished"}
        summary = self.finished.summary
        return facts | {"frames": summary["frames"], "balanced": summary["balanced"], "reconnects": summary["reconnects"]}


def cheapest(bundle: Path) -> str:
    """The operating point with the least work on the device.

    Fixed for these runs: on a machine that has no time the controller would rightly answer locally, server or not.
    """
    return str(min(open_bundle(bundle).points, key=lambda p: (p.head_ms.p50, p.id)).id)


class _Server:
    """One life of the server."""

    def __init__(self, tmp: Path, bundle: Path, listen: str, arguments: Sequence[str]) -> None:
        self.port_file = tmp / f"port-{time.monotonic_ns()}"
        line = command("--listen", listen, "--port-file", str(self.port_file), "--model", str(bundle), *arguments)
        with (tmp / f"{self.port_file.name}.log").open("w") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env=environment())
        self.log = Path(log.name)

    def address(self) -> str:
        """Once it listens."""
        until = time.monotonic() + START_S
        while not self.port_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        return self.port_file.read_text().strip()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def kill_and_restart(
    tmp: Path, bundle: Path, camera: Sequence[str], *, at_frame: int = 60, down_s: float = 3.0, after_s: float = 3.0,
    arguments: Sequence[str] = (),
) -> Recovery:  # fmt: skip
    """Runs it.

    Args:
        tmp: for everything written.
        bundle: what both servers hold.
        camera: the client's options, endless.
        at_frame: the kill comes when this many frames have their outcome.
        down_s: until the server is started again.
        after_s: how long the client goes on after the first answer.
        arguments: of both servers.
    """
    first = _Server(tmp, bundle, kept_address(), arguments)
    second: _Server | None = None
    try:
        address = first.address()
        with client(tmp, *camera, "--server", address, "--json") as edge:
            edge.wait_frame(at_frame - 1)
            first.kill()
            killed_s, killed_at = time.monotonic(), edge.lines()[-1]["frame"]
            time.sleep(down_s)
            restarted_at = edge.lines()[-1]["frame"]
            restarted_s = time.monotonic()
            second = _Server(tmp, bundle, address, arguments)
            second.address()
            open_s, seen = time.monotonic(), len(edge.lines())
            until = open_s + 180
            while not any(line["outcome"] == "result" for line in edge.lines()[seen:]):
                assert edge.process.poll() is None, edge.process.communicate()
                assert time.monotonic() < until, "the client did not come back"
                time.sleep(0.005)
            back_s = time.monotonic()
            back_at = next(line["frame"] for line in edge.lines()[seen:] if line["outcome"] == "result")
            time.sleep(after_s)
            edge.process.send_signal(signal.SIGINT)
            done = edge.finish()
        local = [line["latency_ms"]["total"] for line in done.lines if line["outcome"] == "local"]
        return Recovery(
            down_s=restarted_s - killed_s, start_s=open_s - restarted_s, back_s=back_s - open_s,
            before=done.outcomes(last=killed_at), down=done.outcomes(first=killed_at + 1, last=restarted_at),
            after=done.outcomes(first=back_at), latency_local_max_ms=max(local, default=0.0), finished=done,
        )  # fmt: skip
    finally:
        first.kill()
        if second is not None:
            second.kill()
