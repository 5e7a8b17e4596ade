"""The Open Inference Protocol, by our own stubs and by tritonclient in an environment of its own."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from edge_server.server import Server
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.headtail.v1 import open_inference_pb2_grpc as oip_grpc
from splitters.bundle import Bundle
from splitters.tasks.preprocess import input_image
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import running

ROOT = Path(__file__).parents[2]
TRITON = Path(os.environ.get("HEADTAIL_TRITON_PYTHON", ROOT / ".venvs" / "triton" / "bin" / "python"))


@pytest.fixture(scope="module")
async def server(bundle: Bundle) -> AsyncIterator[Server]:
    async with running(bundle.path) as server:
        yield server


@pytest.fixture(scope="module")
async def stub(server: Server) -> AsyncIterator[oip_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


def request(**arrays: np.ndarray) -> oip.ModelInferRequest:
    types = {np.dtype("float32"): "FP32", np.dtype("uint8"): "UINT8", np.dtype("float64"): "FP64"}
    tensor = oip.ModelInferRequest.InferInputTensor
    return oip.ModelInferRequest(
        model_name="tiny", id="7", inputs=[tensor(name=n, datatype=types[a.dtype], shape=a.shape) for n, a in arrays.items()],
        raw_input_contents=[a.tobytes() for a in arrays.values()],
    )  # fmt: skip


def pixels(bundle: Bundle, seed: int) -> np.ndarray:
    return np.ascontiguousarray(input_image(picture(seed), bundle.manifest.preprocess)[..., ::-1])[None]


async def streamed(server: Server, bundle: Bundle, seed: int) -> list[int]:
    async with session(server.address, bundle.sha256) as stream:
        result = await stream.frame(Device(bundle).layers(picture(seed), 0))
    return [score.class_id for score in result.answer.top]


async def test_a_batch_of_latents_and_of_pixels_is_answered(
    stub: oip_grpc.GRPCInferenceServiceStub, server: Server, bundle: Bundle
) -> None:
    device = Device(bundle)
    latents = np.stack([device.latents(picture(i))[0] for i in range(3)])
    answer = await stub.ModelInfer(request(latent_0=latents))
    assert (answer.model_name, answer.id) == ("tiny", "7")
    by_name = dict(zip([o.name for o in answer.outputs], answer.raw_output_contents, strict=True))
    ids = np.frombuffer(by_name["class_ids"], "<i8").reshape(tuple(answer.outputs[0].shape))
    assert ids.shape == (3, 5)
    assert [row[0] for row in ids.tolist()] == [(await streamed(server, bundle, i))[0] for i in range(3)]
    images = np.concatenate([pixels(bundle, i) for i in range(3)])
    answer = await stub.ModelInfer(request(image=images))
    again = np.frombuffer(answer.raw_output_contents[0], "<i8").reshape(3, 5)
    assert (again[:, 0] == ids[:, 0]).all()


async def test_typed_contents_are_read_as_well(stub: oip_grpc.GRPCInferenceServiceStub, bundle: Bundle) -> None:
    image = pixels(bundle, 1)
    raw = await stub.ModelInfer(request(image=image))
    typed = request(image=image)
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.uint_contents.extend(image.ravel().tolist())
    assert (await stub.ModelInfer(typed)).raw_output_contents == raw.raw_output_contents


@pytest.mark.parametrize(
    "bad",
    [
        request(image=np.zeros((1, 2, 2, 3), np.uint8)),
        request(image=np.zeros((1, 32, 32, 3), np.float32)),
        request(latent_0=np.full((1, 4, 8, 8), np.nan, np.float32)),
        request(latent_0=np.zeros((1, 4, 8, 8), np.float32), image=np.zeros((1, 32, 32, 3), np.uint8)),
        request(other=np.zeros((1,), np.uint8)),
        request(image=np.zeros((0, 32, 32, 3), np.uint8)),
        oip.ModelInferRequest(model_name="tiny"),
        oip.ModelInferRequest(model_name="nope"),
        oip.ModelInferRequest(model_name="tiny", raw_input_contents=[b"x"]),
    ],
)
async def test_what_does_not_fit_is_a_mapped_error(stub: oip_grpc.GRPCInferenceServiceStub, bad: oip.ModelInferRequest) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(bad)
    assert caught.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED")
    assert dict(caught.value.trailing_metadata())["headtail-code"]


async def test_the_version_is_checked_in_every_call(stub: oip_grpc.GRPCInferenceServiceStub, bundle: Bundle) -> None:
    held = (await stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))).versions[0]
    for version in ("", held, bundle.sha256):
        assert (await stub.ModelReady(oip.ModelReadyRequest(name="tiny", version=version))).ready
        assert (await stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny", version=version))).versions == [held]
        asked = request(image=pixels(bundle, 0))
        asked.model_version = version
        assert (await stub.ModelInfer(asked)).model_version == held
    for version in ("99", held[:1], held[:11], bundle.sha256 + "0"):
        assert not (await stub.ModelReady(oip.ModelReadyRequest(name="tiny", version=version))).ready
        asked = request(image=pixels(bundle, 0))
        asked.model_version = version
        for call in (stub.ModelMetadata(oip.ModelMetadataRequest(name="tiny", version=version)), stub.ModelInfer(asked)):
            with pytest.raises(grpc.aio.AioRpcError, match="is not held"):
                await call


async def test_outputs_that_do_not_exist_are_refused_before_anything_runs(
    stub: oip_grpc.GRPCInferenceServiceStub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(image=pixels(bundle, 0))
    asked.outputs.add(name="logits")
    monkeypatch.setattr("edge_server.doors.open_inference.read_values", lambda *_: pytest.fail("its values were looked at"))
    with pytest.raises(grpc.aio.AioRpcError, match="no output 'logits'; it has class_ids, scores"):
        await stub.ModelInfer(asked)


async def test_a_shape_of_very_many_dimensions_is_not_written_out(stub: oip_grpc.GRPCInferenceServiceStub) -> None:
    bad = request(image=np.zeros((1, 32, 32, 3), np.uint8))
    bad.inputs[0].shape.extend([1] * 1_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(bad)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "(1, 32, 32, 3, 1)" in (caught.value.details() or "")


async def test_tritonclient_agrees_with_our_own_stream(server: Server, bundle: Bundle, tmp_path: Path) -> None:
    if not TRITON.exists():
        pytest.skip(f"no tritonclient at {TRITON}: make test makes it")
    np.save(tmp_path / "pixels.npy", pixels(bundle, 4))
    np.save(tmp_path / "latent.npy", Device(bundle).latents(picture(4))[0][None])
    process = await asyncio.create_subprocess_exec(
        str(TRITON), str(ROOT / "tests" / "fakes" / "triton_probe.py"), server.address, "tiny", str(tmp_path / "pixels.npy"),
        str(tmp_path / "latent.npy"), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(out.splitlines()[-1])
    assert (found["live"], found["ready"], found["model_ready"], found["unknown_ready"]) == (True, True, True, False)
    assert found["inputs"] == ["image", "latent_0"]
    wanted = await streamed(server, bundle, 4)
    for name in ("image", "latent_0"):
        assert found[name]["class_ids"][0][0] == wanted[0]
    assert "INVALID_ARGUMENT" in found["wrong_shape"]
