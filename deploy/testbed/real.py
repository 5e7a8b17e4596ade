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
from pathlib import Path
from typing import Any

from deploy.testbed.plots import Dot, plot_run
from deploy.testbed.relay import SERVER_ADDRESS, open_relay
from deploy.testbed.report import quantile
from deploy.testbed.scenario import Scenario
from deploy.testbed.shape import Shaper
from protos.errors import ConfigError, ModelError

log = logging.getLogger(__name__)

_START_S = 180.0
_PORT = 50551


def run_real(scenario: Scenario, *, mode: str, model: str, source: str | None, plot: Path | None) -> dict[str, Any]:
    """Runs the scenario with real processes and returns what came of it, as plain JSON types.

    The device's times are this machine's: ``device_slowdown`` is for simulation alone.

    Raises:
        ConfigError: the scenario or the machine does not allow it.
        ModelError: a process ended with an error.
    """
    if scenario.cameras != 1:
        raise ConfigError(f"{mode} mode runs one camera; {scenario.name} has {scenario.cameras} (use --mode simulate)")
    lines, link_start_ns = asyncio.run(_run(scenario, mode, model, source or f"synthetic:fps={scenario.fps:g},size=640x480"))
    dots, summary = _summary(lines, link_start_ns)
    if plot is not None:
        capacity = scenario.uplink.capacity(scenario.duration_s, scenario.folder).steps(int(scenario.duration_s * 1e9))
        choices = sorted({d.choice for d in dots if d.choice}, key=lambda name: (name == "local", name))
        plot_run(
            dots,
            [(t / 1e9, bps / 1e6) for t, bps in capacity],
            choices,
            title=f"{scenario.name}, {mode} mode: {summary['on_time']:.1%} on time",
            deadline_ms=scenario.deadline_ms,
            duration_s=scenario.duration_s,
            out=plot,
        )
    return {"scenario": scenario.name, "mode": mode, "model": model, **summary}


async def _run(scenario: Scenario, mode: str, model: str, source: str) -> tuple[list[dict[str, Any]], int]:
    up = scenario.uplink.link(scenario.duration_s, scenario.folder)
    down = scenario.downlink.link(scenario.duration_s, scenario.folder)
    python = [sys.executable, "-m"]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-testbed-")))
        port_file, results = folder / "port", folder / "results.jsonl"
        server = [*python, "edge_server.cli", "--model", model, "--port-file", str(port_file), "--log-level", "warning"]
        client = [
            *(*python, "edge_client.cli", "--camera", source, "--realtime", "--fps", f"{scenario.fps:g}"),
            *("--loop", "--frames", str(int(scenario.duration_s * scenario.fps)), "--deadline-ms", f"{scenario.deadline_ms:g}"),
            *("--change-gate", "off", "--output", str(results), "--log-level", "warning"),
        ]
        if mode == "relay":
            relay = open_relay(up, down, seed=scenario.seed)
            await stack.enter_async_context(relay)
            log.info("relay: %s", relay.name)
            server += ["--listen", f"{SERVER_ADDRESS}:{_PORT}"]
            await _start(stack, relay.command("server", server), port_file)
            link_time = relay.time
            client = relay.command("client", [*client, "--server", f"{SERVER_ADDRESS}:{_PORT}"])
        else:
            await _start(stack, [*server, "--listen", "127.0.0.1:0"], port_file)
            await _warm(client, port_file.read_text().strip(), folder)
            shaper = Shaper(up, down, seed=scenario.seed)
            host, port = port_file.read_text().strip().rsplit(":", 1)
            client += ["--server", f"127.0.0.1:{await shaper.start(host, int(port))}"]
            stack.push_async_callback(shaper.close)
            link_time = shaper.time
        process = await asyncio.create_subprocess_exec(*client, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
        _, errors = await asyncio.wait_for(process.communicate(), scenario.duration_s + _START_S)
        if process.returncode:
            raise ModelError(f"edge-client ended with {process.returncode}: {errors.decode(errors='replace').strip()[-500:]}")
        return [json.loads(line) for line in results.read_text().splitlines()], link_time.start_unix_ns


async def _warm(client: Sequence[str], address: str, folder: Path) -> None:
    """Fetches the bundle and measures the device before the link is made narrow: that is not what is tested."""
    given = [*client, "--server", address]
    given[given.index("--frames") + 1] = "3"
    given[given.index("--output") + 1] = str(folder / "warm.jsonl")
    process = await asyncio.create_subprocess_exec(*given, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
    await asyncio.wait_for(process.wait(), _START_S)


async def _start(stack: AsyncExitStack, command: Sequence[str], port_file: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    stack.push_async_callback(_stop, process)
    for _ in range(int(_START_S * 20)):
        if port_file.exists() and port_file.read_text().strip():
            return
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


def _summary(lines: Sequence[dict[str, Any]], link_start_ns: int) -> tuple[list[Dot], dict[str, Any]]:
    if not lines:
        raise ModelError("the client wrote no results")
    dots = []
    for line in sorted(lines, key=lambda line: int(line["captured_ns"])):
        at_s = (line["captured_unix_ns"] - link_start_ns) / 1e9
        point, stages = line["operating_point"], line["latency_ms"]
        answered = line["outcome"] in ("result", "local")
        before_send = sum(float(stages.get(name, 0.0)) for name in ("capture", "preprocess", "head", "codec", "send"))
        dots.append(
            Dot(
                at_s=at_s,
                choice=f"split {point}" if point is not None else ("local" if line["outcome"] == "local" else ""),
                outcome=line["outcome"],
                latency_ms=float(stages.get("total", 0.0)) if answered else 0.0,
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
