"""``edge-client --frigate``: no camera of its own, but Frigate's tensors."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np

from edge_client.client import Client
from edge_client.config import ClientConfig
from edge_client.console import Console, Ending
from edge_client.options import ClientOptions
from protos.errors import MissingDependencyError

log = logging.getLogger(__name__)

DEADLINE_MS = 150.0  # of Frigate's 200; the rest is the tensor's way here, its conversion, and the reply's way back
_LIMIT_MS = 185.0
_FPS = 5.0


class FrigateApp:
    """One run. Has the methods of ``App``."""

    def __init__(self, config: ClientConfig, console: Console) -> None:
        self._config, self._console = config, console
        self._task: asyncio.Task[None] | None = None
        self._ending = Ending()

    async def run(self) -> Ending:
        """Answers until interrupted."""
        self._task = asyncio.create_task(self._serve())
        await self._ending.settle(self._task)
        return self._ending

    def interrupt(self) -> None:
        """Ends it."""
        self._ending.interrupted = True
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        try:
            from edge_client.frigate.door import Door
        except ImportError as error:
            raise MissingDependencyError("--frigate needs pyzmq: pip install 'headtail[frigate]'") from error
        config = self._config
        deadline_ms = config.deadline_ms if config.deadline_ms is not None else DEADLINE_MS
        endpoint = config.endpoint("127.0.0.1:1" if config.server == "embedded" else config.server)
        options = ClientOptions(
            deadline_ms=deadline_ms, operating_point=config.operating_point, max_in_flight=config.max_in_flight,
            wait_for_server_s=config.effective_wait_s(live=False), threads=config.threads, score_min=str(config.score_min),
            fps=config.fps or _FPS, group=config.group, policy=config.policy, transport=config.transport, tls=config.tls,
            tls_ca=endpoint.tls_ca, tls_cert=endpoint.tls_cert, tls_key=endpoint.tls_key,
        )  # fmt: skip
        async with Client.open(server=config.server, model=config.model, options=options) as client:
            door = Door(config.frigate or "", client.infer, limit_ms=max(_LIMIT_MS, deadline_ms))
            self._console.status(f"answering Frigate at {door.address} with {client.model}\n")
            try:
                await door.serve()
            finally:
                await door.close()
                self._ending.summary = {**_facts(door.outcomes, door.latencies_ms), "payload_bytes_total": door.payload_bytes,
                                        "tensor_bytes_total": door.tensor_bytes}  # fmt: skip
                self._ending.text = _text(self._ending.summary)


def _facts(outcomes: dict[str, int], latencies_ms: list[float]) -> dict[str, Any]:
    ms = np.asarray(latencies_ms or [0.0])
    return {
        "frames": sum(n for name, n in outcomes.items() if name != "about model"), "outcomes": dict(outcomes),
        "latency_ms_p50": round(float(np.quantile(ms, 0.5)), 1), "latency_ms_p95": round(float(np.quantile(ms, 0.95)), 1),
        "latency_ms_max": round(float(ms.max()), 1),
    }  # fmt: skip


def _text(facts: dict[str, Any]) -> str:
    counts = ", ".join(f"{name} {n}" for name, n in facts["outcomes"].items())
    share = facts["payload_bytes_total"] / facts["tensor_bytes_total"] if facts["tensor_bytes_total"] else 0.0
    return (
        f"requests {facts['frames']} = {counts}\n"
        f"bytes    {facts['payload_bytes_total']:,} to the server, {share:.2%} of the tensors'\n"
        f"latency  {facts['latency_ms_p50']:.0f} ms (p50), {facts['latency_ms_p95']:.0f} (p95), "
        f"{facts['latency_ms_max']:.0f} at most"
    )
