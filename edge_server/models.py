"""The bundles a server holds: opened, verified, ready to be served and decoded with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protos.errors import BundleError, HeadtailError, UnknownModelError
from splitters.bundle import Bundle, open_bundle, sha256_hex
from splitters.bundle.manifest import MANIFEST
from splitters.codec import LatentCodec, codec_from_spec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Model:
    """One bundle in use.

    ``device_files`` holds the device part as it was verified, so a bundle replaced on disk never reaches a client half
    old, half new.
    """

    bundle: Bundle
    codec: LatentCodec
    manifest_json: bytes
    device_files: dict[str, bytes]

    @property
    def name(self) -> str:
        """Unique within the server."""
        return self.bundle.manifest.name

    @property
    def sha256(self) -> str:
        """The bundle's hash."""
        return self.bundle.sha256

    @property
    def device_bytes(self) -> int:
        """What a fetch from offset 0 sends."""
        return len(self.manifest_json) + sum(len(data) for data in self.device_files.values())


def open_model(path: Path) -> Model:
    """Opens a bundle's directory.

    Raises:
        BundleError: absent, altered, or not readable by this release.
    """
    bundle = open_bundle(path)
    try:
        manifest_json = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path / MANIFEST}: {error.strerror}") from error
    if sha256_hex(manifest_json) != bundle.sha256:
        raise BundleError(f"{path} was replaced while it was read; try again")
    try:
        spec = json.loads(bundle.read_part(bundle.manifest.codec))
    except ValueError as error:
        raise BundleError(f"{bundle.manifest.codec} is not JSON: {error}") from error
    files = {part.path: bundle.read_part(part.path) for part in bundle.manifest.device_parts()}
    return Model(bundle=bundle, codec=codec_from_spec(spec, bundle.read_part), manifest_json=manifest_json, device_files=files)


def locate(name_or_path: str) -> Path:
    """The directory of a bundle: a path, or a default's name (exported now when it was not yet).

    Raises:
        UnknownModelError: neither a directory nor a default's name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if "/" in name_or_path or path.exists():
        raise BundleError(f"{name_or_path} is no bundle's directory")
    from splitters.zoo.defaults import ensure_exported

    return ensure_exported(name_or_path)


class ModelStore:
    """All models of a server, by name; the first is the default.

    Args:
        sources: names or directories, in the order given on the command line.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = tuple(sources)
        self._models: dict[str, Model] = {}

    def open(self) -> list[Model]:
        """Opens every source.

        Raises:
            BundleError: one is unreadable, or two have the same name.
        """
        found: dict[str, Model] = {}
        for source in self._sources:
            model = open_model(locate(source))
            if model.name in found:
                raise BundleError(f"two bundles are named {model.name!r}; a server's models need distinct names")
            found[model.name] = model
        self._models = found
        return list(found.values())

    def changed(self) -> list[Model]:
        """Reads every source again and returns the models whose bundle is another now; they are not in use yet.

        One that cannot be read is logged and left as it was.
        """
        fresh = []
        for source, old in zip(self._sources, list(self._models.values()), strict=True):
            try:
                model = open_model(locate(source))
                if model.name != old.name:
                    raise BundleError(f"{source} now holds {model.name!r} instead of {old.name!r}; restart the server for that")
            except HeadtailError as error:
                log.error("%s: kept as it was: %s", old.name, error.message)
                continue
            if model.sha256 != old.sha256:
                fresh.append(model)
        return fresh

    def replace(self, model: Model) -> Model:
        """Puts a changed model into use; returns the one it replaces."""
        old = self._models[model.name]
        self._models[model.name] = model
        return old

    def get(self, name: str) -> Model:
        """The model of that name; empty: the default.

        Raises:
            UnknownModelError: there is none; the message lists those there are.
        """
        if not name:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModelError(f"this server does not hold {name[:100]!r}; it holds {', '.join(self._models)}")
        return self._models[name]

    def all(self) -> list[Model]:
        """Every model, the default first."""
        return list(self._models.values())
