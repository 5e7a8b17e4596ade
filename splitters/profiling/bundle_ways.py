"""The ways of a bundle: its operating points, its local model, the whole model on the device, and pictures sent instead.

Bytes and accuracies are those of the bundle's table. Times are measured here in processor time of one thread, as the least of a few
runs: what else this machine does is none of theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from protos.errors import BundleError
from splitters.bundle import Bundle
from splitters.bundle.offload import compress, restore
from splitters.codec.base import LatentCodec
from splitters.cutting.checks import one_thread
from splitters.profiling.paying import KINDS, Way
from splitters.profiling.times import clock_ms
from splitters.runtime.head import Head, open_codec
from splitters.runtime.local import open_local
from splitters.runtime.pictures import decode_picture
from splitters.runtime.tail import Tail, load_tail
from splitters.tasks.base import Floats
from splitters.tasks.preprocess import Frame, input_image

_QUALITY = 80
_AGREEMENT = "agreement"


def bundle_ways(bundle: Bundle, frame: Frame, *, same_accuracy: bool = False) -> list[Way]:
    """All ways of a bundle.

    No way counts as more accurate than the whole model: what a table says beyond that is chance.

    Args:
        bundle: opened and verified, its table measured.
        frame: a photograph, (H, W, 3) uint8 BGR.
        same_accuracy: every way counts as accurate as the whole model: the weights are random, or not trained yet.

    Raises:
        BundleError: the bundle's operating points were not measured, or a part cannot be opened.
    """
    if not all(p.measured for p in bundle.points):
        raise BundleError(f"the operating points of {bundle.manifest.name!r} were not measured: run `splitters evaluate` first")
    whole = _whole_accuracy(bundle)
    with one_thread():
        tail = load_tail(bundle, threads=1)
        ways = [*_local(bundle, frame), *_splits(bundle, tail, frame)]
        if tail.takes_images:
            ways += _pictures(bundle, frame, whole, _whole_ms(bundle, tail, frame))
    ways.sort(key=lambda way: KINDS.index(way.kind))
    return [replace(w, accuracy=whole if same_accuracy else min(w.accuracy, whole)) for w in ways]


def _whole_accuracy(bundle: Bundle) -> float:
    """Of the uncut model: by definition 1 in agreement with itself, else that of the best picture sent to it."""
    if bundle.points[0].accuracy_metric == _AGREEMENT:
        return 1.0
    pictures = [o.accuracy for o in bundle.offloads if not o.is_video]
    return max(pictures or [p.accuracy for p in bundle.points])


def _ms(run: Callable[[], object]) -> float:
    return clock_ms(run, time.thread_time_ns)


def _size(frame: Frame) -> tuple[int, int]:
    return frame.shape[1], frame.shape[0]


def _whole_ms(bundle: Bundle, tail: Tail, frame: Frame) -> float:
    picture = input_image(frame, bundle.manifest.preprocess)
    return _ms(lambda: tail.run_images([picture], [_size(frame)]))


def _local(bundle: Bundle, frame: Frame) -> list[Way]:
    local, spec = open_local(bundle, threads=1), bundle.manifest.local
    if local is None or spec is None:
        return []
    ms = _ms(lambda: local(frame))
    return [Way(kind="alone", name="local model", accuracy=spec.accuracy, device_ms=ms, sent_bytes=0, server_ms=0.0)]


def _splits(bundle: Bundle, tail: Tail, frame: Frame) -> list[Way]:
    head, codec = Head(bundle), open_codec(bundle)
    picture = input_image(frame, bundle.manifest.preprocess)

    def latents(graphs: tuple[str, ...]) -> tuple[Floats, ...]:
        return head.latents(head.stem_of(picture), graphs)

    made = {graphs: latents(graphs) for graphs in dict.fromkeys(p.graphs for p in bundle.points)}
    head_ms = {graphs: _ms(partial(latents, graphs)) for graphs in made}
    batch = [t[None] for t in made[bundle.points[0].graphs]]
    tail_ms = _ms(lambda: tail.run(batch, [_size(frame)]))
    ways = []
    for point in bundle.points:
        encode = partial(codec.compress, made[point.graphs], point.codec_point)
        layers = encode().payloads
        decode_ms = _ms(partial(_decode, codec, layers))
        ways.append(
            Way(
                kind="split", name=f"operating point {point.id}", accuracy=point.accuracy, server_ms=decode_ms + tail_ms,
                device_ms=head_ms[point.graphs] + _ms(encode), sent_bytes=point.payload_bytes.p50,
            )
        )  # fmt: skip
    return ways


def _decode(codec: LatentCodec, layers: Sequence[bytes]) -> object:
    return codec.dequantise(codec.decode(layers))


def _restored(data: bytes, size_px: tuple[int, int]) -> Frame:
    return restore(decode_picture(data), size_px)


def _pictures(bundle: Bundle, frame: Frame, whole: float, whole_ms: float) -> list[Way]:
    """The whole model on the device, and on the server.

    Pictures are sent as the bundle's table has them; where it has none, as a JPEG that is taken as good as the input itself.
    """
    picture, size_px = input_image(frame, bundle.manifest.preprocess), bundle.manifest.preprocess.size_px
    rows: list[tuple[str, int, int, float, float | None]] = [
        (o.format, o.quality, o.size_px, o.accuracy, o.payload_bytes.p50) for o in bundle.offloads if not o.is_video
    ]
    ways = [Way(kind="alone", name="whole model", accuracy=whole, device_ms=whole_ms, sent_bytes=0, server_ms=0.0)]
    for image_format, quality, shorter_px, accuracy, known_bytes in rows or [("jpeg", _QUALITY, 0, whole, None)]:
        name = f"{image_format} {quality}" + (f" at {shorter_px} px" if shorter_px else "")
        make = partial(compress, picture, image_format=image_format, quality=quality, size_px=shorter_px)
        data = make()
        decode_ms = _ms(partial(_restored, data, size_px))
        ways.append(
            Way(
                kind="offload", name=name, accuracy=accuracy,
                device_ms=_ms(make), sent_bytes=len(data) if known_bytes is None else known_bytes, server_ms=decode_ms + whole_ms,
            )
        )  # fmt: skip
    return ways
