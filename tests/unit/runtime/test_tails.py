"""What `load_tail` leaves for later runs slower until then, never wrongly."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from splitters.runtime.tail import Later, _OwnAnswers, load_tail
from tests.fakes.bundles import write_tiny_bundle

Arrays = Sequence[NDArray[np.float32]]


def adds(number: float) -> "Runner":
    return Runner(number)


class Runner:
    def __init__(self, number: float) -> None:
        self.number = number

    def __call__(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        return [a + np.float32(self.number) for a in arrays]


ZERO = [np.zeros(2, np.float32)]


def test_without_a_plain_form_the_first_call_makes_it_once() -> None:
    made = []

    def make() -> Runner:
        made.append(1)
        return adds(1)

    later = Later(make)
    assert [later(ZERO)[0][0], later(ZERO)[0][0]] == [1, 1]
    assert made == [1]


def test_the_plain_form_answers_until_the_other_is_made() -> None:
    go = threading.Event()

    def make() -> Runner:
        assert go.wait(60)
        return adds(2)

    later = Later(make, adds(1))
    assert later(ZERO)[0][0] == 1
    thread = threading.Thread(target=later.prepare)
    thread.start()
    assert later(ZERO)[0][0] == 1  # while it is being made, and waits for us
    go.set()
    thread.join(60)
    assert later(ZERO)[0][0] == 2


def test_a_form_that_cannot_be_made_leaves_the_plain_one() -> None:
    def make() -> Runner:
        raise RuntimeError("no")

    later = Later(make, adds(1))
    with pytest.raises(RuntimeError):
        later.prepare()
    assert later(ZERO)[0][0] == 1


def test_a_tail_ready_soon_gives_the_same_answers_before_and_after(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    latent = np.random.default_rng(1).standard_normal((1, *bundle.manifest.latent_shape[0])).astype(np.float32)
    soon, whole = load_tail(bundle, ready_soon=True), load_tail(bundle)
    before = (soon.run([latent], [(32, 32)]), soon.run_images([image], [(32, 32)]))
    soon.prepare()
    after = (soon.run([latent], [(32, 32)]), soon.run_images([image], [(32, 32)]))
    assert before == after == (whole.run([latent], [(32, 32)]), whole.run_images([image], [(32, 32)]))


def test_a_device_that_an_onnx_tail_does_not_run_on_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    load_tail(bundle)
    assert not caplog.records
    load_tail(bundle, device="cuda")
    assert "tiny: its tail is ONNX and runs on the processor, not on cuda" in caplog.text


def test_a_tail_that_answers_by_itself_has_nothing_to_prepare(tmp_path: Path) -> None:
    class Module:
        def answers(self, latents: Arrays, sizes_px: Sequence[tuple[int, int]]) -> list[str]:
            return ["answer"] * len(sizes_px)

    tail = _OwnAnswers(write_tiny_bundle(tmp_path / "tiny"), Module())
    tail.prepare()
    assert tail.run([], [(1, 1)]) == ["answer"]
    assert not tail.takes_images
