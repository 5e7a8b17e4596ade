"""A checked cast: what a module holds, as the type it is known to have."""

from __future__ import annotations

from typing import TypeVar

from protos.errors import ModelError

T = TypeVar("T")


def narrow(value: object, kind: type[T]) -> T:
    """Returns ``value`` as a ``kind``.

    Raises:
        ModelError: it is something else; the model is not built as this release expects.
    """
    if not isinstance(value, kind):
        raise ModelError(f"expected a {kind.__name__} here, found a {type(value).__name__}")
    return value
