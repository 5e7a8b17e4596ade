"""The Open Inference Protocol: the same tails for clients that speak KServe's and Triton's gRPC.

Inputs are either the latents (``latent_0`` …, FP32, batch first) or the model's own input as pixels (``image``, UINT8,
(N, h, w, 3) RGB, resized and cropped as the manifest says). Outputs are answers, not logits: ``class_ids`` INT64 (N, K) and
``scores`` FP32 (N, K), best first; for detectors also ``boxes`` FP32 (N, K, 4), xyxy pixels of a source frame whose size the
request's parameters ``source_width`` and ``source_height`` give (default: the model's input), padded with class -1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from edge_server.backends import TailWork
from edge_server.ingress import Ingress, trace_of
from edge_server.models import Model
from edge_server.status import translated
from edge_server.wire import checked
from protos.errors import HeadtailError, LimitError, ProtocolError
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.messages import MAX_SIDE_PX, PayloadKind, Result, ServerTimings
from splitters.tasks.base import open_task

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_BATCH = 256
_DATATYPES: Mapping[str, str] = {
    "bool": "BOOL",
    **{f"{kind}{n}": f"{name}{n}" for kind, name in (("int", "INT"), ("uint", "UINT"), ("float", "FP")) for n in (8, 16, 32, 64)},
}
_TYPES: Mapping[str, tuple[np.dtype[Any], str]] = {
    "FP32": (np.dtype("<f4"), "fp32_contents"),
    "UINT8": (np.dtype("u1"), "uint_contents"),
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
        """Whether a model is held."""
        async with translated(context, self._s.metrics.on_refused):
            held = {m.name for m in self._s.store.all()}
            return oip.ModelReadyResponse(ready=checked(request).name in held and not self._ingress.draining)
        raise AssertionError  # translated() has ended the call

    async def ServerMetadata(self, request: Any, context: Context) -> oip.ServerMetadataResponse:  # noqa: N802
        """Name and version."""
        del request, context
        return oip.ServerMetadataResponse(name="headtail", version=self._s.version)

    async def ModelMetadata(self, request: Any, context: Context) -> oip.ModelMetadataResponse:  # noqa: N802
        """Inputs and outputs; of `image` and the latents a request gives one."""
        async with translated(context, self._s.metrics.on_refused):
            model = self._s.store.get(checked(request).name)
            manifest = model.bundle.manifest
            tensor = oip.ModelMetadataResponse.TensorMetadata
            inputs = [tensor(name=n, datatype=t, shape=[-1, *s]) for n, (t, s) in _inputs(model).items()]
            signature = open_task(manifest).signature()
            outputs = [tensor(name=n, datatype=_DATATYPES[t], shape=[-1, *s[1:]]) for n, (t, s) in signature.items()]
            return oip.ModelMetadataResponse(
                name=model.name, versions=[model.sha256[:12]], platform="headtail", inputs=inputs, outputs=outputs
            )
        raise AssertionError  # translated() has ended the call

    async def ModelInfer(self, request: Any, context: Context) -> oip.ModelInferResponse:  # noqa: N802
        """A batch of frames; each is queued by itself and batched with everyone's."""
        async with translated(context, self._s.metrics.on_refused), self._ingress.call():
            return await self._infer(checked(request), context)
        raise AssertionError  # translated() has ended the call

    async def _infer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:
        model = self._s.store.get(request.model_name)
        if request.model_version and not model.sha256.startswith(request.model_version):
            raise ProtocolError(f"version {request.model_version[:64]!r} is not held; {model.name!r} is {model.sha256[:12]}")
        arrays = _read(request, model)
        kind = PayloadKind.IMAGE if "image" in arrays else PayloadKind.LATENT
        tensors = [arrays["image"][..., ::-1]] if kind is PayloadKind.IMAGE else list(arrays.values())
        size_px = _source_size(request, model)
        now_ns, left_s = self._s.clock(), context.time_remaining()
        deadline_ns = None if left_s is None else now_ns + int(left_s * 1e9)
        client, works = self._ingress.client, []
        for row in range(len(tensors[0])):
            frame = [np.ascontiguousarray(tensor[row]) for tensor in tensors]
            if (refusal := client.admit_frame(sum(a.nbytes for a in frame), now_ns)) is not None:
                raise refusal
            works.append(TailWork(bundle_sha256=model.sha256, kind=kind, arrays=frame, size_px=size_px, deadline_ns=deadline_ns))
        with client.unary_frames(len(works) - 1):  # the call itself counts as one
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
        outputs = open_task(model.bundle.manifest).arrays([each.answer for each in answers])
        return _respond(request, model, outputs)


def _inputs(model: Model) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (datatype, shape without the batch axis); the picture only where the bundle may have a whole model."""
    manifest = model.bundle.manifest
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    if manifest.tail.get("kind") != "onnx" or "whole" in manifest.tail:
        found["image"] = ("UINT8", (*manifest.preprocess.size_px, 3))
    return found | {f"latent_{i}": ("FP32", shape) for i, shape in enumerate(manifest.latent_shape)}


def _read(request: oip.ModelInferRequest, model: Model) -> dict[str, NDArray[Any]]:
    """The request's tensors, checked against the model before any is built."""
    known = _inputs(model)
    latents = [name for name in known if name != "image"]
    names = [tensor.name for tensor in request.inputs]
    if names != ["image"] and sorted(names) != sorted(latents):
        raise ProtocolError(f"give either image or {', '.join(latents)}; the request has {', '.join(names)[:200] or 'no input'}")
    raw = request.raw_input_contents
    if raw and len(raw) != len(names):
        raise ProtocolError(f"{len(raw)} raw contents came for {len(names)} inputs")
    batch = request.inputs[0].shape[0] if request.inputs[0].shape else 0
    if not 1 <= batch <= _MAX_BATCH:
        raise LimitError(f"a batch has 1..{_MAX_BATCH} frames, got {batch}")
    found = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name not in known:
            raise ProtocolError(f"{model.name!r} has no input {tensor.name[:64]!r}")
        datatype, shape = known[tensor.name]
        # The first few only: a shape of millions of dimensions fits into a message, and takes seconds to write out.
        given = tuple(tensor.shape[: len(shape) + 2])
        if tensor.datatype != datatype or given != (batch, *shape):
            raise ProtocolError(f"input {tensor.name!r} must be {datatype} {(batch, *shape)}, got {tensor.datatype[:16]} {given}")
        found[tensor.name] = _array(tensor, raw[index] if raw else None, datatype, (batch, *shape))
    return {name: found[name] for name in known if name in found}


def _array(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None, datatype: str, shape: Sequence[int]) -> NDArray[Any]:
    dtype, field = _TYPES[datatype]
    count = int(np.prod(shape))
    values = raw if raw is not None else getattr(tensor.contents, field)
    if len(values) != (count * dtype.itemsize if raw is not None else count):
        raise ProtocolError(f"input {tensor.name!r} has {len(values)} values or bytes, which is not {tuple(shape)} of {datatype}")
    if raw is None and datatype == "UINT8" and max(values, default=0) > 255:
        raise ProtocolError(f"input {tensor.name!r} holds values above 255")
    array: NDArray[Any] = np.frombuffer(raw, dtype) if raw is not None else np.array(values, dtype)
    if datatype == "FP32" and not np.isfinite(array).all():
        raise ProtocolError(f"input {tensor.name!r} holds numbers that are not finite")
    return array.reshape(shape)


def _source_size(request: oip.ModelInferRequest, model: Model) -> tuple[int, int]:
    height, width = model.bundle.manifest.preprocess.size_px
    given = {name: request.parameters[name].int64_param for name in ("source_width", "source_height") if name in request.parameters}
    size = given.get("source_width", width), given.get("source_height", height)
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise ProtocolError(f"source_width and source_height must be 1..{MAX_SIDE_PX} pixels")
    return size


def _respond(request: oip.ModelInferRequest, model: Model, outputs: dict[str, NDArray[Any]]) -> oip.ModelInferResponse:
    wanted = [output.name for output in request.outputs] or list(outputs)
    for name in wanted:
        if name not in outputs:
            raise ProtocolError(f"{model.name!r} has no output {name[:64]!r}; it has {', '.join(outputs)}")
    tensor = oip.ModelInferResponse.InferOutputTensor
    return oip.ModelInferResponse(
        model_name=model.name, model_version=model.sha256[:12], id=request.id,
        outputs=[tensor(name=n, datatype=_DATATYPES[outputs[n].dtype.name], shape=outputs[n].shape) for n in wanted],
        raw_output_contents=[outputs[n].tobytes() for n in wanted],
    )  # fmt: skip
