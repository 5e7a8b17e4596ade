"""Hands the device part of a bundle to a client, in small pieces and from where it left off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edge_server.models import Model
from protos.errors import ProtocolError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import CHUNK_BYTES

_MAX_OFFSETS = 4096


def chunks(model: Model, wanted_sha256: str, have: Sequence[pb.PartOffset]) -> Iterator[pb.BundleChunk]:
    """The manifest, then what the client lacks of every device file.

    Args:
        model: as it is held in memory; a change on disk does not reach a fetch under way.
        wanted_sha256: the bundle the client asks for; empty: whatever is held.
        have: prefixes the client holds already.

    Raises:
        VersionMismatchError: another bundle is held.
        ProtocolError: an offset lies outside its file, or the file is not of the device part.
    """
    if wanted_sha256 and wanted_sha256 != model.sha256:
        raise VersionMismatchError(
            f"bundle {wanted_sha256[:12]} of {model.name!r} is not held here; the server's is {model.sha256[:12]}"
        )
    offsets = _offsets(model, have)
    yield pb.BundleChunk(manifest_json=model.manifest_json)
    for path, data in model.device_files.items():
        for offset in range(offsets.get(path, 0), len(data), CHUNK_BYTES):
            yield pb.BundleChunk(part=pb.PartChunk(path=path, offset=offset, data=data[offset : offset + CHUNK_BYTES]))


def _offsets(model: Model, have: Sequence[pb.PartOffset]) -> dict[str, int]:
    if len(have) > _MAX_OFFSETS:
        raise ProtocolError(f"{len(have)} part offsets are more than a bundle has files")
    offsets = {}
    for entry in have:
        data = model.device_files.get(entry.path)
        if data is None:
            raise ProtocolError(f"the device part of {model.name!r} has no file {entry.path[:200]!r}")
        if entry.offset > len(data):
            raise ProtocolError(f"{entry.path!r} has {len(data)} bytes; offset {entry.offset} lies beyond its end")
        offsets[entry.path] = entry.offset
    return offsets
