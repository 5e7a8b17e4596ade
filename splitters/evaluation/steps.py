"""How far a measurement is, counted in photos."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[int, int, str], None]
"""Told how many steps are done, of how many, and of what."""


class Steps:
    """Counts calls towards ``total`` and tells ``show``.

    Args:
        total: calls expected.
        show: told of every call; None: nobody is.
        name: of the steps.
    """

    def __init__(self, total: int, show: Told | None, name: str = "photos, over all settings") -> None:
        self._total, self._show, self._name, self._done = total, show, name, 0

    def __call__(self) -> None:
        """One more is done."""
        self._done += 1
        if self._show is not None:
            self._show(self._done, max(self._total, self._done), self._name)
