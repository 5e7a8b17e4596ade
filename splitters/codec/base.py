"""The contract every latent codec keeps. Importing it pulls in numpy and nothing heavier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError, PayloadError
from splitters.codec.envelope import Header
from splitters.codec.symbols import Symbols

Latent = NDArray[np.float32]
Spec = dict[str, Any]
References = Mapping[int, Symbols]

SPEC_VERSION = 1
MAX_ELEMENTS = 2**24
MAX_TENSORS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """A frame as it goes out.

    Attributes:
        symbols: what the receiver will have decoded, exactly.
        payloads: one per layer, base first.
        reference: id of the frame it was coded against; None for a key frame.
    """

    symbols: Symbols
    payloads: tuple[bytes, ...]
    reference: int | None = None

    @property
    def predicted(self) -> bool:
        """Whether it was coded against a reference; else it is a key frame."""
        return self.reference is not None


class LatentCodec(ABC):
    """Latent ↔ symbols ↔ payloads, for every codec point of one bundle.

    Instances hold no per-frame state and may be used from several threads.

    Attributes:
        kind: ``plain`` or ``learned``.
        point_ids: the codec points, in the order the header counts them.
        shapes: shape of each latent tensor, without the batch axis.
        supports_reference: whether `encode` makes use of a reference frame.
    """

    kind: str
    point_ids: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    supports_reference: bool = False

    @abstractmethod
    def layer_count(self, point_id: str) -> int:
        """How many layers a frame of this point travels in."""

    @abstractmethod
    def quantise(self, latents: Sequence[Latent], point_id: str) -> Symbols:
        """Turns one frame's float32 latents (no batch axis) into integers.

        Raises:
            ConfigError: an unknown point, or tensors of other shapes than the bundle's.
        """

    @abstractmethod
    def dequantise(self, symbols: Symbols) -> tuple[Latent, ...]:
        """Turns symbols back into float32 latents; cells of missing layers are zeros."""

    def prefix(self, symbols: Symbols, layers: int) -> Symbols:
        """Returns what the first `layers` layers hold: what a receiver of only those has decoded."""
        if layers < symbols.layers:
            raise NotImplementedError(f"the {self.kind} codec has a single layer")
        return symbols

    @abstractmethod
    def encode(self, symbols: Symbols, reference: Symbols | None = None, reference_frame: int | None = None) -> list[bytes]:
        """Returns one payload per layer that `symbols` holds, base first.

        Args:
            symbols: from `quantise` or `decode`.
            reference: symbols the server is known to hold; only the layers it acknowledged.
            reference_frame: the frame id under which the server holds them.
        """

    def compress(
        self, latents: Sequence[Latent], point_id: str, reference: Symbols | None = None, reference_frame: int | None = None
    ) -> Coded:
        """Latents to payloads; with a reference, symbols are chosen so that they cost little against it.

        Args:
            latents: one frame's, float32, no batch axis.
            point_id: the codec point.
            reference: symbols the receiver holds by the time this frame arrives.
            reference_frame: the frame id under which it holds them.
        """
        del reference, reference_frame
        symbols = self.quantise(latents, point_id)
        return Coded(symbols=symbols, payloads=tuple(self.encode(symbols)))

    def encode_slices(self, symbols: Symbols) -> bytes | None:
        """A key frame's payload in slices that decode alone (`codec.slices`); None: this codec or latent has none."""
        del symbols
        return None

    def decode_slices(self, payload: bytes) -> Symbols:
        """The symbols of a payload of slices, holes filled.

        Raises:
            PayloadError: no slice is whole, or this codec has none.
        """
        del payload
        raise PayloadError(f"a payload of slices came to a bundle whose codec is {self.kind}")

    def with_holes(self, symbols: Symbols, held: int) -> Symbols:
        """What a receiver has of a frame in slices who holds those of ``held``, a bit each."""
        del held
        return symbols

    @abstractmethod
    def decode(self, layers: Sequence[bytes], references: References | None = None, *, strict: bool = False) -> Symbols:
        """Returns exactly the symbols that were encoded, of the complete layers that arrived.

        A damaged or cut layer ends the prefix: what its predecessors hold is returned, and
        `Symbols.layers` says how many there were.

        Args:
            layers: base first, without gaps.
            references: frame id → symbols of frames decoded before.
            strict: raise for any damaged layer instead of returning the prefix.

        Raises:
            PayloadError: the base layer is damaged, of another bundle, or was coded against a
                reference that is not held: ask for a key frame.
            LimitError: larger than any payload of this bundle may be.
        """

    def _check_latents(self, latents: Sequence[Latent], point_id: str) -> list[Latent]:
        if point_id not in self.point_ids:
            raise ConfigError(f"no codec point {point_id!r}; this bundle has {', '.join(self.point_ids)}")
        if len(latents) != len(self.shapes):
            raise ConfigError(f"this bundle's head has {len(self.shapes)} latents, got {len(latents)}")
        checked = []
        for index, (latent, shape) in enumerate(zip(latents, self.shapes, strict=True)):
            array = np.asarray(latent, dtype=np.float32)
            if array.shape != shape:
                raise ConfigError(f"latent_{index} has shape {array.shape}, the bundle's is {shape}")
            checked.append(array)
        return checked

    def _point_of(self, kind: str, index: int) -> str:
        """The id of the point that a header names."""
        if kind != self.kind:
            raise PayloadError(f"a {kind} payload came to a bundle whose codec is {self.kind}")
        if index >= len(self.point_ids):
            raise PayloadError(f"point {index} is none of the bundle's {len(self.point_ids)}")
        return self.point_ids[index]

    def _check_header(self, header: Header) -> str:
        """Returns the point's id."""
        point_id = self._point_of(header.kind, header.point_index)
        if header.layer_count != self.layer_count(point_id):
            raise PayloadError(f"point {point_id} has {self.layer_count(point_id)} layers, the header says {header.layer_count}")
        return point_id

    def _check_symbols(self, symbols: Symbols) -> None:
        if symbols.point_id not in self.point_ids:
            raise ConfigError(f"symbols of point {symbols.point_id!r} are not of this bundle")
        if tuple(tensor.shape for tensor in symbols.tensors) != self.shapes:
            raise ConfigError("symbols have other shapes than the bundle's latents")


def check_spec(spec: Mapping[str, Any], kind: str) -> None:
    """Raises BundleError unless `spec` is of this kind and of a version this release reads."""
    if spec.get("kind") != kind:
        raise BundleError(f"codec.json is of kind {spec.get('kind')!r}, expected {kind!r}")
    if spec.get("version") != SPEC_VERSION:
        raise BundleError(f"codec.json has version {spec.get('version')!r}, this release reads {SPEC_VERSION}")
