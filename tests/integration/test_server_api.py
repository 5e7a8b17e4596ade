"""`edge_server.Server` inside somebody else's program: another event loop, a thread, models that come and go."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from edge_server import Server, ServerConfig, TailConfig
from edge_server.backends.embedded import EmbeddedBackend
from protos.errors import BundleError, DrainingError, InternalError, UnknownModelError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION
from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, hello, opened, picture, session


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "second", name="second", seed=1)


def config(*bundles: Bundle, **fields: Any) -> ServerConfig:
    given = {"listen": "127.0.0.1:0", "tail": TailConfig(threads=1), "grace_s": 5.0, **fields}
    return ServerConfig(models=tuple(str(b.path) for b in bundles), **given)


async def listed(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return [m.name for m in (await pb_grpc.HeadtailStub(channel).ListModels(pb.ListModelsRequest())).models]


async def greeting(address: str, bundle: Bundle, **fields: Any) -> tuple[grpc.StatusCode, str]:
    async with opened(address) as stream:
        await stream.send(hello=hello(bundle.sha256, **fields))
        return await stream.status()


async def test_a_server_starts_empty_and_models_come_and_go(bundle: Bundle, second: Bundle) -> None:
    async with Server.start(config()) as server:
        assert server.models == {}
        assert await greeting(server.address, bundle) == (grpc.StatusCode.NOT_FOUND, "unknown_model")
        assert await server.add(bundle.path) == "tiny"
        assert await server.add(str(second.path)) == "second"
        assert server.models == {"tiny": bundle.sha256, "second": second.sha256}
        assert await listed(server.address) == ["tiny", "second"]
        async with session(server.address, second.sha256, model="second") as stream:
            assert (await stream.frame(Device(second).layers(picture(), 0))).error is None
        await server.remove("tiny")
        assert await listed(server.address) == ["second"]
        assert await greeting(server.address, bundle, model="tiny") == (grpc.StatusCode.NOT_FOUND, "unknown_model")
        for name in ("tiny", "", "nobody"):
            with pytest.raises(UnknownModelError):
                await server.remove(name)
        await server.add(bundle.path)
        async with session(server.address, bundle.sha256, model="tiny") as stream:
            assert (await stream.frame(Device(bundle).layers(picture(), 0))).error is None


async def test_stopping_twice_is_as_once_and_afterwards_nothing_is_taken(bundle: Bundle) -> None:
    server = await Server.start(config(bundle))
    await asyncio.gather(server.stop(), server.stop())
    await server.stop()
    await server.wait()
    with pytest.raises(DrainingError):
        await server.add(bundle.path)
    with pytest.raises(RuntimeError, match="not opened"):
        await Server(config()).remove("tiny")


async def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(BundleError):
        await Server.start(ServerConfig(models=(str(tmp_path / "no" / "bundle"),), listen="127.0.0.1:0"))
    assert not [t.name for t in set(threading.enumerate()) - before if t.name == "tail"]


async def test_a_bad_bundle_or_a_name_that_is_taken_changes_nothing(tmp_path: Path, bundle: Bundle) -> None:
    bad = write_tiny_bundle(tmp_path / "bad", name="bad")
    (bad.path / "server" / "tail.onnx").write_bytes(b"x")
    twin = write_tiny_bundle(tmp_path / "twin", seed=7)
    async with Server.start(config(bundle)) as server:
        for path, words in ((bad.path, "tail.onnx"), (twin.path, "in use already"), (tmp_path, "manifest")):
            with pytest.raises(BundleError, match=words):
                await server.add(path)
        assert server.models == {"tiny": bundle.sha256}
        async with session(server.address, bundle.sha256) as stream:
            assert (await stream.frame(Device(bundle).layers(picture(), 0))).error is None


async def test_a_bundle_that_changed_on_disk_is_added_again(tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "tiny", seed=1)
    async with Server.start(config(old)) as server, session(server.address, old.sha256) as stream:
        new = write_tiny_bundle(tmp_path / "tiny", seed=2)
        # The same directory by another way.
        (tmp_path / "link").symlink_to(old.path)
        assert await server.add(tmp_path / "link") == "tiny"
        assert (await stream.expect("bundle_changed")).bundle_sha256 == new.sha256
        assert server.models == {"tiny": new.sha256}


async def test_sessions_on_a_removed_model_are_told_and_answered(
    bundle: Bundle, second: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, other, holding = Device(bundle), Device(second), threading.Event()
    run = EmbeddedBackend._answer

    def held(self: EmbeddedBackend, waiting: list[Any]) -> Any:
        holding.wait(20)
        return run(self, waiting)

    monkeypatch.setattr(EmbeddedBackend, "_answer", held)
    async with (
        Server.start(config(bundle, second)) as server,
        session(server.address, bundle.sha256, model="tiny") as stream,
        session(server.address, second.sha256, model="second") as neighbour,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for layer in device.layers(picture(), 0):
            await stream.send(layer=layer)
        layers = device.layers(picture(), 0)
        request = pb.InferRequest(protocol_version=PROTOCOL_VERSION, model="tiny", bundle_sha256=bundle.sha256, layers=layers)
        unary = asyncio.ensure_future(pb_grpc.HeadtailStub(channel).Infer(request))
        async with asyncio.timeout(20):
            while not server.counts["calls"]:
                await asyncio.sleep(0.01)
        removing = asyncio.create_task(server.remove("tiny"))
        assert (await stream.expect("draining")).grace_ns == 5_000_000_000
        for layer in device.layers(picture(), 1):
            await stream.send(layer=layer)
        refused = await stream.result()
        assert (refused.frame_id, refused.error and refused.error.code) == (1, "draining")
        assert "taken out of use" in str(refused.error)
        holding.set()
        assert (await stream.result()).error is None, "the frame that was under way is answered"
        assert (await unary).result.error.code == ""
        assert await stream.status() == (grpc.StatusCode.NOT_FOUND, "unknown_model")
        await removing
        assert (await neighbour.frame(other.layers(picture(), 0))).error is None, "others notice nothing"


async def test_a_caller_that_leaves_does_not_leave_a_model_half_removed(bundle: Bundle) -> None:
    async with Server.start(config(bundle)) as server, session(server.address, bundle.sha256) as stream:
        removing = asyncio.create_task(server.remove("tiny"))
        await stream.expect("draining")
        removing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await removing
        assert await stream.status() == (grpc.StatusCode.NOT_FOUND, "unknown_model")
        assert isinstance(server._backend, EmbeddedBackend)
        async with asyncio.timeout(20):
            while server._backend._tails:
                await asyncio.sleep(0.01)
        await server.add(bundle.path)
        async with session(server.address, bundle.sha256) as again:
            assert (await again.frame(Device(bundle).layers(picture(), 0))).error is None


async def test_a_part_that_dies_ends_the_server_and_the_block_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> None:
        raise MemoryError("as if")

    monkeypatch.setattr(EmbeddedBackend, "_remember", dies)

    async def block() -> None:
        async with Server.start(config(bundle)) as server, session(server.address, bundle.sha256) as stream:
            await stream.frame(Device(bundle).layers(picture(), 0))
            await server.ending.wait()

    with pytest.raises(InternalError, match="the tail's thread has died"):
        await block()


def test_a_thread_with_a_loop_of_its_own_serves_and_leaves_signals_alone(bundle: Bundle) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    up, failures = threading.Event(), []
    found: dict[str, Any] = {}

    async def serve() -> None:
        async with Server.start(config(bundle)) as server:
            found.update(server=server, loop=asyncio.get_running_loop())
            up.set()
            await server.wait()

    def live() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=live)
    thread.start()
    assert up.wait(60)
    assert not failures
    with grpc.insecure_channel(found["server"].address) as channel:
        assert [m.name for m in pb_grpc.HeadtailStub(channel).ListModels(pb.ListModelsRequest(), timeout=20).models] == ["tiny"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    found["loop"].call_soon_threadsafe(found["server"].stop_soon)
    thread.join(30)
    assert not thread.is_alive()
    assert not failures


async def test_stop_during_the_start_ends_it_with_a_plain_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def forever(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(EmbeddedBackend, "load", forever)
    server = Server(config(bundle))
    opening = asyncio.create_task(server.open())
    await asyncio.wait_for(begun.wait(), 30)
    await server.stop()
    with pytest.raises(DrainingError, match="before its start was complete"):
        await opening


def test_the_package_gives_its_api_without_importing_torch() -> None:
    code = "import sys, edge_server; edge_server.ServerConfig(); assert not {'torch', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
