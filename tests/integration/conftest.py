"""What a file has of its own: a server with the tiny bundle, a cache that has met it; and what files share, a Ray cluster."""

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


@pytest.fixture(scope="session")
def joined() -> Iterator[Cluster]:
    """The Ray cluster of all tests that need none of their own. Doors leave their tails on it."""
    from tests.fakes.ray_cluster import cluster

    with cluster() as ray:
        yield ray
