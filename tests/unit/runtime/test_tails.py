"""A loaded tail: where it runs, and one that makes its answers by itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from splitters.runtime.tail import _OwnAnswers, load_tail
from tests.fakes.bundles import write_tiny_bundle

Arrays = Sequence[NDArray[np.float32]]


def test_a_device_that_an_onnx_tail_does_not_run_on_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    load_tail(bundle)
    assert not caplog.records
    load_tail(bundle, device="cuda")
    assert "tiny: its tail is ONNX and runs on the processor, not on cuda" in caplog.text


def test_a_tail_that_answers_by_itself_takes_no_pictures(tmp_path: Path) -> None:
    class Module:
        def answers(self, latents: Arrays, sizes_px: Sequence[tuple[int, int]]) -> list[str]:
            return ["answer"] * len(sizes_px)

    tail = _OwnAnswers(write_tiny_bundle(tmp_path / "tiny"), Module())
    assert tail.run([], [(1, 1)]) == ["answer"]
    assert not tail.takes_images
