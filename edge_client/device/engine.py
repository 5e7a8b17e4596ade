"""A bundle made ready to run on this device: head, codec, local model, labels. Blocking; the worker calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge_client.device.video import AUTO, VideoSender, bitrate_of
from edge_client.frames import NS_PER_MS, Clock
from protos.datagrams.pieces import BODY_BYTES
from protos.errors import ConfigError, ModelError, PayloadError
from protos.messages import SLICES, PayloadKind, Result
from splitters.bundle import Bundle
from splitters.bundle.offload import OffloadOption, compress
from splitters.bundle.operating_point import OperatingPoint
from splitters.codec import Predictor, Symbols
from splitters.runtime.head import Head, open_codec, run_options
from splitters.runtime.inputs import Raw
from splitters.runtime.local import open_local
from splitters.runtime.sessions import Floats
from splitters.tasks.base import open_task
from splitters.tasks.preprocess import Frame, input_image

Reference = tuple[Symbols | None, int | None]
NO_REFERENCE: Reference = (None, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """A frame after the stem, shared by prefilter and encoders."""

    maps: list[Floats]
    image: Frame
    stem_ns: int
    preprocess_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A frame ready for the network.

    Attributes:
        payloads: one per layer, base first.
        symbols: what they hold, for temporal prediction; None for an offloaded image or video.
        reference: the frame they were predicted from; None for a key frame.
        stages_ms: preprocess, head and codec.
        kind: what the payloads are.
        slices: of the only payload; 0: it is not in slices.
    """

    payloads: tuple[bytes, ...]
    symbols: Symbols | None
    stages_ms: Mapping[str, float]
    reference: int | None = None
    kind: PayloadKind = PayloadKind.LATENT
    slices: int = 0

    @property
    def payload_bytes(self) -> int:
        """All layers together."""
        return sum(map(len, self.payloads))


class Engine:
    """One opened bundle. Not safe for several threads at a time; the device's worker is one thread."""

    def __init__(self, bundle: Bundle, *, clock: Clock, threads: int = 1, encoder: str = AUTO) -> None:
        """Opens every graph, so that no frame ever waits for one; ``encoder`` as in `VideoSender`.

        Raises:
            BundleError: a part is absent, altered or unusable.
        """
        self.bundle = bundle
        self.model = bundle.manifest.name
        self.sha256 = bundle.sha256
        self.labels = bundle.manifest.labels
        self.task = open_task(bundle.manifest)
        self.threads = threads
        self._clock = clock
        self._options = run_options()
        self.head = Head(bundle, threads=threads, options=self._options)
        self.inputs = self.head.inputs
        self.local = open_local(bundle, clock=clock, threads=threads, options=self._options)
        self.codec = open_codec(bundle)
        self._video_bps = {(o.quality, o.size_px): bitrate_of(o.payload_bytes.p50) for o in bundle.offloads if o.is_video}
        self._video = VideoSender(bundle.manifest.preprocess.size_px, encoder) if self._video_bps else None

    @property
    def offloads(self) -> tuple[OffloadOption, ...]:
        """The bundle's offload options that this device can do."""
        video = self._video is not None and bool(self._video.name)
        return tuple(o for o in self.bundle.offloads if video or not o.is_video)

    def abandon(self) -> None:
        """Ends a graph that is running, from another thread, and every later run; the run raises ``ModelError``."""
        self._options.terminate = True

    def input_image(self, frame: Frame) -> Frame:
        """The model's own input as a picture: the fair baseline for JPEG, and what offload sends."""
        return input_image(frame, self.bundle.manifest.preprocess)

    def features(self, frame: Frame, raw: Raw | None = None) -> Features:
        """Preprocesses a frame, with the arrays that came with it, and runs the stem."""
        start_ns = self._clock()
        image = self.input_image(frame)
        given = self.inputs(image, raw)
        ready_ns = self._clock()
        maps = self.head.stem(given)
        return Features(maps=maps, image=image, preprocess_ns=ready_ns - start_ns, stem_ns=self._clock() - ready_ns)

    def encode(self, features: Features, point: OperatingPoint, reference: Reference = NO_REFERENCE) -> Encoded:
        """Runs the encoders of ``point`` and codes the latent, predicted from what the server is known to hold."""
        start_ns = self._clock()
        latents = self.head.latents(features.maps, point.graphs)
        head_ns = self._clock()
        try:
            coded = self.codec.compress(latents, point.codec_point, *reference)
        except ConfigError as error:
            raise ModelError(f"the head's outputs are not what the bundle says: {error.message}") from error
        stages = {
            "preprocess": features.preprocess_ns / NS_PER_MS,
            "head": (features.stem_ns + head_ns - start_ns) / NS_PER_MS,
            "codec": (self._clock() - head_ns) / NS_PER_MS,
        }
        return Encoded(payloads=coded.payloads, symbols=coded.symbols, stages_ms=stages, reference=coded.reference)

    def in_slices(self, encoded: Encoded) -> Encoded:
        """The same key frame in slices, where it takes more than two datagrams and each slice is one; else as it is.

        Coding four small planes takes several times as long as one, so that frames for which parity is enough stay as they are.
        """
        if encoded.symbols is None or encoded.symbols.history is not None or encoded.payload_bytes <= 2 * BODY_BYTES:
            return encoded
        start_ns = self._clock()
        payload = self.codec.encode_slices(encoded.symbols)
        if payload is None or len(payload) > SLICES * BODY_BYTES:
            return encoded
        stages = {**encoded.stages_ms, "codec": encoded.stages_ms["codec"] + (self._clock() - start_ns) / NS_PER_MS}
        return replace(encoded, payloads=(payload,), slices=SLICES, stages_ms=stages)

    def compress(self, features: Features, image_format: str, quality: int, size_px: int = 0) -> Encoded:
        """The model's own input as a JPEG or WebP, for a server that runs the whole model."""
        start_ns = self._clock()
        data = compress(features.image, image_format=image_format, quality=quality, size_px=size_px)
        stages = {"preprocess": features.preprocess_ns / NS_PER_MS, "codec": (self._clock() - start_ns) / NS_PER_MS}
        return Encoded(payloads=(data,), symbols=None, stages_ms=stages, kind=PayloadKind.IMAGE)

    def video(self, features: Features, quality: int, size_px: int = 0, reference: int | None = None) -> Encoded:
        """The model's own input as the next frame of an H.264 stream; ``reference`` as in `VideoSender.encode`.

        Raises:
            ModelError: this bundle or device has no such stream.
        """
        if self._video is None:
            raise ModelError("this bundle offers no H.264")
        start_ns = self._clock()
        bitrate_bps = self._video_bps.get((quality, size_px), 0)
        payload = self._video.encode(features.image, quality, size_px, reference, bitrate_bps)
        stages = {"preprocess": features.preprocess_ns / NS_PER_MS, "codec": (self._clock() - start_ns) / NS_PER_MS}
        return Encoded(
            payloads=(payload.to_bytes(),), symbols=None, stages_ms=stages, reference=payload.reference, kind=PayloadKind.VIDEO
        )

    def picture(self, frame: Frame) -> Features:
        """A frame made ready for ``compress``: no head runs."""
        start_ns = self._clock()
        image = self.input_image(frame)
        return Features(maps=[], image=image, preprocess_ns=self._clock() - start_ns, stem_ns=0)


def learn_reference(predictor: Predictor, result: Result) -> None:
    """What a result says of the symbols the server holds for temporal prediction; a refused frame may have been decoded too."""
    if result.layers_decoded:
        predictor.acknowledged(result.frame_id, result.layers_decoded, result.symbols_crc32, result.slices_held)
    elif isinstance(result.error, PayloadError):
        predictor.refused(result.frame_id)
    elif result.error is not None:
        predictor.lost(result.frame_id)
