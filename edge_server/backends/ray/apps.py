"""Ray's own way: applications for ``serve run`` and ``serve deploy deploy/ray/serve.yaml``, without our door.

``tails`` starts a bundle's tail; as an application of the name ``headtail-<bundle's name>`` it is the one that an
`edge-server --backend ray` of the same bundle uses when it joins the cluster (``deploy/ray/rayservice.yaml``). ``unary`` puts
the unary call `Infer` behind Serve's gRPC proxy, for those who want only Ray: no sessions, no grants, no temporal
prediction, and whatever TLS and authentication the site puts in front.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle

from edge_server.backends import TailWork
from edge_server.backends.ray.bundles import files_of, obtained
from edge_server.backends.ray.imports import ray, serve
from edge_server.backends.ray.packing import Reply, pack_call, unpack_reply
from edge_server.backends.ray.register import open_register
from edge_server.backends.ray.replica import deployment, fetched
from edge_server.config import BatchConfig, Limits, RayConfig, TailConfig
from edge_server.frames.assembly import ArrivedFrame, read_frame
from edge_server.frames.decode import decode_frame
from edge_server.models import locate, open_model
from protos.errors import ConfigError, HeadtailError, OverloadedError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, Result, ServerTimings
from splitters.bundle import Bundle, open_bundle

_DEFAULTS = {"model": "efficientnet-lite0", "replicas": "1", "threads": "1", "max_batch": "16", "cpus": "1", "gpus": "0"}


def _settings(given: dict[str, str]) -> dict[str, str]:
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise ConfigError(f"unknown settings {', '.join(unknown)}; there are {', '.join(_DEFAULTS)}")
    return {**_DEFAULTS, **{k: str(v) for k, v in given.items()}}


def tails(args: dict[str, str]) -> serve.Application:
    """A bundle's tail. Settings: model, replicas (N or MIN:MAX), threads, max_batch, cpus, gpus.

    Raises:
        ConfigError: an unknown setting.
    """
    s = _settings(args)
    fewest, _, most = s["replicas"].partition(":")
    ray_config = RayConfig(
        replicas=(int(fewest), int(most or fewest)), cpus_per_replica=float(s["cpus"]), gpus_per_replica=float(s["gpus"])
    )
    batch, tail = BatchConfig(max_batch=int(s["max_batch"])), TailConfig(threads=int(s["threads"]))
    return deployment(_handed_in(locate(s["model"])), batch, tail, ray_config)


def _handed_in(path: Path) -> Bundle:
    """The bundle, whose files are there for every node of the cluster from now on."""
    bundle = open_bundle(path)
    if ray.is_initialized():  # not where `serve build` only writes a file
        ray.get(open_register().keep.remote(bundle.sha256, files_of(bundle)))
    return bundle


class UnaryDoor:
    """`Infer` and `ListModels` behind Serve's gRPC proxy.

    Args:
        path: the bundle's directory, where this node has it.
        sha256: the bundle.
        tail: its tail.
    """

    async def __init__(self, path: str, sha256: str, tail: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        self._model = open_model((await obtained(path, sha256, fetched)).path)
        self._tail = tail
        self._limits = Limits()

    async def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:  # noqa: N802 - gRPC's name
        """The one model held."""
        del request
        m = self._model
        info = pb.ModelInfo(name=m.name, task=m.bundle.manifest.task, bundle_sha256=m.sha256, device_bytes=m.device_bytes)
        return pb.ListModelsResponse(models=[info], protocol_version=PROTOCOL_VERSION)

    async def Infer(self, request: pb.InferRequest) -> pb.InferResponse:  # noqa: N802
        """One frame, one answer; errors come in the result."""
        begun_ns = time.monotonic_ns()
        frame_id = request.layers[0].frame_id if request.layers else 0
        try:
            result = await self._answer(request, begun_ns)
        except HeadtailError as error:
            result = Result(frame_id=frame_id, error=error)
        return pb.InferResponse(result=result.to_proto())

    async def _answer(self, request: pb.InferRequest, begun_ns: int) -> Result:
        if request.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the client speaks protocol version {request.protocol_version}, this server {PROTOCOL_VERSION}"
            )
        if request.bundle_sha256 != self._model.sha256:
            raise VersionMismatchError(f"the frame was made with another bundle; the server's tail is {self._model.sha256[:12]}")
        frame: ArrivedFrame = read_frame(request, self._limits, begun_ns)
        # In a thread: whoever comes meanwhile has its deadline begin at once.
        decoded = await asyncio.to_thread(decode_frame, self._model, frame, {}, max_pixels=self._limits.max_pixels)
        decoded_ns = time.monotonic_ns()
        work = TailWork(bundle_sha256=self._model.sha256, kind=frame.kind, arrays=decoded.arrays, size_px=frame.size_px)
        remaining_ns = None if frame.deadline_ns is None else frame.deadline_ns - decoded_ns
        if remaining_ns is not None and remaining_ns <= 0:
            raise OverloadedError("the frame's deadline had passed before it was decoded")
        reply: Reply = await self._tail.infer.remote(pack_call(work, str(self._model.bundle.path), remaining_ns))
        answer = unpack_reply(reply)
        now_ns = time.monotonic_ns()
        return Result(
            frame_id=frame.frame_id, answer=answer.answer, layers_decoded=decoded.layers, symbols_crc32=decoded.symbols_crc32,
            echo_sent_ns=frame.echo_sent_ns,
            timings=ServerTimings(
                decode_ns=decoded_ns - begun_ns, queue_ns=max(0, now_ns - decoded_ns - answer.tail_ns), tail_ns=answer.tail_ns,
                total_ns=now_ns - begun_ns, batch_size=answer.batch_size,
            ),
        )  # fmt: skip


def unary(args: dict[str, str]) -> serve.Application:
    """A bundle's tail behind Serve's own gRPC proxy; the settings of `tails`.

    Raises:
        ConfigError: an unknown setting, or Serve runs here without the proxies that this needs.
    """
    _check_proxies()
    path = locate(_settings(args)["model"])
    # A frame's deadline begins when the door has it: what waits before the door is refused at once instead of being answered late.
    door = serve.deployment(
        name="door", max_ongoing_requests=64, max_queued_requests=16, ray_actor_options={"num_cpus": 0.5}
    )(UnaryDoor)  # fmt: skip
    return door.bind(str(path.resolve()), open_bundle(path).sha256, tails(args))


def _check_proxies() -> None:
    """Serve keeps the ways in that it was started with, whatever a file says later: an application would listen nowhere.

    Raises:
        ConfigError: it runs already, without a gRPC proxy for our calls.
    """
    if not ray.is_initialized():
        return
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return  # it is about to start, as the file says
    location: Any
    grpc: Any
    location, grpc = ray.get([controller.get_proxy_location.remote(), controller.get_grpc_config.remote()])
    if location == "Disabled" or not grpc.grpc_servicer_functions:
        raise ConfigError(
            "Serve runs on this cluster without a gRPC proxy for headtail, as edge-server or another program started it: nothing "
            "would listen. Call edge-server instead, or run `serve shutdown` and deploy this file before any edge-server starts"
        )
