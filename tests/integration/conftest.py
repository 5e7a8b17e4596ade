"""What a file has of its own: a server that serves the tiny bundle, a device's cache that has met it, a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from splitters.bundle import Bundle
from tests.fakes.client_process import run_client, standby, write_photos

if TYPE_CHECKING:
    from tests.fakes.ray_cluster import Cluster


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the file's own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def photos(home: Path) -> Path:
    """Five of them."""
    return write_photos(home / "photos")


@pytest.fixture(scope="module")
def server(home: Path, bundle: Bundle) -> Iterator[str]:
    """Its address."""
    with standby(home, bundle.path) as s:
        yield s.serve()


@pytest.fixture(scope="module")
def cache(home: Path, server: str, photos: Path) -> Path:
    """A cache that has met the server once."""
    done = run_client(home, "--camera", str(photos), "--server", server, cache=home / "cache")
    assert done.code == 0, done.err
    return home / "cache"


@pytest.fixture(scope="module")
def joined() -> Iterator[Cluster]:
    """A Ray cluster of the file's own."""
    from tests.fakes.ray_cluster import cluster

    with cluster() as ray:
        yield ray
