"""Latent codecs: quantise, entropy-code and layer what a head sends. No torch in here.

::

    codec = codec_from_spec(spec, read_part)
    symbols = codec.quantise(latents, point_id)      # integers; the only lossy step
    payloads = codec.encode(symbols)                 # one per layer, base first
    symbols = codec.decode(payloads[:n])             # exactly the same integers, of n layers
    latents = codec.dequantise(symbols)              # missing layers are zeros

Video: the client codes against what the server holds, the server keeps what it decoded::

    coded = codec.compress(latents, point_id, *predictor.choose())                 # client
    predictor.sent(frame_id, coded.symbols, reference=coded.reference)             # it waits for its turn to go out
    predictor.delivered(frame_id, layer)                                           # each layer handed to the stream
    symbols = codec.decode(coded.payloads, store); store.add(frame_id, symbols)    # server
    predictor.acknowledged(frame_id, symbols.layers, symbols.crc32())              # client, from the server's result
    predictor.refused(frame_id)                                                    # client, on error `payload`
    predictor.lost(frame_id)                                                       # client, on any other error without layers
    predictor.reset()                                                              # client, on reconnect
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from protos.errors import BundleError
from splitters.codec.base import Coded, Latent, LatentCodec, References, Spec
from splitters.codec.envelope import is_predicted
from splitters.codec.fitting.calibrate import calibrate_plain
from splitters.codec.learned import LearnedCodec
from splitters.codec.learned_spec import learned_spec
from splitters.codec.plain import PlainCodec
from splitters.codec.symbols import SymbolArray, Symbols
from splitters.codec.temporal import HISTORY_FRAMES, Predictor, ReferenceStore
from splitters.registry import Registry

__all__ = [
    "CODECS",
    "HISTORY_FRAMES",
    "Coded",
    "Latent",
    "LatentCodec",
    "LearnedCodec",
    "PlainCodec",
    "Predictor",
    "ReferenceStore",
    "References",
    "Spec",
    "SymbolArray",
    "Symbols",
    "calibrate_plain",
    "codec_from_spec",
    "is_predicted",
    "learned_spec",
]


ReadPart = Callable[[str], bytes]
"""From a part's path to its bytes."""


def codec_from_spec(spec: Mapping[str, Any], read_part: ReadPart) -> LatentCodec:
    """Builds the codec a bundle's ``device/codec.json`` describes.

    Args:
        spec: the parsed JSON.
        read_part: returns the bytes of another part of the bundle by its path (the learned codec's tables).

    Raises:
        BundleError: an unknown kind, another version, or tables that do not hold together.
    """
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    return CODECS.get(str(kind))(dict(spec), read_part)


def _plain(spec: Spec, read_part: ReadPart) -> LatentCodec:
    del read_part
    return PlainCodec(spec)


def _learned(spec: Spec, read_part: ReadPart) -> LatentCodec:
    path = spec.get("tables")
    if not isinstance(path, str):
        raise BundleError("codec.json names no part that holds its tables")
    return LearnedCodec(spec, read_part(path))


CODECS: Registry[Callable[[Spec, ReadPart], LatentCodec]] = Registry(
    "headtail.codecs", "codec", {"plain": "splitters.codec:_plain", "learned": "splitters.codec:_learned"}, error=BundleError
)
"""By ``kind`` in ``device/codec.json``."""
