"""Traces: device and server in one, and nothing at all where they are not asked for."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.observe.tracing import Traces as ClientTraces
from edge_server.observe.tracing import Traces as ServerTraces
from protos.errors import ConfigError, OverloadedError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.headtail.v1 import open_inference_pb2_grpc as oip_grpc
from protos.messages import PROTOCOL_VERSION, Result
from protos.tracing import LEFT_OUT, Spans, open_spans, wanted
from splitters.bundle import Bundle
from tests.fakes.client_process import run_client, write_photos
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, environment, running

sdk = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="pip install 'headtail[otel]'")

MS = 1_000_000
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Memory:
    """Spans as they are finished."""

    def __init__(self, service: str) -> None:
        self.exporter = sdk.InMemorySpanExporter()
        self.spans = Spans(service, "0", self.exporter, at_once=True)

    def finished(self) -> dict[str, Any]:
        """By name; the newest of each."""
        return {span.name: span for span in self.exporter.get_finished_spans()}


def captured(index: int, *, at_ns: int) -> CapturedFrame:
    return CapturedFrame(index=index, image=None, captured_ns=0, captured_unix_ns=at_ns, width_px=48, height_px=40)


STAGES = {"capture": 2.0, "preprocess": 1.0, "head": 5.0, "codec": 1.0, "network": 20.0, "total": 40.0}


def report(frame: CapturedFrame, outcome: Outcome = Outcome.RESULT, **fields: Any) -> FrameReport:
    base = {"model": "tiny", "bundle_sha256": "a" * 64, "stages_ms": STAGES, "payload_bytes": 170, "operating_point": 3}
    return FrameReport(frame=frame, outcome=outcome, **{**base, **fields})


# ---------------------------------------------------------------- one trace


async def test_a_frames_stages_on_both_sides_are_one_trace(bundle: Bundle) -> None:
    device_side, server_side = Memory("headtail-client"), Memory("headtail-server")
    device = Device(bundle)
    now_ns = time.time_ns()
    traces = ClientTraces(device_side.spans, now=lambda: now_ns + 9 * MS)
    async with (
        running(bundle.path, tracing=ServerTraces(server_side.spans)) as server,
        session(server.address, bundle.sha256) as stream,
    ):
        frame = captured(7, at_ns=now_ns)
        (layer,) = device.layers(picture(), 0)
        layer.traceparent = traces.sent(frame)
        assert (await stream.frame([layer])).error is None
    traces.take(report(frame))
    mine, theirs = device_side.finished(), server_side.finished()
    assert set(mine) == {"frame", "capture", "preprocess", "head", "codec", "round trip"}
    assert set(theirs) == {"answer", "decode", "queue", "tail"} or set(theirs) == {"answer", "decode", "tail"}
    every = [*mine.values(), *theirs.values()]
    assert len({span.context.trace_id for span in every}) == 1
    assert mine["frame"].parent is None
    for name in ("capture", "preprocess", "head", "codec", "round trip"):
        assert mine[name].parent.span_id == mine["frame"].context.span_id
    assert theirs["answer"].parent.span_id == mine["round trip"].context.span_id
    for name in set(theirs) - {"answer"}:
        assert theirs[name].parent.span_id == theirs["answer"].context.span_id
    root = mine["frame"]
    assert (root.start_time, root.end_time) == (now_ns, now_ns + 40 * MS)
    assert mine["head"].end_time - mine["head"].start_time == 5 * MS
    assert mine["codec"].end_time == mine["round trip"].start_time == now_ns + 9 * MS  # sent when it was encoded
    assert mine["capture"].start_time == now_ns
    assert dict(root.attributes)["headtail.outcome"] == "result"
    assert dict(mine["round trip"].attributes) == {"headtail.payload_bytes": 170}
    assert dict(theirs["answer"].attributes)["headtail.model"] == "tiny"
    assert root.resource.attributes["service.name"] == "headtail-client"
    assert theirs["answer"].resource.attributes["service.name"] == "headtail-server"


def test_every_frame_is_a_trace_whatever_becomes_of_it() -> None:
    memory = Memory("c")
    traces = ClientTraces(memory.spans, now=lambda: 10**18 + 9 * MS)
    never_sent, lost, again = (captured(i, at_ns=10**18) for i in range(3))
    traces.take(report(never_sent, Outcome.DROPPED, reason="superseded", stages_ms={"total": 33.0}, operating_point=None))
    assert list(memory.finished()) == ["frame"]
    assert memory.finished()["frame"].status.status_code.name == "ERROR"
    traces.sent(lost)
    traces.take(report(lost, Outcome.LOCAL, stages_ms={**STAGES, "local": 8.0}))
    assert memory.finished()["round trip"].status.description == "no answer"
    assert memory.finished()["local"].end_time == 10**18 + 40 * MS
    assert memory.finished()["frame"].status.status_code.name == "UNSET"
    first, second = traces.sent(again), traces.sent(again)  # the stream broke in between
    assert first != second
    assert first.split("-")[1] == second.split("-")[1]
    traces.take(report(again))
    trips = [s for s in memory.exporter.get_finished_spans() if s.name == "round trip"]
    assert [s.status.description for s in trips] == ["no answer", "the stream broke", None]
    assert not traces._open


async def test_unary_calls_take_the_parent_from_their_metadata(bundle: Bundle) -> None:
    memory, device = Memory("s"), Device(bundle)
    metadata = (("traceparent", PARENT),)
    async with (
        running(bundle.path, tracing=ServerTraces(memory.spans)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        request = pb.InferRequest(
            protocol_version=PROTOCOL_VERSION, bundle_sha256=bundle.sha256, layers=device.layers(picture(), 0)
        )
        await pb_grpc.HeadtailStub(channel).Infer(request, metadata=metadata)
        assert f"{memory.finished()['answer'].context.trace_id:032x}" == PARENT.split("-")[1]
        memory.exporter.clear()
        tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=(2, 32, 32, 3))
        pixels = oip.ModelInferRequest(
            model_name="tiny", inputs=[tensor], raw_input_contents=[np.zeros((2, 32, 32, 3), np.uint8).tobytes()]
        )
        await oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(pixels, metadata=metadata)
        answers = [span for span in memory.exporter.get_finished_spans() if span.name == "answer"]
        assert len(answers) == 2
        assert {f"{span.parent.span_id:016x}" for span in answers} == {PARENT.split("-")[2]}


@pytest.mark.parametrize(
    ("sent", "spans", "remote"),
    [
        (PARENT, 1, True),
        (PARENT[:-1] + "0", 0, False),  # the device left it out by its own flag
        (LEFT_OUT, 0, False),
        ("", 1, False),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", 1, False),
        ("00-0af7651916cd43dd8448eb211c80319c-XXXXXXXXXXXXXXXX-01", 1, False),
        ("\x00\x01" * 20, 1, False),
    ],
)
def test_what_a_device_says_of_its_trace_is_checked(sent: str, spans: int, remote: bool) -> None:
    memory = Memory("s")
    ServerTraces(memory.spans).on_result("tiny", sent, Result(frame_id=1, error=OverloadedError("busy")))
    finished = memory.exporter.get_finished_spans()
    assert len(finished) == spans
    if spans:
        assert (finished[0].parent is not None) is remote
        assert dict(finished[0].attributes)["headtail.outcome"] == "overloaded"


# ---------------------------------------------------------------- a collector


class Collector:
    """An OTLP/gRPC collector that keeps what it is sent."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as ts
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

        collected = self.spans = []

        class Service(rpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                for resource in request.resource_spans:
                    names = {a.key: a.value.string_value for a in resource.resource.attributes}
                    collected.extend((names["service.name"], s) for scope in resource.scope_spans for s in scope.spans)
                return ts.ExportTraceServiceResponse()

        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        rpc.add_TraceServiceServicer_to_server(Service(), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()


async def test_both_commands_send_their_spans_to_a_collector(bundle: Bundle, tmp_path: Path) -> None:
    """The client by its option, the server by OpenTelemetry's own variable."""
    collector = Collector()
    url = f"http://127.0.0.1:{collector.port}"
    photos = write_photos(tmp_path / "photos", count=3)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            patch.setenv("OTEL_SERVICE_NAME", "edge-1")
            context = child(tmp_path, bundle.path)
            server = context.__enter__()
        try:
            done = run_client(tmp_path, "--camera", str(photos), "--server", server.address, "--otel-endpoint", url, "--json")
            assert done.code == 0, done.err
            assert server.stop() == 0
        finally:
            context.__exit__(None, None, None)

    try:
        await asyncio.to_thread(work)
    finally:
        collector.server.stop(0)
    by_service: dict[str, list[Any]] = {}
    for service, span in collector.spans:
        by_service.setdefault(service, []).append(span)
    assert set(by_service) == {"headtail-client", "edge-1"}
    frames = [s for s in by_service["headtail-client"] if s.name == "frame"]
    answers = [s for s in by_service["edge-1"] if s.name == "answer"]
    assert len(frames) == len(answers) == 3
    assert {s.trace_id for s in frames} == {s.trace_id for s in answers}


def test_a_collector_that_is_away_holds_nobody_up(bundle: Bundle, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=2)
    with child(tmp_path, bundle.path) as server:
        begun = time.monotonic()
        plain = run_client(tmp_path, "--camera", str(photos), "--server", server.address, "--json")
        plain_s, begun = time.monotonic() - begun, time.monotonic()
        arguments = ("--otel-endpoint", "http://127.0.0.1:9", "--json")
        done = run_client(tmp_path, "--camera", str(photos), "--server", server.address, *arguments)
    assert plain.code == done.code == 0, done.err
    assert done.summary["outcomes"]["result"] == 2
    assert time.monotonic() - begun < plain_s + 20


# ---------------------------------------------------------------- off


def test_tracing_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    assert not wanted(None)
    assert open_spans("s", "0", None) is None
    assert wanted("http://h:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:4317")
    assert wanted(None)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not wanted("http://h:4317")
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    with pytest.raises(ConfigError, match="URL"):
        open_spans("s", "0", "h:4317")


_LOADED = """
import json, sys
{first}
from {module} import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(json.dumps({{"code": code, "otel": sorted(m for m in sys.modules if m.startswith("opentelemetry"))}}))
"""


def loaded(module: str, arguments: Sequence[str], *, first: str = "", **variables: str) -> tuple[dict[str, Any], str]:
    """Runs a command in a fresh interpreter; what was loaded afterwards, and standard error."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED.format(module=module, first=first), *arguments], capture_output=True, text=True, timeout=120,
        env={**environment(), **variables}, check=False,
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def test_without_tracing_nothing_of_it_is_loaded(bundle: Bundle, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=2)
    with child(tmp_path, bundle.path) as server:
        arguments = ["--camera", str(photos), "--server", server.address]
        found, err = loaded("edge_client.cli", arguments, HEADTAIL_CACHE=str(tmp_path / "cache"))
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert found == {"code": 0, "otel": []}, err
    assert "opentelemetry" not in maps


_BLOCKED = "sys.modules['opentelemetry'] = None"


def test_without_the_extra_the_option_is_an_error_and_the_variables_a_warning(bundle: Bundle, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=1)
    cache = str(tmp_path / "cache")
    with child(tmp_path, bundle.path) as server:
        arguments = ["--camera", str(photos), "--server", server.address]
        found, err = loaded("edge_client.cli", [*arguments, "--otel-endpoint", "http://h:1"], first=_BLOCKED, HEADTAIL_CACHE=cache)
        assert found["code"] == 2
        assert "headtail[otel]" in err
        found, err = loaded(
            "edge_client.cli", arguments, first=_BLOCKED, HEADTAIL_CACHE=cache, OTEL_EXPORTER_OTLP_ENDPOINT="http://h:1"
        )
        assert found["code"] == 0, err
        assert "headtail[otel]" in err
