"""A server that sends a device whatever may hurt it: lists, welcomes, answers, bundles, and bytes that are no messages."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from edge_client.app import App
from edge_client.config import ClientConfig
from edge_client.console import Console
from protos.headtail.v1 import headtail_pb2 as pb
from splitters.bundle import Bundle
from splitters.bundle.manifest import MANIFEST
from tests.fakes.hostile_values import NAMES, as_json, hostile
from tests.fakes.peer_fuzz import hostile_grant, hostile_result, untouched, within_quota
from tests.fakes.server_fuzz import Tally, mutate

RIGHT = 0.95  # of what is needed to get any further


@dataclass
class Hostile:
    """Says something else every time; how often is counted."""

    bundle: Bundle
    rng: random.Random
    messages: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def _count(self, kind: str) -> None:
        self.messages += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def _sent(self, message: Any, kind: str) -> bytes:
        self._count(kind)
        data = bytes(message.SerializeToString())
        return mutate(self.rng, data) if self.rng.random() < 0.01 else data

    def _hash(self) -> str:
        return self.bundle.sha256 if self.rng.random() < RIGHT else self.rng.choice((*NAMES[:-1], "a" * 64, "A" * 64))

    async def list_models(self, request: bytes, context: Any) -> bytes:
        """Its models."""
        if self.rng.random() < 0.05:
            details = (("headtail-code", self.rng.choice(("internal", "headtail", "odd", "config", "draining"))),)
            await context.abort(self.rng.choice(list(grpc.StatusCode)[1:]), self.rng.choice(NAMES), details)
        names = [self.rng.choice(NAMES) for _ in range(self.rng.choice((0, 1, 1, 1, 1, 1, 1, 1, 300)))]
        models = [pb.ModelInfo(name=name, bundle_sha256=self._hash()) for name in names]
        version = 1 if self.rng.random() < 0.95 else 2**32 - 1
        return self._sent(pb.ListModelsResponse(models=models, protocol_version=version), "list")

    async def fetch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """A bundle in pieces, its manifest hostile or the pieces."""
        manifest = (self.bundle.path / MANIFEST).read_bytes()
        if self.rng.random() > RIGHT:
            manifest = as_json(self.rng, hostile(self.rng, json.loads(manifest)))
        yield self._sent(pb.BundleChunk(manifest_json=manifest), "manifest")
        held = {p.path: p.offset for p in pb.FetchBundleRequest.FromString(request).have}
        for part in self.bundle.manifest.device_parts():
            data, at = self.bundle.read_part(part.path), held.get(part.path, 0)
            path = part.path if self.rng.random() < 0.97 else self.rng.choice(NAMES)
            if at < len(data):
                yield self._sent(pb.BundleChunk(part=pb.PartChunk(path=path, offset=at, data=data[at:])), "part")
        while self.rng.random() < 0.1:
            yield self._sent(pb.BundleChunk(part=pb.PartChunk(path=part.path)), "empty piece")

    async def session(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answers, most of them impossible."""
        async for data in requests:
            message = pb.ClientMessage.FromString(data)
            which = message.WhichOneof("content")
            if which == "hello":
                welcome = pb.Welcome(protocol_version=1, session_id="s", model=self.rng.choice(NAMES), bundle_sha256=self._hash())
                welcome.max_in_flight = self.rng.choice((0, 8, 8, 2**32 - 1))
                welcome.max_payload_bytes = self.rng.choice((0, 1 << 22, 2**32 - 1))
                yield self._sent(pb.ServerMessage(welcome=welcome), "welcome")
            elif which == "layer":
                for _ in range(self.rng.choice((1, 1, 2, 5))):
                    yield self._answer(message.layer)
            elif which == "ping":
                echo = message.ping.sent_ns if self.rng.random() < 0.9 else self.rng.choice((0, 1, 2**63, 2**64 - 1))
                yield self._sent(pb.ServerMessage(pong=pb.Pong(echo_sent_ns=echo)), "pong")
            elif which == "goodbye":
                return

    def _answer(self, layer: pb.FrameLayer) -> bytes:
        kind = self.rng.random()
        if kind < 0.97:
            result = hostile_result(self.rng, layer.frame_id if self.rng.random() < 0.9 else self.rng.randrange(2**64))
            result.echo_sent_ns = layer.sent_ns if self.rng.random() < 0.8 else self.rng.choice((0, 1, 2**63, 2**64 - 1))
            return self._sent(pb.ServerMessage(result=result), "result")
        if kind < 0.98:
            return self._sent(pb.ServerMessage(grant=hostile_grant(self.rng)), "grant")
        if kind < 0.985:
            return self._sent(pb.ServerMessage(bundle_changed=pb.BundleChanged(bundle_sha256=self._hash())), "bundle changed")
        if kind < 0.99:
            return self._sent(pb.ServerMessage(draining=pb.Draining(grace_ns=self.rng.choice((0, 2**64 - 1)))), "draining")
        return self._sent(self.rng.choice((pb.ServerMessage(), pb.ServerMessage(welcome=pb.Welcome()))), "out of place")


@asynccontextmanager
async def hostile_server(bundle: Bundle, seed: int) -> AsyncIterator[tuple[Hostile, str]]:
    """It and its address."""
    said = Hostile(bundle, random.Random(seed))
    handlers = {
        "ListModels": grpc.unary_unary_rpc_method_handler(said.list_models),
        "FetchBundle": grpc.unary_stream_rpc_method_handler(said.fetch),
        "Session": grpc.stream_stream_rpc_method_handler(said.session),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("headtail.v1.Headtail", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield said, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def run_client(address: str, out: str, *, frames: int) -> tuple[str, int]:
    """A whole client in this process, against a hostile server: the code and the exit code that it ends with."""
    shown = io.StringIO()
    config = ClientConfig(
        camera="synthetic:fps=200,size=64x48", server=address, frames=frames, output=f"{out}/results.jsonl", change_gate="off",
        track=True, wait_for_server_s=0.0, save_video=f"{out}/clip",
    )  # fmt: skip
    ending = await asyncio.wait_for(App(config, Console(results=shown, status=shown.write, terminal=False)).run(), 120)
    assert all(line.isprintable() for line in (shown.getvalue() + ending.text).split("\n"))
    if ending.summary.get("frames"):
        assert ending.summary["balanced"], ending.summary
    if ending.error is None:
        return "done", 0
    assert ending.error.exit_code != 1, ending.error.message
    return ending.error.code, ending.error.exit_code


async def run_clients(bundle: Bundle, root: Path, inputs: int, seed: int) -> Tally:
    """Clients, one after another, until the hostile server has said that many things; the cache is ``root / "cache"``."""
    (root / "out").mkdir(exist_ok=True)
    before, os.environ["HEADTAIL_CACHE"] = os.environ.get("HEADTAIL_CACHE"), str(root / "cache")
    tally = Tally()
    try:
        with untouched(root):
            async with hostile_server(bundle, seed) as (said, address):
                while said.messages < inputs:
                    code, _ = await run_client(address, str(root / "out"), frames=100)
                    tally.errors[code] += 1
                    within_quota(root / "cache")
            tally.inputs, tally.accepted = said.messages, said.kinds.get("result", 0)
    finally:
        if before is None:
            del os.environ["HEADTAIL_CACHE"]
        else:
            os.environ["HEADTAIL_CACHE"] = before
    return tally
