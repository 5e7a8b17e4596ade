"""Marks every test by its folder and finds the optional data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# OpenMP's threads wait for each other spinning: beside other work two of them can take minutes for what one does in seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDERS = ("unit", "integration", "testbed", "bench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if folder in FOLDERS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The optional photos, videos and traces; tests that need them are skipped, saying so, where they are absent."""
    configured = os.environ.get("HEADTAIL_DATA")
    if not configured or not Path(configured).is_dir():
        pytest.skip("HEADTAIL_DATA is not set to a directory: the optional data is absent")
    return Path(configured)
