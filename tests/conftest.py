"""Marks every test by its folder, gives the run a cache of its own, finds the optional data, and makes the tiny bundle."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from splitters.bundle import Bundle

# OpenMP's threads wait for each other spinning: beside other work two of them can take minutes for what one does in seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDERS = ("unit", "integration", "testbed", "bench")
_OURS = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """A default bundle is exported once in a run, by whichever process needs it first, and never into the user's own cache."""
    if not hasattr(config, "workerinput"):  # the workers of a run inherit it
        config.stash[_OURS] = ours = tempfile.mkdtemp(prefix="headtail-tests-")
        os.environ |= {"HEADTAIL_CACHE": f"{ours}/cache", "HEADTAIL_TESTS_LOCKS": ours}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked ``alone`` compares times: no other test of this run goes on beside it. Its time-out begins after the wait."""
    with ExitStack() as held:
        with open_lock("door") as door:  # whoever waits for the room holds the door, and is not overtaken
            fcntl.flock(door, fcntl.LOCK_EX)
            room = held.enter_context(open_lock("room"))
            fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


def open_lock(name: str) -> IO[str]:
    """A lock file that the processes of this run share."""
    return (Path(os.environ["HEADTAIL_TESTS_LOCKS"]) / name).open("w")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OURS in config.stash:
        shutil.rmtree(config.stash[_OURS], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if folder in FOLDERS:
            item.add_marker(getattr(pytest.mark, folder))
    if hasattr(config, "workerinput"):  # of several processes none ends long after the others when what takes longest goes first
        items.sort(key=lambda item: (not starts_ray(item.nodeid), *takes_little(item.path.relative_to(root).parts)))


def takes_little(parts: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether a file takes less than those outside of ``unit``, and less than those that export and train models."""
    return parts[0] == "unit", parts[1] not in ("bottleneck", "cutting", "profiling", "training", "zoo")


def starts_ray(nodeid: str) -> bool:
    """Whether a test may start a Ray cluster: those files have ``_ray`` in their names."""
    return "_ray" in Path(nodeid.split("::", 1)[0]).name


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """File by file; all files with Ray go to one process, since two clusters would take each other's cores."""
    from xdist.scheduler import LoadFileScheduling

    class FilesAndRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if starts_ray(nodeid) else super()._split_scope(nodeid)

    return FilesAndRay(config, log)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Generator[None, None, None]:
    """A command line that a test calls sets up the logs of the whole process; the next test finds them as they were."""
    root = logging.getLogger()
    level, off = root.level, root.manager.disable
    yield
    root.setLevel(level)
    logging.disable(off)
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


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
