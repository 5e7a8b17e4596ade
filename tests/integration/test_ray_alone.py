"""Ray's own way, without our door: ``serve run`` of deploy/ray/serve.yaml answers the unary call through Serve's proxy."""

import asyncio
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import pytest

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION, Result
from splitters.runtime.tail import load_tail
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture
from tests.fakes.server_running import environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

import psutil

from tests.fakes.ray_cluster import end

yaml = pytest.importorskip("yaml")

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "serve.yaml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_run_answers_as_the_tail_does(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    device = Device(bundle)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"]["port"], config["grpc_options"]["port"] = free_port(), free_port()
    (application,) = config["applications"]
    application["args"] |= {"model": str(bundle.path), "replicas": "1", "cpus": "0.5"}
    # A door so narrow that a crowd does not fit on any machine.
    application["deployments"] = [{"name": "door", "max_ongoing_requests": 4, "max_queued_requests": 4}]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(tmp_path / "serve.yaml")], stdout=log, stderr=log,
            env={**environment(), "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"},
            cwd=CONFIG.parents[2], start_new_session=True,
        )  # fmt: skip
    try:
        address = f"127.0.0.1:{config['grpc_options']['port']}"
        result = asked(address, application["name"], device, process, tmp_path / "log")
        crowd = asyncio.run(all_at_once(address, application["name"], device, 400))
    finally:
        end(psutil.Process(process.pid))
        process.wait()
    symbols = device.codec.decode(device.payloads(picture(3)))
    (wanted,) = load_tail(bundle).run([x[None] for x in device.codec.dequantise(symbols)], [(48, 40)])
    assert result.error is None, result.error
    assert [s.class_id for s in result.answer.top] == [s.class_id for s in wanted.top]
    # Nobody waits long before the door, where a deadline does not count yet: whoever does not fit is refused at once.
    assert sum(crowd.values()) == 400
    assert set(crowd) <= {"answered", "overloaded", "RESOURCE_EXHAUSTED"}, crowd
    assert crowd["RESOURCE_EXHAUSTED"] > 0
    assert crowd["answered"] > 0


async def all_at_once(address: str, application: str, device: Device, callers: int) -> Counter[str]:
    """How so many calls end that come together, each with a deadline of ten seconds."""
    layers = device.layers(picture(3), 0, deadline_ns=10_000_000_000)
    request = pb.InferRequest(protocol_version=PROTOCOL_VERSION, bundle_sha256=device.bundle.sha256, layers=layers)

    async def one(stub: pb_grpc.HeadtailStub) -> str:
        try:
            reply = await stub.Infer(request, timeout=120, metadata=[("application", application)])
        except grpc.aio.AioRpcError as error:
            return error.code().name
        error = Result.from_proto(reply.result).error
        return "answered" if error is None else error.code

    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.HeadtailStub(channel)
        return Counter(await asyncio.gather(*(one(stub) for _ in range(callers))))


def asked(address: str, application: str, device: Device, process: subprocess.Popen[bytes], log: Path) -> Result:
    """The answer to one frame, as soon as the application is there."""
    request = pb.InferRequest(
        protocol_version=PROTOCOL_VERSION, bundle_sha256=device.bundle.sha256, layers=device.layers(picture(3), 0)
    )
    until, told = time.monotonic() + 150, ""
    with grpc.insecure_channel(address) as channel:
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                reply = pb_grpc.HeadtailStub(channel).Infer(request, timeout=20, metadata=[("application", application)])
                return Result.from_proto(reply.result)
            except grpc.RpcError as error:
                told = str(error)
                time.sleep(0.1)
    raise AssertionError(f"no answer: {told}\n{log.read_text()[-3000:]}")
