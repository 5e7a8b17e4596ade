"""Marks every test by its folder, gives the run a cache of its own, finds the optional data, and makes the tiny bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from splitters.bundle import Bundle

# OpenMP's threads wait for each other spinning: beside other work two of them can take minutes for what one does in seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDERS = ("unit", "integration", "testbed", "bench")
_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """A default bundle is exported once in a run, by whichever process needs it first, and never into the user's own cache."""
    if not hasattr(config, "workerinput"):  # the workers of a run inherit it
        config.stash[_CACHE] = os.environ["HEADTAIL_CACHE"] = tempfile.mkdtemp(prefix="headtail-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if folder in FOLDERS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, of which nobody changes a byte; a file that needs another one has a fixture of its own."""
    from tests.fakes.bundles import write_tiny_bundle

    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The optional photos, videos and traces; tests that need them are skipped, saying so, where they are absent."""
    configured = os.environ.get("HEADTAIL_DATA")
    if not configured or not Path(configured).is_dir():
        pytest.skip("HEADTAIL_DATA is not set to a directory: the optional data is absent")
    return Path(configured)
