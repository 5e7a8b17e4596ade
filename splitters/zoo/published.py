"""Weights that others published: where they lie, what they must hash to, under which licence.

The table is data (``published.toml``). `splitters.zoo.fetch` brings a file here on first use; none is ever committed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from protos.errors import UnknownModelError

TABLE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """How a file is served by its name.

    Attributes:
        output: a preset, or ``auto`` where its shape says all.
        labels: whose classes it has; empty: none.
        preprocess: fields of the manifest's ``preprocess`` that are not the preset's.
    """

    output: str
    labels: Literal["coco", "imagenet", ""] = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published file.

    Attributes:
        name: what `--model` calls it.
        repository: ``owner/name`` on GitHub.
        commit: the fixed commit, 40 hex digits.
        path: of the file in the repository.
        bytes: its size.
        sha256: lower-case hex of its bytes.
        licence: of the weights, as their repository states it.
        lfs: the repository holds a pointer, and the file lies at GitHub's media host.
        serve: how it is served; None: by a recipe of its own, or not.
    """

    name: str
    repository: str
    commit: str
    path: str
    bytes: int
    sha256: str
    licence: str
    lfs: bool = False
    serve: Serve | None = None

    @property
    def place(self) -> str:
        """``repository/commit/path``: the same below every mirror."""
        return f"{self.repository}/{self.commit}/{self.path}"

    @property
    def address(self) -> str:
        """Where the file lies, without a mirror."""
        host = "https://media.githubusercontent.com/media" if self.lfs else "https://raw.githubusercontent.com"
        return f"{host}/{self.place}"


@cache
def published() -> Mapping[str, Published]:
    """All of them, by name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _published(name, **fields) for name, fields in table.items()}


def _published(name: str, *, serve: Mapping[str, Any] | None = None, **fields: Any) -> Published:
    return Published(name=name, serve=None if serve is None else Serve(**serve), **fields)


def find(name: str) -> Published:
    """The file that ``name`` means.

    Raises:
        UnknownModelError: no published file has that name.
    """
    try:
        return published()[name]
    except KeyError:
        raise UnknownModelError(f"{name!r} is no published model; there are {', '.join(published())}") from None
