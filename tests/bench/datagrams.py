"""Datagrams beside the stream on links that lose packets, real processes, in turns.

    python -m tests.bench.datagrams --data DATA --mode relay --out rows.jsonl --picture loss.png        # root; about twelve minutes

A server at one end of a link, and for every loss a client by each transport at the other: 10 frames/s, a deadline of 200 ms,
round trips of 80 ms, 10 Mbit/s, one operating point. The link begins to lose when the client has connected, both ways alike;
frames of the first seconds after that count too. On time is an answer of the server before the deadline, of all frames
captured. Accuracy is that of those answers. The bundles' local models are left out: what the device answers itself is none of
it, and on a busy machine it steps in for answers that would still have come. ``relay`` is the kernel's own UDP and
TCP through network namespaces, ``shape`` a proxy on loopback whose TCP is a model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.testbed.link.model import LinkConfig, LossModel
from deploy.testbed.link.trace import constant
from deploy.testbed.real.relay import SERVER_ADDRESS, Relay
from deploy.testbed.real.run import _start
from deploy.testbed.real.shape import Shaper
from deploy.testbed.workload import load_workload
from tests.bench.control_real import CLASSIFIER, DETECTOR, WORKLOADS, Model, classifier, detector
from tests.fakes.bundles import write_tiny_bundle

LOSSES = ((0.0, 1.0), (0.02, 1.0), (0.05, 1.0), (0.1, 1.0), (0.1, 3.0), (0.2, 1.0), (0.2, 3.0), (0.3, 1.0), (0.6, 1.0))
TRANSPORTS = {"grpc": "tab:red", "quic": "tab:blue", "auto": "tab:green"}
TINY = "tiny"
POINTS = {TINY: 0, CLASSIFIER: 1, DETECTOR: 3}
DEADLINE_MS, FPS, RTT_MS, MBPS, PORT = 200, 10, 80, 10, 50651
LEAD_S = 8.0  # a client connects meanwhile
_PATIENCE_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One client's."""

    model: str
    transport: str
    loss: float
    burst: float

    @property
    def key(self) -> str:
        """Its name."""
        return f"{self.model} {self.transport} {self.loss:g} {self.burst:g}"


def link(run: Run) -> LinkConfig:
    """Of either direction."""
    loss = LossModel(loss=run.loss, burst_packets=run.burst)
    delay_ns = RTT_MS * 500_000
    return LinkConfig(trace=constant(MBPS * 1e6), delay_ns=delay_ns, loss=loss, loss_from_ns=int(LEAD_S * 1e9))


async def measure(args: argparse.Namespace, runs: Sequence[Run], done: set[str]) -> None:
    """Does what is not done yet."""
    with tempfile.TemporaryDirectory() as name:
        for model_name in dict.fromkeys(run.model for run in runs):
            todo = [run for run in runs if run.model == model_name and run.key not in done]
            if not todo:
                continue
            folder = Path(name) / model_name
            frames = int((args.seconds + 60) * FPS)
            folder.mkdir()
            bundle = args.bundles / model_name
            if model_name != TINY:
                bundle = without_local(bundle, folder / model_name)
            model = (
                tiny(folder)
                if model_name == TINY
                else classifier(bundle, args.data, folder / "photos")
                if model_name == CLASSIFIER
                else detector(bundle, args.data, frames)
            )
            await (relayed if args.mode == "relay" else shaped)(args, model, todo, folder)


def without_local(bundle: Path, copy: Path) -> Path:
    """A copy of a bundle that has no model for the device alone."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    local = manifest.pop("local")["path"]
    manifest["parts"] = [part for part in manifest["parts"] if part["path"] != local]
    (copy / local).unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def tiny(folder: Path) -> Model:
    """A network that takes no processor time, for a machine that has none to spare: what is measured is the transport."""
    bundle = write_tiny_bundle(folder / "tiny").path
    workload = load_workload(WORKLOADS / f"{CLASSIFIER}.json")
    return Model(bundle=bundle, source=Path(f"synthetic:fps={FPS},size=320x240"), judge=lambda _: 1.0, workload=workload)


async def relayed(args: argparse.Namespace, model: Model, todo: Sequence[Run], folder: Path) -> None:
    """Through two namespaces; the server starts once."""
    async with Relay(link(todo[0]), link(todo[0])) as relay, AsyncExitStack() as stack:
        server = relay.command("server", [*server_of(model, folder), "--listen", f"{SERVER_ADDRESS}:{PORT}"])
        await _start(stack, server, folder / "port")
        for run in todo:
            if run is todo[0]:  # the bundle is fetched before anything is lost
                clean = Run(model=run.model, transport="grpc", loss=0, burst=1)
                relay._configs = (link(clean), link(clean))
                relay.restart()
                warm = client_of(args, clean, model, folder, f"{SERVER_ADDRESS}:{PORT}", frames=5)
                await run_client(relay.command("client", warm), folder)
            relay._configs = (link(run), link(run))
            relay.restart()
            begin_ns = relay.time.start_unix_ns + int(LEAD_S * 1e9)
            client = relay.command("client", client_of(args, run, model, folder, f"{SERVER_ADDRESS}:{PORT}"))
            await one(args, run, model, client, folder, begin_ns)


async def shaped(args: argparse.Namespace, model: Model, todo: Sequence[Run], folder: Path) -> None:
    """Through a proxy on loopback."""
    async with AsyncExitStack() as stack:
        address = await _start(stack, [*server_of(model, folder), "--listen", "127.0.0.1:0"], folder / "port")
        host, port = address.rsplit(":", 1)
        for run in todo:
            shaper = Shaper(link(run), link(run))
            there = f"127.0.0.1:{await shaper.start(host, int(port))}"
            begin_ns = shaper.time.start_unix_ns + int(LEAD_S * 1e9)
            await one(args, run, model, client_of(args, run, model, folder, there), folder, begin_ns)
            await shaper.close()


def server_of(model: Model, folder: Path) -> list[str]:
    """Its command line, without the address."""
    arguments = ["--model", str(model.bundle), "--port-file", str(folder / "port"), "--tail-threads", "1"]
    return [sys.executable, "-m", "edge_server.cli", *arguments, "--log-level", "warning"]


def client_of(args: argparse.Namespace, run: Run, model: Model, folder: Path, address: str, *, frames: int = 0) -> list[str]:
    """Its command line: it starts in the lead, and goes on for the seconds that count."""
    frames = frames or int((LEAD_S + args.seconds) * FPS)
    return [
        *(sys.executable, "-m", "edge_client.cli", "--server", address, "--transport", run.transport),
        *("--camera", str(model.source), "--frames", str(frames)),
        *(() if str(model.source).startswith("synthetic") else ("--realtime", "--fps", str(FPS), "--loop")),
        *("--deadline-ms", str(DEADLINE_MS), "--operating-point", str(POINTS[run.model]), "--change-gate", "off"),
        *("--prefilter", "off", "--output", str(folder / "results.jsonl"), "--log-level", "warning", "--json"),
    ]


async def one(args: argparse.Namespace, run: Run, model: Model, client: Sequence[str], folder: Path, begin_ns: int) -> None:
    """One client from its start to its end, its line written."""
    summary = await run_client(client, folder)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    unaccounted = summary["frames"] - len(lines) if isinstance(summary.get("frames"), int) else 0
    counted = [line for line in lines if line["captured_unix_ns"] >= begin_ns]
    answers = [line for line in counted if line["outcome"] == "result" and line["latency_ms"]["total"] <= DEADLINE_MS]
    row = {
        "key": run.key, "mode": args.mode, "model": run.model, "transport": run.transport, "loss": run.loss, "burst": run.burst,
        "frames": len(counted), "on_time": round(len(answers) / max(1, len(counted)), 4),
        "accuracy": round(sum(map(model.judge, answers)) / max(1, len(answers)), 4),
        "payload_bytes": round(sum(line["payload_bytes"] for line in counted) / max(1, len(counted))),
        "outcomes": dict(Counter(line["outcome"] for line in counted)), "unaccounted": unaccounted,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


async def run_client(client: Sequence[str], folder: Path) -> dict[str, Any]:
    """Its summary."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *client, stdout=pipe, stderr=pipe, env={**os.environ, "HEADTAIL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    )
    out, errors = await asyncio.wait_for(process.communicate(), _PATIENCE_S)
    if process.returncode:
        raise SystemExit(f"edge-client ended with {process.returncode}: {errors.decode(errors='replace')[-500:]}")
    found: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return found


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """On-time share and accuracy against the share of packets lost, one column a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(2, len(models), figsize=(5 * len(models), 6), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        for transport, colour in TRANSPORTS.items():
            for burst, style in ((1.0, "o-"), (3.0, "x:")):
                found = sorted(
                    (row["loss"], row["on_time"], row["accuracy"])
                    for row in rows
                    if (row["model"], row["transport"], row["burst"]) == (model, transport, burst)
                )
                if not found:
                    continue
                label = transport if burst == 1 else f"{transport}, bursts of {burst:g}"
                axes[0][column].plot([100 * r[0] for r in found], [r[1] for r in found], style, color=colour, label=label)
                axes[1][column].plot([100 * r[0] for r in found], [r[2] for r in found], style, color=colour)
        axes[0][column].set(title=model, ylim=(0, 1.03), ylabel="answers of the server on time")
        axes[1][column].set(xlabel="packets lost, either way, %", ylabel="accuracy of those answers", ylim=(0, 1))
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, required=True, help="folder with the bundles efficientnet-lite0 and detector")
    parser.add_argument("--models", nargs="+", choices=(TINY, CLASSIFIER, DETECTOR), default=[CLASSIFIER, DETECTOR])
    parser.add_argument("--mode", choices=("relay", "shape"), default="relay")
    parser.add_argument("--transports", nargs="+", choices=tuple(TRANSPORTS), default=["grpc", "quic"])
    parser.add_argument("--seconds", type=float, default=10.0, help="that count, of one run (default %(default)s)")
    parser.add_argument("--losses", default="", help="only these, for instance 0,0.2 (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="one JSON line a run; runs in it already are not done again")
    parser.add_argument("--picture", type=Path, help="a picture of all runs in --out")
    args = parser.parse_args()
    wanted = {float(text) for text in args.losses.split(",") if text}
    runs = [
        Run(model=model, transport=transport, loss=loss, burst=burst)
        for model in args.models
        for loss, burst in LOSSES
        if not wanted or loss in wanted
        for transport in args.transports
    ]
    asyncio.run(measure(args, runs, {row["key"] for row in read(args.out)}))
    rows = read(args.out)
    if args.picture is not None:
        draw(rows, args.picture)
    print(json.dumps({"datagrams": {row["key"]: [row["on_time"], row["accuracy"], row["payload_bytes"]] for row in rows},
                      "unaccounted": sum(row["unaccounted"] for row in rows)}))  # fmt: skip


if __name__ == "__main__":
    main()
