"""A node that nobody has copied a bundle to has it all the same, verified, once."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

from edge_server.backends.ray.bundles import files_of, obtained
from edge_server.backends.ray.register import Files
from protos.errors import BundleError, StorageError, UnknownModelError
from splitters.bundle import Bundle


class Source:
    def __init__(self, files: Files | None) -> None:
        self.files = files
        self.asked = 0

    async def __call__(self, sha256: str) -> Files | None:
        self.asked += 1
        return self.files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


async def test_a_bundle_that_lies_there_is_not_fetched(bundle: Bundle) -> None:
    source = Source(None)
    assert (await obtained(str(bundle.path), bundle.sha256, source)).path == bundle.path
    assert source.asked == 0


async def test_one_that_does_not_is_fetched_once(bundle: Bundle, cache: Path) -> None:
    source = Source(files_of(bundle))
    for _ in range(2):
        found = await obtained("/nowhere", bundle.sha256, source)
        assert (found.sha256, found.points) == (bundle.sha256, bundle.points)
        assert found.path.is_relative_to(cache)
    assert source.asked == 1


async def test_another_bundle_at_its_place_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    from tests.fakes.bundles import write_tiny_bundle

    other = write_tiny_bundle(tmp_path / "other", name="other", seed=7)
    found = await obtained(str(other.path), bundle.sha256, Source(files_of(bundle)))
    assert found.sha256 == bundle.sha256
    assert found.path != other.path


async def test_what_was_altered_in_the_cache_is_fetched_again(bundle: Bundle) -> None:
    source = Source(files_of(bundle))
    kept = await obtained("/nowhere", bundle.sha256, source)
    next(p for p in kept.path.rglob("*") if p.is_file() and p.suffix != ".json").write_bytes(b"?")
    assert (await obtained("/nowhere", bundle.sha256, source)).sha256 == bundle.sha256
    assert source.asked == 2


async def test_what_is_not_that_bundle_is_not_kept(bundle: Bundle, cache: Path) -> None:
    files = dict(files_of(bundle))
    files["../../stray"] = b"?"
    with pytest.raises(BundleError, match="not a plain relative path"):
        await obtained("/nowhere", bundle.sha256, Source(files))
    with pytest.raises(BundleError, match="not bundle ffffff"):
        await obtained("/nowhere", "f" * 64, Source(files_of(bundle)))
    assert [p for p in cache.rglob("*") if p.is_file()] == []


async def test_a_bundle_nobody_has_is_said(bundle: Bundle) -> None:
    with pytest.raises(UnknownModelError, match="neither at /nowhere on this node"):
        await obtained("/nowhere", bundle.sha256, Source(None))


async def test_a_node_that_cannot_keep_it_says_where(bundle: Bundle, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(StorageError, match="HEADTAIL_CACHE"):
        await obtained("/nowhere", bundle.sha256, Source(files_of(bundle)))


def test_files_of_a_bundle_that_was_replaced_are_not_handed_in(bundle: Bundle, tmp_path: Path) -> None:
    from dataclasses import replace

    from tests.fakes.bundles import write_tiny_bundle

    other = write_tiny_bundle(tmp_path / "other", name="other", seed=7)
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(bundle.path, tmp_path / "other")
    with pytest.raises(BundleError, match="was replaced"):
        files_of(replace(other, path=tmp_path / "other"))
