"""Every task through the Open Inference Protocol: pixels and latents are answered as the bundle answers in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cv2
import grpc
import grpc.aio
import numpy as np
import pytest

from edge_server.server import Server
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.headtail.v1 import open_inference_pb2_grpc as oip_grpc
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.runtime.pictures import shipped_pictures
from splitters.runtime.tail import load_tail
from splitters.runtime.whole import BundleModel
from splitters.tasks.base import open_task
from splitters.tasks.preprocess import input_image
from tests.fakes import input_models
from tests.fakes.onnx_models import classifier, detector, maps
from tests.fakes.server_running import running

Array = np.ndarray[Any, Any]
MADE: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "classification": (classifier, ()),
    "detection": (detector, ()),
    "keypoints": (lambda path: detector(path, task="pose"), ()),
    "oriented": (lambda path: detector(path, task="obb"), ()),
    "instances": (lambda path: detector(path, task="segment"), ()),
    "segmentation": (maps, ("--output", "segmentation")),
    "embedding": (classifier, ("--output", "embedding")),
    "tensors": (lambda path: detector(path, task="segment"), ("--output", "tensors")),
    "flow": (input_models.flow, ("--output", "tensors")),
}
TYPES = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}


@pytest.fixture(scope="module")
def photos() -> list[Array]:
    return [cv2.resize(p, (80, 60)) for p in shipped_pictures()[:3]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, photos: list[Array]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "photos").mkdir()
    for number, photo in enumerate(photos):
        cv2.imwrite(str(folder / "photos" / f"{number}.png"), photo)
    for name, (make, options) in MADE.items():
        given = ["cut", f"onnx:{make(folder / f'{name}.onnx')}", "--out", str(folder / name), "--name", name]
        assert main([*given, "--photos", str(folder / "photos"), "--allow-nothing-found", *options]) == 0
    return {name: folder / name for name in MADE}


@pytest.fixture(scope="module")
async def server(bundles: dict[str, Path]) -> AsyncIterator[Server]:
    async with running(*bundles.values()) as server:
        yield server


@pytest.fixture(scope="module")
async def stub(server: Server) -> AsyncIterator[oip_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


async def asked(stub: oip_grpc.GRPCInferenceServiceStub, name: str, **arrays: Array) -> dict[str, Array]:
    """The outputs, by name, as the types they are said to be."""
    tensor = oip.ModelInferRequest.InferInputTensor
    types = {np.dtype(t): n for n, t in TYPES.items()}
    given = oip.ModelInferRequest(
        model_name=name,
        inputs=[tensor(name=n, datatype=types[a.dtype], shape=a.shape) for n, a in arrays.items()],
        raw_input_contents=[np.ascontiguousarray(a).tobytes() for a in arrays.values()],
    )
    for side, value in (("source_width", 80), ("source_height", 60)):
        given.parameters[side].int64_param = value
    found = await stub.ModelInfer(given)
    return {
        o.name: np.frombuffer(raw, TYPES[o.datatype]).reshape(tuple(o.shape))
        for o, raw in zip(found.outputs, found.raw_output_contents, strict=True)
    }


def close(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert np.allclose(got[name], array, rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(array).max(initial=0))))


@pytest.mark.parametrize("name", MADE)
async def test_latents_and_pixels_of_every_task_are_answered(
    name: str, stub: oip_grpc.GRPCInferenceServiceStub, bundles: dict[str, Path], photos: list[Array]
) -> None:
    bundle = open_bundle(bundles[name])
    assert bundle.manifest.task == ("tensors" if name == "flow" else name)
    model, task = BundleModel(bundle), open_task(bundle.manifest)
    tail = load_tail(bundle)
    told = await stub.ModelMetadata(oip.ModelMetadataRequest(name=name))
    latents = [model.latents(photo) for photo in photos]
    wanted = task.arrays([tail.run([tensor[None] for tensor in each], [(80, 60)])[0] for each in latents])
    got = await asked(stub, name, **{f"latent_{i}": np.stack(each) for i, each in enumerate(zip(*latents, strict=True))})
    close(got, wanted)
    assert [o.name for o in told.outputs] == list(wanted)
    assert {o.name: TYPES[o.datatype] for o in told.outputs} == {n: a.dtype for n, a in wanted.items()}
    if name == "detection":
        assert (wanted["class_ids"] >= 0).any(), "an answer that says something"
    pixels = np.stack([input_image(photo, bundle.manifest.preprocess)[..., ::-1] for photo in photos])
    if name == "flow":
        assert [i.name for i in told.inputs] == [f"latent_{i}" for i in range(len(latents[0]))]
        with pytest.raises(grpc.aio.AioRpcError, match=r"no input 'image'|give"):
            await asked(stub, name, image=pixels)
        return
    assert told.inputs[0].name == "image"
    close(await asked(stub, name, image=pixels), wanted)


def test_raw_outputs_have_the_models_own_names(bundles: dict[str, Path]) -> None:
    import onnx

    manifest = open_bundle(bundles["tensors"]).manifest
    file = onnx.load(str(bundles["tensors"]) + ".onnx")
    assert list(open_task(manifest).signature()) == [o.name for o in file.graph.output]
