"""Forms on a device: what agrees and is faster is taken, nothing else. CUDA's own are tested where there is a GPU."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from splitters.accelerate.gpu import SIZES, Graphed, Staged, choose, fastest, in_bfloat16, padded

Arrays = Sequence[NDArray[np.float32]]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def form(factor: float, sleep_s: float) -> object:
    def run(arrays: Arrays) -> list[NDArray[np.float32]]:
        time.sleep(sleep_s)
        return [a * np.float32(factor) for a in arrays]

    return run


EXAMPLES = [[np.random.default_rng(n).standard_normal((n, 50)).astype(np.float32)] for n in (1, 3)]


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({"graph": form(2.0, 0.001)}, "graph"),
        ({"graph": form(2.0, 0.02)}, "plain"),  # slower
        ({"graph": form(2.01, 0.0)}, "plain"),  # another function
        ({"bfloat16": form(2.01, 0.0)}, "bfloat16"),  # as near as bfloat16 has to be
        ({"bfloat16": form(2.2, 0.0)}, "plain"),
        ({"bfloat16": form(float("nan"), 0.0)}, "plain"),
        ({"graph": form(2.0, 0.004), "bfloat16 graph": form(2.0, 0.0)}, "bfloat16 graph"),
    ],
)
def test_the_fastest_that_agrees_is_chosen(others: dict[str, object], chosen: str) -> None:
    assert choose({"plain": form(2.0, 0.01), **others}, EXAMPLES) == chosen  # type: ignore[dict-item]


def test_a_form_that_fails_is_passed_over() -> None:
    def fails(arrays: Arrays) -> list[NDArray[np.float32]]:
        raise RuntimeError("not on this device")

    assert choose({"plain": form(2.0, 0.0), "graph": fails}, EXAMPLES) == "plain"  # type: ignore[dict-item]


def test_batches_are_filled_up_to_the_next_size() -> None:
    assert [padded(n) for n in (1, 2, 3, 5, 8, 9, 16)] == [1, 2, 4, 8, 8, 16, 16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), y * 2


def batch(n: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(n)
    return [rng.standard_normal((n, 3, 8, 8)).astype(np.float32), rng.standard_normal((n, 4)).astype(np.float32)]


def test_staging_and_autocast_on_the_processor() -> None:
    net, cpu = Net().eval(), torch.device("cpu")
    with torch.inference_mode():
        wanted = [t.numpy() for t in net(*(torch.from_numpy(a) for a in batch(3)))]
    for got, want in zip(Staged(net, cpu)(batch(3)), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    half = Staged(in_bfloat16(net, cpu), cpu)(batch(3))
    assert half[0].dtype == np.float32
    assert 0 < np.abs(half[0] - wanted[0]).max() < 0.05
    chosen = fastest(net, "forward", [(3, 8, 8), (4,)], cpu)
    np.testing.assert_allclose(chosen(batch(3))[0], wanted[0], atol=0.05)


@CUDA
def test_graphs_are_the_same_function_at_every_batch() -> None:
    cuda = torch.device("cuda")
    net = Net().eval().to(cuda)
    graphed, staged = Graphed(net, [(3, 8, 8), (4,)], cuda), Staged(net, cuda)
    for n in (*SIZES, 3, 7, 20):
        for got, want in zip(graphed(batch(n)), staged(batch(n)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
