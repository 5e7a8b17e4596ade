"""Hostile Open Inference requests, over a socket: each is answered, or refused with an error that is not the server's own."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
import numpy as np

from protos.headtail.v1 import open_inference_pb2 as oip
from tests.fakes.hostile_values import NAMES
from tests.fakes.server_fuzz import HANG_S, Tally, mutate

METHODS = ("ModelInfer", "ModelInfer", "ModelInfer", "ModelInfer", "ModelMetadata", "ModelReady", "ServerMetadata", "ServerLive")
SIDES = (0, 1, 2, 3, 4, 8, 32, -1, 2**31, 2**62, -(2**63), 2**63 - 1)


def hostile_request(rng: random.Random) -> bytes:
    """A request that may be right in every part but one or two."""
    tensor = oip.ModelInferRequest.InferInputTensor
    shape = [1, 4, 8, 8] if rng.random() < 0.6 else [rng.choice(SIDES) for _ in range(rng.choice((0, 1, 4, 4, 4, 60)))]
    name = "latent_0" if rng.random() < 0.7 else rng.choice(("image", "latent_1", *NAMES))
    kind = "FP32" if rng.random() < 0.7 else rng.choice(("UINT8", "BYTES", "FP64", *NAMES))
    given = tensor(name=name, datatype=kind, shape=shape)
    request = oip.ModelInferRequest(model_name="tiny" if rng.random() < 0.9 else rng.choice(NAMES), id=rng.choice(NAMES))
    if rng.random() < 0.3:
        given.contents.fp32_contents.extend([rng.choice((0.0, float("nan"), float("inf"), 1e38))] * rng.choice((0, 1, 256, 5000)))
        given.contents.uint_contents.extend([rng.choice((0, 255, 256, 2**32 - 1))] * rng.choice((0, 1, 256)))
    else:
        values = np.full(rng.choice((0, 1, 255, 256, 256, 256, 257)), rng.choice((0.0, np.nan, np.inf, -1e38)), np.float32)
        request.raw_input_contents.append(values.tobytes() + b"x" * rng.choice((0, 0, 0, 1)))
    request.inputs.extend([given] * rng.choice((1, 1, 1, 1, 0, 2, 100)))
    for key in ("source_width", "source_height", rng.choice(NAMES)):
        if rng.random() < 0.3:
            request.parameters[key].int64_param = rng.choice(SIDES)
        elif rng.random() < 0.1:
            request.parameters[key].string_param = rng.choice(NAMES)
    if rng.random() < 0.1:
        request.model_version = rng.choice(NAMES)
    if rng.random() < 0.2:
        request.outputs.add(name=rng.choice(("scores", *NAMES)))
    data = bytes(request.SerializeToString())
    return mutate(rng, data) if rng.random() < 0.2 else data


async def run_open_inference(address: str, inputs: int, seed: int, workers: int = 4) -> Tally:
    """Raises AssertionError where a request ends otherwise than it may."""
    tally = Tally()

    async def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            while tally.inputs < inputs:
                tally.inputs += 1
                await _call(channel, rng, tally)

    await asyncio.gather(*(work(n) for n in range(workers)))
    return tally


async def _call(channel: grpc.aio.Channel, rng: random.Random, tally: Tally) -> None:
    method, data = rng.choice(METHODS), hostile_request(rng)
    call: Any = channel.unary_unary(
        f"/inference.GRPCInferenceService/{method}", request_serializer=bytes, response_deserializer=bytes
    )
    try:
        await asyncio.wait_for(call(data), HANG_S)
        tally.accepted += 1
    except grpc.aio.AioRpcError as error:
        code = dict(error.trailing_metadata() or ()).get("headtail-code", "")
        tally.errors[f"{error.code().name} {code}".strip()] += 1
        if code in ("internal", "headtail") or (not code and error.code() is grpc.StatusCode.UNKNOWN):
            raise AssertionError(f"{method} ended as the server's own fault: {error.details()}; {data[:200]!r}") from error
