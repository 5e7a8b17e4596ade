"""Shape and relay mode: a real edge-server and a real edge-client with the scenario's link between them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.testbed.link.model import LinkConfig
from deploy.testbed.plots import Dot, plot_run
from deploy.testbed.real.relay import SERVER_ADDRESS, open_relay
from deploy.testbed.real.shape import Shaper
from deploy.testbed.scenario import Scenario
from deploy.testbed.simulate.report import quantile
from protos.errors import ConfigError, ModelError

log = logging.getLogger(__name__)

_START_S = 180.0
_PORT = 50551
_LEAD_NS, _LEAD_BPS = 5_000_000_000, 50e6
_PYTHON = (sys.executable, "-m")


class Stage:
    """A real server, and real clients one after another, each behind the link of its scenario. An async context manager.

    In shape mode the server starts once, and each run's link is a proxy of its own; in relay mode every run has two namespaces
    of its own, and the server starts again in one of them.

    Args:
        mode: ``shape`` or ``relay``.
        model: a default model's name or a bundle's directory.
        workload: whose device times, in the same words or a workload's JSON file; empty: the model's, as measured here.
    """

    def __init__(self, mode: str, model: str, workload: str = "") -> None:
        self._mode, self._model, self._workload = mode, model, workload or model
        self._stack = AsyncExitStack()
        self._address = ""
        self._folder = Path()
        self.shaper: Shaper | None = None  # of the run in progress, in shape mode

    async def __aenter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-testbed-")))
        try:
            self._address = await _start(self._stack, [*self._server(), "--listen", "127.0.0.1:0"], self._folder / "port")
            await self._warm()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def run(self, scenario: Scenario, source: str, policy: str = "ours") -> tuple[list[dict[str, Any]], int]:
        """One client from its start to its end: its lines of results, and when the scenario began (Unix time, ns).

        Raises:
            ConfigError: the machine does not allow it.
            ModelError: a process ended with an error.
        """
        up, down = (_led_in(d.link(scenario.duration_s, scenario.folder), scenario) for d in (scenario.uplink, scenario.downlink))
        results = self._folder / "results.jsonl"
        async with AsyncExitStack() as stack:
            if self._mode == "relay":
                relay = open_relay(up, down, seed=scenario.seed)
                await stack.enter_async_context(relay)
                log.info("relay: %s", relay.name)
                server = relay.command("server", [*self._server("relayed"), "--listen", f"{SERVER_ADDRESS}:{_PORT}"])
                await _start(stack, server, self._folder / "relayed")
                relay.restart()
                begin_ns = relay.time.start_unix_ns + _LEAD_NS
                client = relay.command(
                    "client", self._client(scenario, source, policy, results, f"{SERVER_ADDRESS}:{_PORT}", begin_ns)
                )
            else:
                shaper = self.shaper = Shaper(up, down, seed=scenario.seed)
                host, port = self._address.rsplit(":", 1)
                address = f"127.0.0.1:{await shaper.start(host, int(port))}"
                stack.push_async_callback(shaper.close)
                begin_ns = shaper.time.start_unix_ns + _LEAD_NS
                client = self._client(scenario, source, policy, results, address, begin_ns)
            await self._run(client, scenario.duration_s + _START_S)
        return [json.loads(line) for line in results.read_text().splitlines()], begin_ns

    def _server(self, port_file: str = "port") -> list[str]:
        (self._folder / port_file).unlink(missing_ok=True)
        return [
            *(*_PYTHON, "edge_server.cli", "--model", self._model),
            *("--port-file", str(self._folder / port_file), "--log-level", "warning"),
        ]

    def _client(
        self, scenario: Scenario, source: str, policy: str, results: Path, address: str, begin_unix_ns: int = 0
    ) -> list[str]:
        return [
            *(*_PYTHON, "deploy.testbed.simulate.device", "--policy", policy, "--slowdown", f"{scenario.device_slowdown:g}"),
            *("--workload", self._workload),
            *("--begin-unix-ns", str(begin_unix_ns), "--", "--server", address),
            *("--camera", source, "--realtime", "--fps", f"{scenario.fps:g}", "--loop"),
            *("--frames", str(int(scenario.duration_s * scenario.fps)), "--deadline-ms", f"{scenario.deadline_ms:g}"),
            *("--transport", scenario.transport, "--change-gate", "off", "--output", str(results), "--log-level", "warning"),
        ]

    async def _warm(self) -> None:
        """Fetches the bundle and measures the device before the link is made narrow: that is not what is tested."""
        scenario = Scenario(duration_s=1, fps=3, deadline_ms=5000, device_slowdown=1)
        client = self._client(scenario, "synthetic:fps=3,size=640x480", "ours", self._folder / "warm.jsonl", self._address)
        await self._run(client, _START_S)

    async def _run(self, client: Sequence[str], limit_s: float) -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*client, stdout=asyncio.subprocess.DEVNULL, stderr=pipe)
        try:
            _, errors = await asyncio.wait_for(process.communicate(), limit_s)
        except (TimeoutError, asyncio.CancelledError):
            await _stop(process)
            raise
        if process.returncode:
            raise ModelError(f"edge-client ended with {process.returncode}: {errors.decode(errors='replace').strip()[-500:]}")


def _led_in(link: LinkConfig, scenario: Scenario) -> LinkConfig:
    """The link with a good start before the scenario begins: the client starts and says hello in it, as simulation assumes."""
    until_ns = int((scenario.duration_s + _START_S) * 1e9)
    return replace(link, trace=link.trace.after(_LEAD_NS, _LEAD_BPS, until_ns), queue_bytes=int(link.room_bytes))


def run_real(
    scenario: Scenario,
    *,
    mode: str,
    model: str,
    source: str | None,
    plot: Path | None,
    policy: str = "ours",
    choices: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the scenario with real processes and returns what came of it, as plain JSON types.

    The device takes the times measured of this machine, stretched by ``device_slowdown`` (see ``device``); the server is this
    machine as it is. ``choices`` are named in the picture in this order.

    Raises:
        ConfigError: the scenario or the machine does not allow it.
        ModelError: a process ended with an error.
    """
    if scenario.cameras != 1:
        raise ConfigError(f"{mode} mode runs one camera; {scenario.name} has {scenario.cameras} (use --mode simulate)")

    async def run() -> tuple[list[dict[str, Any]], int]:
        async with Stage(mode, model) as stage:
            return await stage.run(scenario, source or f"synthetic:fps={scenario.fps:g},size=640x480", policy)

    lines, begin_ns = asyncio.run(run())
    dots, summary = summary_of(lines, begin_ns, scenario.deadline_ms)
    if plot is not None:
        capacity = scenario.uplink.capacity(scenario.duration_s, scenario.folder).steps(int(scenario.duration_s * 1e9))
        plot_run(
            dots,
            [(t / 1e9, bps / 1e6) for t, bps in capacity],
            choices,
            title=f"{scenario.name}, {mode} mode, {policy}: {summary['on_time']:.1%} on time",
            deadline_ms=scenario.deadline_ms,
            duration_s=scenario.duration_s,
            out=plot,
        )
    return {"scenario": scenario.name, "mode": mode, "model": model, "policy": policy, **summary}


async def _start(stack: AsyncExitStack, command: Sequence[str], port_file: Path) -> str:
    """Starts a server and returns its address."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    stack.push_async_callback(_stop, process)
    for _ in range(int(_START_S * 20)):
        if port_file.exists() and (address := port_file.read_text().strip()):
            return address
        if process.returncode is not None:
            raise ModelError(f"edge-server ended with {process.returncode}; its log stands above")
        await asyncio.sleep(0.05)
    raise ModelError(f"edge-server did not begin to listen within {_START_S:g} s")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), 15)
    except TimeoutError:
        process.kill()
        await process.wait()


def summary_of(lines: Sequence[dict[str, Any]], begin_ns: int, deadline_ms: float) -> tuple[list[Dot], dict[str, Any]]:
    """Dots for the picture and figures for the table, of a client's results. An answer after the deadline is none.

    Raises:
        ModelError: there are no results.
    """
    if not lines:
        raise ModelError("the client wrote no results")
    dots = []
    for line in sorted(lines, key=lambda line: int(line["captured_ns"])):
        at_s = (line["captured_unix_ns"] - begin_ns) / 1e9
        stages, late = line["latency_ms"], not answered_in_time(line, deadline_ms)
        before_send = sum(float(stages.get(name, 0.0)) for name in ("capture", "preprocess", "head", "codec", "send"))
        dots.append(
            Dot(
                at_s=at_s,
                choice=line.get("detail", "") if line["outcome"] in ("result", "local", "expired") else "",
                outcome="expired" if late and line["outcome"] in ("result", "local") else line["outcome"],
                latency_ms=0.0 if late else float(stages["total"]),
                sent_s=at_s + before_send / 1e3,
                payload_bytes=int(line["payload_bytes"]),
            )
        )
    latencies = sorted(d.latency_ms for d in dots if d.outcome in ("result", "local"))
    outcomes = Counter(f"dropped({x['reason']})" if x["outcome"] == "dropped" else x["outcome"] for x in lines)
    return dots, {
        "captured": len(lines),
        "on_time": len(latencies) / len(lines),
        "bytes_mean": sum(d.payload_bytes for d in dots) / len(lines),
        "latency_ms_p50": quantile(latencies, 0.5),
        "latency_ms_p95": quantile(latencies, 0.95),
        "outcomes": dict(sorted(outcomes.items())),
    }


def answered_in_time(line: dict[str, Any], deadline_ms: float) -> bool:
    """Whether a line of results holds an answer that came before the deadline."""
    return line["outcome"] in ("result", "local") and float(line["latency_ms"].get("total", 0.0)) <= deadline_ms
