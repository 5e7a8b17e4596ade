"""The device's work on a frame before the network: preprocessing, head and codec, run on the device's worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from edge_client.control import Offload
from edge_client.device.engine import Encoded, Engine, Features
from edge_client.frames import NS_PER_S
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.parts import Shot
from edge_client.pipeline.pipeline import Pipeline
from splitters.bundle.offload import VIDEO
from splitters.bundle.operating_point import OperatingPoint

Make = Callable[[Engine, Features], Encoded]


class HeadRunner:
    """Turns frames into payloads, and tells the model how long that took.

    Args:
        pipeline: whose frames they are.
        keep_local: whether the local model's input is kept, so that the frame itself need not be.
    """

    def __init__(self, pipeline: Pipeline, *, keep_local: bool) -> None:
        self._pipeline = pipeline
        self._keep_local = keep_local

    async def encode(self, flight: Flight, point: OperatingPoint) -> Shot:
        """Head and codec at an operating point."""
        reference = self._pipeline.model.reference()
        flight.point_id = point.id
        if self._pipeline.model.reliable:
            return await self._run(flight, lambda e, f: e.encode(f, point, reference))
        return await self._run(flight, lambda e, f: e.in_slices(e.encode(f, point, reference)))

    async def compress(self, flight: Flight, choice: Offload) -> Shot:
        """The picture itself, as JPEG, WebP or a frame of video; no head runs."""
        if flight.features is None and flight.frame.image is not None:
            flight.features = flight.engine.picture(flight.frame.image)
        if choice.format == VIDEO:
            reference = self._pipeline.model.video.take(choice.size_px)
            return await self._run(flight, lambda e, f: e.video(f, choice.quality, choice.size_px, reference))
        return await self._run(flight, lambda e, f: e.compress(f, choice.format, choice.quality, choice.size_px))

    async def _run(self, flight: Flight, make: Make) -> Shot:
        pipeline, start_ns = self._pipeline, self._pipeline.clock()
        due_ns = flight.deadline_ns if flight.deadline_ns is not None else start_ns + 3600 * NS_PER_S
        shot = await pipeline.worker.run(partial(self._shoot, flight, make), due_ns=due_ns)
        now_ns = flight.encoded_ns = pipeline.clock()
        flight.stages_ms |= shot.encoded.stages_ms
        flight.local_image = shot.local_image
        pipeline.timings.head.add(now_ns - start_ns)
        if flight.decision is not None:
            pipeline.model.on_device(flight.decision, now_ns - start_ns, now_ns)
            pipeline.model.on_encoded(flight.decision, shot.encoded, now_ns)
        if flight.frame.image is not None:
            pipeline.parts.sample(flight.frame.image, shot.input_image)
        return shot

    def _shoot(self, flight: Flight, make: Make) -> Shot:
        """Runs on the worker."""
        engine, image = flight.engine, flight.frame.image
        assert image is not None  # noqa: S101 - flights keep it until they are encoded
        features = flight.features or engine.features(image, flight.frame.raw)
        flight.features = None
        encoded = make(engine, features)
        local_image = engine.local.prepare(image) if self._keep_local and engine.local else None
        return Shot(encoded=encoded, input_image=features.image, local_image=local_image)
