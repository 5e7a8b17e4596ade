"""The Open Inference Protocol: the same tails for clients that speak KServe's and Triton's gRPC.

Inputs are either the latents (``latent_0`` …, FP32, batch first) or the model's own input as pixels (``image``, UINT8,
(N, h, w, 3) RGB, resized and cropped as the manifest says). Outputs are answers, not logits: ``class_ids`` INT64 (N, K) and
``scores`` FP32 (N, K), best first; for detectors also ``boxes`` FP32 (N, K, 4), xyxy pixels of a source frame whose size the
request's parameters ``source_width`` and ``source_height`` give (default: the model's input), padded with class -1. Every
other task gives its own arrays, ``tensors`` the model's outputs by their own names; `ModelMetadata` lists them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from edge_server.access.quota import Caller
from edge_server.backends import TailWork
from edge_server.doors.grpc import Ingress, trace_of
from edge_server.doors.session import host_of
from edge_server.doors.tensors import Request, read_request, read_values
from edge_server.doors.wire import checked
from edge_server.models import Model
from edge_server.status import translated
from protos.errors import HeadtailError, LimitError, ProtocolError, UnknownModelError, VersionMismatchError
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.messages import MAX_SIDE_PX, PayloadKind, Result, ServerTimings
from splitters.tasks.base import open_task

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_BATCH = 256
_DATATYPES: Mapping[str, str] = {
    "bool": "BOOL",
    **{f"{kind}{n}": f"{name}{n}" for kind, name in (("int", "INT"), ("uint", "UINT"), ("float", "FP")) for n in (8, 16, 32, 64)},
}


class OpenInference:
    """The protocol's calls on an ingress's models.

    Args:
        ingress: whose models, backend and shutdown.
    """

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress
        self._s = ingress.services

    async def ServerLive(self, request: Any, context: Context) -> oip.ServerLiveResponse:  # noqa: N802 - the protocol's names
        """Whether the process answers."""
        del request, context
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> oip.ServerReadyResponse:  # noqa: N802
        """Whether it takes work."""
        del request, context
        return oip.ServerReadyResponse(ready=not self._ingress.draining)

    async def ModelReady(self, request: Any, context: Context) -> oip.ModelReadyResponse:  # noqa: N802
        """Whether a model is held, in the version asked for."""
        async with translated(context, self._s.metrics.on_refused):
            try:
                self._model(checked(request).name, request.version)
            except (UnknownModelError, VersionMismatchError):
                return oip.ModelReadyResponse(ready=False)
            return oip.ModelReadyResponse(ready=bool(request.name) and not self._ingress.draining)
        raise AssertionError  # translated() has ended the call

    def _model(self, name: str, version: str) -> Model:
        """The model of that name, in that version where one is given: the first twelve digits of its hash, or all of them.

        Raises:
            UnknownModelError: no such model is held.
            VersionMismatchError: another version of it is.
        """
        model = self._s.store.get(name)
        if version and version not in (_version(model), model.sha256):
            raise VersionMismatchError(f"version {version[:64]!r} is not held; {model.name!r} is {_version(model)}")
        return model

    async def ServerMetadata(self, request: Any, context: Context) -> oip.ServerMetadataResponse:  # noqa: N802
        """Name and version."""
        del request, context
        return oip.ServerMetadataResponse(name="headtail", version=self._s.version)

    async def ModelMetadata(self, request: Any, context: Context) -> oip.ModelMetadataResponse:  # noqa: N802
        """Inputs and outputs; of `image` and the latents a request gives one."""
        async with translated(context, self._s.metrics.on_refused):
            model = self._model(checked(request).name, request.version)
            manifest = model.bundle.manifest
            tensor = oip.ModelMetadataResponse.TensorMetadata
            inputs = [tensor(name=n, datatype=t, shape=[-1, *s]) for n, (t, s) in _inputs(model).items()]
            signature = open_task(manifest).signature()
            outputs = [tensor(name=n, datatype=_DATATYPES[t], shape=[-1, *s[1:]]) for n, (t, s) in signature.items()]
            return oip.ModelMetadataResponse(
                name=model.name, versions=[_version(model)], platform="headtail", inputs=inputs, outputs=outputs
            )
        raise AssertionError  # translated() has ended the call

    async def ModelInfer(self, request: bytes, context: Context) -> oip.ModelInferResponse:  # noqa: N802
        """A batch of frames; each is queued by itself and batched with everyone's."""
        async with translated(context, self._s.metrics.on_refused), self._ingress.call():
            client = self._ingress.client
            who = client.name or host_of(context)
            with self._s.answerer.pending(who, len(request)):
                await asyncio.sleep(self._s.pace.wait_s(who, len(request), self._s.clock()))
                return await self._infer(request, context, client, who)
        raise AssertionError  # translated() has ended the call

    async def _infer(self, data: bytes, context: Context, client: Caller, who: str) -> oip.ModelInferResponse:
        """Admission first, by what the request weighs and says of itself; its values are looked at in a thread."""
        now_ns, left_s = self._s.clock(), context.time_remaining()
        deadline_ns = None if left_s is None else now_ns + int(left_s * 1e9)
        if (refusal := client.admit_frame(len(data), now_ns, frames=0)) is not None:
            raise refusal
        pool = self._s.answerer.pool
        request = await pool.run(who, functools.partial(read_request, data))
        said = request.said
        model = self._model(said.model_name, said.model_version)
        batch = _checked_inputs(request, model)
        size_px = _source_size(said, model)
        wanted = _wanted(said, model)
        if (refusal := client.admit_frame(0, now_ns, frames=batch)) is not None:
            raise refusal
        with self._s.store.hold(model), client.unary_frames(batch - 1):  # the call itself counts as one
            kind, frames = await pool.run(who, functools.partial(_frames, request, model, batch))
            works = [
                TailWork(bundle_sha256=model.sha256, kind=kind, arrays=f, size_px=size_px, deadline_ns=deadline_ns, client=who)
                for f in frames
            ]
            done = await asyncio.gather(*(self._s.backend.run(work) for work in works), return_exceptions=True)
        for each in done:
            if isinstance(each, BaseException):
                raise each if isinstance(each, HeadtailError) else RuntimeError("a frame failed") from each
        answers = [each for each in done if not isinstance(each, BaseException)]
        trace, total_ns = trace_of(context), self._s.clock() - now_ns
        for row, each in enumerate(answers):
            timings = ServerTimings(queue_ns=each.queue_ns, tail_ns=each.tail_ns, total_ns=total_ns, batch_size=each.batch_size)
            result = Result(frame_id=row, answer=each.answer, timings=timings)
            self._s.metrics.on_result(model.name, result, sum(a.nbytes for a in works[row].arrays))
            self._s.tracing.on_result(model.name, trace, result)
        return _respond(said, model, open_task(model.bundle.manifest).arrays([each.answer for each in answers]), wanted)


def _version(model: Model) -> str:
    return model.sha256[:12]


def _inputs(model: Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (datatype, shape without the batch axis); the picture only where the bundle may have a whole model."""
    manifest = model.bundle.manifest
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    if manifest.tail.get("kind") != "onnx" or "whole" in manifest.tail:
        found["image"] = ("UINT8", (*manifest.preprocess.size_px, 3))
    return found | {f"latent_{i}": ("FP32", shape) for i, shape in enumerate(manifest.latent_shape)}


def _checked_inputs(request: Request, model: Model) -> int:
    """How many frames the request has; its tensors are checked against the model by what they say of themselves.

    Raises:
        ProtocolError: they are not the model's inputs.
        LimitError: too many frames.
    """
    known, inputs = _inputs(model), request.said.inputs
    latents = [name for name in known if name != "image"]
    names = [tensor.name for tensor in inputs]
    if names != ["image"] and sorted(names) != sorted(latents):
        raise ProtocolError(f"give either image or {', '.join(latents)}; the request has {', '.join(names)[:200] or 'no input'}")
    if request.raw and len(request.raw) != len(names):
        raise ProtocolError(f"{len(request.raw)} raw contents came for {len(names)} inputs")
    batch = inputs[0].shape[0] if inputs[0].shape else 0
    if not 1 <= batch <= _MAX_BATCH:
        raise LimitError(f"a batch has 1..{_MAX_BATCH} frames, got {batch}")
    for tensor in inputs:
        if tensor.name not in known:
            raise ProtocolError(f"{model.name!r} has no input {tensor.name[:64]!r}")
        datatype, shape = known[tensor.name]
        # The first few only: a shape of millions of dimensions fits into a message, and takes seconds to write out.
        given = tuple(tensor.shape[: len(shape) + 2])
        if tensor.datatype != datatype or given != (batch, *shape):
            raise ProtocolError(f"input {tensor.name!r} must be {datatype} {(batch, *shape)}, got {tensor.datatype[:16]} {given}")
    return batch


def _frames(request: Request, model: Model, batch: int) -> tuple[PayloadKind, list[list[NDArray[Any]]]]:
    """The arrays of each frame, as the tail takes them; in a thread, since it looks at every value."""
    known = _inputs(model)
    found = {
        tensor.name: read_values(request, index, known[tensor.name][0], (batch, *known[tensor.name][1]))
        for index, tensor in enumerate(request.said.inputs)
    }
    kind = PayloadKind.IMAGE if "image" in found else PayloadKind.LATENT
    tensors = [found["image"][..., ::-1]] if kind is PayloadKind.IMAGE else [found[name] for name in known if name in found]
    return kind, [[np.ascontiguousarray(tensor[row]) for tensor in tensors] for row in range(batch)]


def _source_size(request: oip.ModelInferRequest, model: Model) -> tuple[int, int]:
    height, width = model.bundle.manifest.preprocess.size_px
    given = {name: request.parameters[name].int64_param for name in ("source_width", "source_height") if name in request.parameters}
    size = given.get("source_width", width), given.get("source_height", height)
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise ProtocolError(f"source_width and source_height must be 1..{MAX_SIDE_PX} pixels")
    return size


def _wanted(request: oip.ModelInferRequest, model: Model) -> list[str]:
    """The outputs asked for; empty: all.

    Raises:
        ProtocolError: the model has no such output.
    """
    known = open_task(model.bundle.manifest).signature()
    wanted = [output.name for output in request.outputs]
    for name in wanted:
        if known and name not in known:
            raise ProtocolError(f"{model.name!r} has no output {name[:64]!r}; it has {', '.join(known)}")
    return wanted


def _respond(
    request: oip.ModelInferRequest, model: Model, outputs: dict[str, NDArray[Any]], wanted: Sequence[str]
) -> oip.ModelInferResponse:
    names = wanted or list(outputs)
    if missing := [name for name in names if name not in outputs]:
        raise ProtocolError(f"{model.name!r} has no output {missing[0][:64]!r}; it has {', '.join(outputs)}")
    tensor = oip.ModelInferResponse.InferOutputTensor
    return oip.ModelInferResponse(
        model_name=model.name, model_version=_version(model), id=request.id,
        outputs=[tensor(name=n, datatype=_DATATYPES[outputs[n].dtype.name], shape=outputs[n].shape) for n in names],
        raw_output_contents=[outputs[n].tobytes() for n in names],
    )  # fmt: skip
