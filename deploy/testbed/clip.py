"""What a clip's frames really cost: every payload of a bundle's choices, frame by frame, encoded as the client would.

A table holds what stills cost. On a camera a frame is predicted from an earlier one, and its size depends on what moved since:
on how old that reference is. So a clip is encoded at every operating point, alone and with references of several ages, and
simulation takes the sizes from there instead of drawing them. They are kept in a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_client.control import Split
from edge_client.device.choices import name_of
from edge_client.device.engine import NO_REFERENCE, Engine
from protos.errors import BundleError, SourceError
from protos.schema import read_json
from splitters.bundle import Bundle, cache_dir
from splitters.codec import Symbols
from splitters.runtime.video import VideoReader
from splitters.tasks.preprocess import Frame

AGES = (1, 2, 4)  # of references, in frames; 0, none, is measured as well


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSizes:
    """Bytes by choice, reference age (frames; 0: none) and frame of the clip.

    Attributes:
        clip: its name.
        fps: frames/s that were taken of it.
        sizes: by the choice's name, then by age.
    """

    clip: str
    fps: float
    sizes: Mapping[str, Mapping[int, Sequence[int]]]

    def bytes_of(self, name: str, age: int, frame: int) -> int | None:
        """What frame ``frame`` costs, the clip repeated for ever; None where that choice was not measured.

        An age between two measured ones takes the nearer one's sizes, one beyond them the oldest one's.
        """
        by_age = self.sizes.get(name)
        if not by_age:
            return None
        held = [a for a in by_age if (a > 0) == (age > 0)] or [0]
        series = by_age[min(held, key=lambda a: (abs(a - age), a))]
        return series[frame % len(series)]


def measure_clip(bundle: Bundle, clip: Path, *, fps: float, frames: int) -> ClipSizes:
    """Encodes the clip at every choice; the second time it is read from the cache.

    Raises:
        SourceError: the clip cannot be read, or holds fewer than two frames.
    """
    try:
        digest = hashlib.sha256(clip.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise SourceError(f"the clip {clip} cannot be read: {error.strerror}") from error
    file = cache_dir() / "testbed-clips" / f"{bundle.sha256[:32]}-{digest}-{fps:g}-{frames}.json"
    try:
        return read_json(file.read_bytes(), ClipSizes, what="a clip's sizes")
    except (OSError, BundleError):
        pass
    found = encode_clip(Engine(bundle, clock=time.monotonic_ns), clip, fps=fps, frames=frames)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
    temporary.replace(file)
    return found


def encode_clip(engine: Engine, clip: Path, *, fps: float, frames: int) -> ClipSizes:
    """What every frame costs at every operating point and offload setting of an opened bundle."""
    sizes: dict[str, dict[int, list[int]]] = {}
    held: dict[tuple[int, int], list[Symbols]] = {}  # by point and age: the newest frames' symbols
    count = 0
    for picture in taken(clip, fps, frames):
        features = engine.features(picture)
        for point in engine.bundle.points:
            for age in (0, *AGES) if engine.codec.supports_reference else (0,):
                chain = held.setdefault((point.id, age), [])
                reference = (chain[0], count - age) if age and len(chain) == age else NO_REFERENCE
                encoded = engine.encode(features, point, reference)
                if age and encoded.symbols is not None:
                    chain.append(encoded.symbols)
                    del chain[:-age]
                if not age or reference is not NO_REFERENCE:
                    sizes.setdefault(Split(point_id=point.id).name, {}).setdefault(age, []).append(encoded.payload_bytes)
        for o in (o for o in engine.offloads if not o.is_video):
            encoded = engine.compress(features, o.format, o.quality, o.size_px)
            sizes.setdefault(name_of(o), {}).setdefault(0, []).append(encoded.payload_bytes)
        count += 1
    if count <= max(AGES):
        raise SourceError(f"the clip {clip} gives {count} frames at {fps:g} fps; more than {max(AGES)} are needed")
    return ClipSizes(clip=clip.stem, fps=fps, sizes=sizes)


def taken(clip: Path, fps: float, frames: int) -> Iterator[Frame]:
    """The clip's first ``frames`` pictures at ``fps``."""
    reader = VideoReader(clip, shown=str(clip))
    try:
        given = 0
        while given < frames and (row := reader.read()) is not None:
            picture, at_s = row
            if at_s >= given / fps - 1e-6:
                given += 1
                yield picture
    finally:
        reader.close()
