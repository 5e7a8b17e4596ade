"""The version of this package, for ``--version`` and for the peer's log."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """As installed; ``0`` where it runs from a checkout without installation."""
    try:
        return version("headtail")
    except PackageNotFoundError:
        return "0"
