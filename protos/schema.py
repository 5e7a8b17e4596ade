"""The one door for data from outside: files of a bundle, caches, settings, a peer's JSON.

What comes through it has the type that was asked for, all the way down: no unknown names, no NaN and no infinity, no numbers
beyond 64 bits, nothing nested deeper than any of our formats. Everything else is one error that says where it is wrong.
The types are our own dataclasses; msgspec does the reading.
"""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from protos.errors import BundleError, ConfigError, HeadtailError

T = TypeVar("T")

MAX_DEPTH: Final = 24
MAX_BYTES: Final = 8 << 20
_MAX_INT: Final = 2**63


def read_json(
    data: bytes | str, kind: type[T], *, what: str, error: type[HeadtailError] = BundleError, limit: int = MAX_BYTES
) -> T:
    """JSON as a checked value.

    Args:
        data: the text.
        kind: a dataclass, or any type built of them.
        what: a name for the error's sentence.
        error: the class to raise.
        limit: bytes at most.

    Raises:
        HeadtailError: of class ``error``: too large, not JSON, or not of that type.
    """
    if len(data) > limit:
        raise error(f"{what} has {len(data)} bytes; at most {limit} are allowed")
    try:
        raw = msgspec.json.decode(data)
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except ValueError as failure:  # msgspec's own errors are such, and so are those of UTF-8
        raise error(f"{what} is not JSON: {failure}") from failure
    return checked(raw, kind, what=what, error=error)


def read_toml(text: str, *, what: str) -> dict[str, Any]:
    """TOML as plain types, names with ``_`` for ``-``; ``checked`` has still to be asked.

    Raises:
        ConfigError: it is not TOML, or one name stands there twice.
    """
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{what} is nested too deeply") from None
    except ValueError as failure:
        raise ConfigError(f"{what} is not TOML: {failure}") from failure
    named = {key.replace("-", "_"): value for key, value in data.items()}
    if len(named) != len(data):
        raise ConfigError(f"{what} gives a setting twice, with - and with _")
    return named


def read_toml_file(path: Path, *, what: str) -> dict[str, Any]:
    """A file's, see `read_toml`.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return read_toml(path.read_text(encoding="utf-8-sig"), what=what)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not TOML: {error}") from error


def checked(raw: object, kind: type[T], *, what: str, error: type[HeadtailError] = BundleError) -> T:
    """Plain types (of JSON, TOML or a command line) as a value of ``kind``.

    Raises:
        HeadtailError: of class ``error``; the sentence says where it is wrong.
    """
    try:
        _plain(raw, what, error)
        _known(raw, kind, what, error)
        return msgspec.convert(raw, kind, str_keys=True)
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as failure:
        raise error(f"{what}: {failure}") from failure


def _plain(raw: object, what: str, error: type[HeadtailError]) -> None:
    """No odd numbers and no great depth, anywhere; without recursion, which depth could exhaust."""
    level: list[object] = [raw]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, float) and not isfinite(value):
                raise error(f"{what} holds the number {value}, which is none")
            elif isinstance(value, int) and not -_MAX_INT <= value < _MAX_INT:
                raise error(f"{what} holds an impossibly large number")
        if not below:
            return
        level = below
    raise error(f"{what} is nested more than {MAX_DEPTH} levels deep")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _known(raw: object, kind: Any, at: str, error: type[HeadtailError]) -> None:
    """No name that a dataclass does not have: msgspec would leave it out without a word."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for one in arguments:
            _known(raw, one, at, error)
    elif isinstance(raw, dict) and is_dataclass(kind):
        hints = _hints(cast("type", kind))
        for key, value in raw.items():
            if key not in hints:
                raise error(f"{at} has the unknown name {key!r}; known are {', '.join(sorted(hints))}")
            _known(value, hints[key], f"{at}, {key}", error)
    elif isinstance(raw, dict) and isinstance(origin, type) and issubclass(origin, Mapping):
        for key, value in raw.items():
            _known(value, arguments[1], f"{at}, {key}", error)
    elif isinstance(raw, list) and arguments:
        for value in raw:
            _known(value, arguments[0], at, error)
