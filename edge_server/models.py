"""The bundles a server holds: opened, verified, ready to be served and decoded with."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.errors import BundleError, HeadtailError, UnknownModelError
from protos.schema import read_json
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
    spec = read_json(bundle.read_part(bundle.manifest.codec), dict[str, Any], what=bundle.manifest.codec)
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


def _opened(source: str) -> Model:
    try:
        return open_model(locate(source))
    except HeadtailError:
        raise
    except Exception as error:
        log.exception("%s cannot be read", source)
        raise BundleError(f"{source} cannot be read: {type(error).__name__}: {error}") from error


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def said_bytes(model: Model, point_id: int) -> float:
    """What a payload of an operating point costs by the bundle's table, measured on stills; 0 of one that there is not."""
    return next((p.payload_bytes.p50 for p in model.bundle.points if p.id == point_id), 0.0)


class ModelStore:
    """All models of a server, by name; the first is the default.

    A source that cannot be read or run is left out until it can be: it blocks none of the others.

    Args:
        sources: names or directories, in the order given on the command line.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = list(sources)
        self._in_use: dict[str, Model] = {}  # by source, in the sources' order
        self._held: Counter[str] = Counter()  # bundle's hash → calls that run on it

    def read(self) -> tuple[list[tuple[str, Model]], list[HeadtailError]]:
        """Reads every source; returns (source, model) of those whose bundle is not in use, and why others cannot be read.

        Raises:
            UnknownModelError: a source is neither a directory nor a default's name.
            BundleError: two bundles have the same name.
        """
        fresh: list[tuple[str, Model]] = []
        failures: list[HeadtailError] = []
        names: dict[str, str] = {}
        for source in self._sources:
            try:
                model = _opened(source)
            except UnknownModelError:
                raise
            except HeadtailError as error:
                failures.append(error)
                continue
            old = self._in_use.get(source)
            if old is not None and old.name != model.name:
                failures.append(
                    BundleError(f"{source} now holds {model.name!r} instead of {old.name!r}; restart the server for that")
                )
            elif names.setdefault(model.name, source) != source or self._sources.count(source) > 1:
                twice = BundleError(f"two bundles are named {model.name!r}; a server's models need distinct names")
                if not self._in_use:
                    raise twice
                failures.append(twice)
            elif old is None or old.sha256 != model.sha256:
                fresh.append((source, model))
        return fresh, failures

    def open(self, source: str) -> tuple[str, Model]:
        """Reads one bundle that shall come into use; of one in use already, what its directory holds now.

        Returns:
            The source, as it is known here, and the model.

        Raises:
            UnknownModelError: neither a directory nor a default's name.
            BundleError: it cannot be read, or a model of its name is in use from another source.
        """
        model = _opened(source)
        source = next((each for each in self._in_use if _same_place(each, source)), source)
        for other, held in self._in_use.items():
            if held.name == model.name and other != source:
                raise BundleError(f"a model named {model.name!r} is in use already, from another place; remove it first")
        old = self._in_use.get(source)
        if old is not None and old.name != model.name:
            raise BundleError(f"{source} now holds {model.name!r} instead of {old.name!r}; remove that model first")
        return source, model

    def use(self, source: str, model: Model) -> Model | None:
        """Puts a model into use; returns the one it replaces."""
        if source not in self._sources:
            self._sources.append(source)
        old = self._in_use.get(source)
        found = {**self._in_use, source: model}
        self._in_use = {each: found[each] for each in self._sources if each in found}
        return old

    def remove(self, name: str) -> Model:
        """Takes a model out of use: no call gets it any more, and its source is not read again.

        Raises:
            UnknownModelError: there is none of that name.
        """
        if not name:
            raise UnknownModelError("the name of the model to remove is empty")
        model = self.get(name)
        source = next(source for source, each in self._in_use.items() if each is model)
        del self._in_use[source]
        self._sources.remove(source)
        return model

    def place_of(self, model: Model) -> str:
        """The source that a model in use is of.

        Raises:
            UnknownModelError: it is not in use any more.
        """
        place = next((source for source, each in self._in_use.items() if each is model), None)
        if place is None:
            raise UnknownModelError(f"{model.name!r} was replaced or taken out of use meanwhile")
        return place

    @contextmanager
    def hold(self, model: Model) -> Iterator[None]:
        """Around a unary call that runs on a model: its tail stays loaded until then."""
        self._held[model.sha256] += 1
        try:
            yield
        finally:
            self._held[model.sha256] -= 1
            self._held += Counter()  # those that nobody holds are forgotten

    def is_held(self, sha256: str) -> bool:
        """Whether a unary call runs on the bundle of that hash."""
        return sha256 in self._held

    def get(self, name: str) -> Model:
        """The model of that name; empty: the default.

        Raises:
            UnknownModelError: there is none; the message lists those there are.
        """
        models = self.all()
        if not name and models:
            return models[0]
        for model in models:
            if model.name == name:
                return model
        held = ", ".join(m.name for m in models) or "none"
        raise UnknownModelError(f"this server does not hold {f'a model {name[:100]!r}' if name else 'any model'}; it holds {held}")

    def all(self) -> list[Model]:
        """Every model in use, the default first."""
        return list(self._in_use.values())
