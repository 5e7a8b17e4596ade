"""One bad bundle blocks none of the others, neither at the start nor when bundles are read again."""

import shutil
from pathlib import Path

import pytest

from edge_server.backends import Load, TailAnswer, TailWork
from edge_server.loading import bring_up_to_date
from edge_server.models import Model, ModelStore
from protos.errors import BundleError, ModelError, UnknownModelError
from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle


class Loads:
    """A backend that only loads, and fails on the models it is told to."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing

    async def load(self, bundle: Bundle) -> None:
        if bundle.manifest.name in self.failing:
            raise ModelError("no") if bundle.manifest.name == "model-error" else TypeError("ours")

    async def unload(self, bundle_sha256: str) -> None:
        raise NotImplementedError

    async def run(self, work: TailWork) -> TailAnswer:
        raise NotImplementedError

    def load_now(self) -> Load:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


async def update(store: ModelStore, *failing: str) -> tuple[list[str], int]:
    """The names of the models put into use, and how many others were not."""
    used: list[tuple[Model, Model | None]] = []
    failures = await bring_up_to_date(store, Loads(*failing), lambda *each: used.append(each))
    return [model.name for model, _ in used], len(failures)


def sources(tmp_path: Path, *names: str) -> list[str]:
    return [str(write_tiny_bundle(tmp_path / name, name=name).path) for name in names]


async def test_the_others_are_served_and_the_bad_one_is_once_it_is_mended(tmp_path: Path) -> None:
    paths = sources(tmp_path, "a", "b", "c")
    good = tmp_path / "good"
    shutil.copytree(paths[0], good)
    (tmp_path / "a" / "server" / "tail.onnx").write_bytes(b"x")
    store = ModelStore(paths)
    assert await update(store) == (["b", "c"], 1)
    assert store.get("").name == "b"
    assert await update(store) == ([], 1)
    shutil.rmtree(paths[0])
    shutil.move(good, paths[0])
    assert await update(store) == (["a"], 0)
    assert [m.name for m in store.all()] == ["a", "b", "c"]
    assert store.get("").name == "a"


@pytest.mark.parametrize("failing", ["model-error", "type-error"])
async def test_a_tail_that_cannot_be_loaded_leaves_the_others_alone(tmp_path: Path, failing: str) -> None:
    store = ModelStore(sources(tmp_path, failing, "good"))
    assert await update(store, failing) == (["good"], 1)
    with pytest.raises(UnknownModelError, match="it holds good"):
        store.get(failing)


async def test_a_replacement_that_is_bad_in_any_way_leaves_the_old_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sources(tmp_path, "a", "b")
    store = ModelStore(paths)
    await update(store)
    first = store.get("a").sha256
    write_tiny_bundle(tmp_path / "a", name="b", seed=5)  # another's name
    write_tiny_bundle(tmp_path / "b", name="b", seed=6)
    assert await update(store) == (["b"], 1)
    write_tiny_bundle(tmp_path / "a", name="a", seed=7)

    def failing(path: Path) -> Model:
        raise RecursionError(path)

    monkeypatch.setattr("edge_server.models.open_model", failing)
    assert await update(store) == ([], 2)
    assert store.get("a").sha256 == first


async def test_sources_that_contradict_each_other_are_refused_at_the_start(tmp_path: Path) -> None:
    [a] = sources(tmp_path, "a")
    for paths, error in (([a, a], BundleError), ([a, "no-such-model"], UnknownModelError)):
        store = ModelStore(paths)
        with pytest.raises(error):
            await update(store)
        assert store.all() == []
