"""Whatever crosses a cut as one map, and back: how several tensors share one latent.

Shape legend: N batch; crossing tensors are maps (N, C, H, W) or (N, H, W, C), tokens (N, L, D) or vectors (N, D); the fused
map is (N, F, h, w). A map r times finer than the fused one is folded, r x r of its cells into channels (space to depth), so
nothing is averaged away before the learned projection sees it. Class tokens and vectors have no place of their own: they are
repeated at every cell and averaged on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from protos.errors import ConfigError

Layout = Literal["chw", "hwc", "tokens", "vector"]
_EXTRA_TOKENS = 8  # class, distillation and register tokens at most
_FEWEST = 3  # cells along a side: any length is some square and a rest
MAX_FUSED = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """One crossing tensor as a grid of cells.

    Attributes:
        layout: how it lies in memory.
        channels: C, or D.
        height: H of the grid, 0 where it has none.
        width: W of the grid.
        extra: leading tokens that belong to no cell.
    """

    layout: Layout
    channels: int
    height: int = 0
    width: int = 0
    extra: int = 0


def describe(shapes: Sequence[tuple[int, ...]], at: str) -> tuple[Crossing, ...]:
    """How each crossing tensor lies on a grid.

    Args:
        shapes: without the batch axis.
        at: the cut's name, for the error.

    Raises:
        ConfigError: no tensor has a grid, or one can be given none.
    """
    grids = [_map(s) for s in shapes if len(s) == 3]
    known = {(g.height, g.width) for g in grids}
    found = []
    for shape in shapes:
        one = _map(shape) if len(shape) == 3 else _tokens(shape, known) if len(shape) == 2 else None
        if len(shape) == 1:
            one = Crossing(layout="vector", channels=shape[0])
        if one is None:
            raise ConfigError(
                f"a tensor of shape {shape} crosses {at!r}, which lies on no grid of cells: a learned bottleneck needs maps "
                "(C, H, W), tokens (L, D) with L a square (and up to 8 class tokens), or vectors; choose a cut that only such "
                "tensors cross (`splitters profile MODEL` lists the cuts)"
            )
        found.append(one)
    if not any(c.height for c in found):
        raise ConfigError(f"only vectors cross {at!r}, which leaves no map to make a latent of; choose an earlier cut")
    return tuple(found)


def _map(shape: tuple[int, ...]) -> Crossing:
    last = shape[0] == shape[1] != shape[2]  # windowed transformers keep channels last
    c, h, w = (shape[2], shape[0], shape[1]) if last else shape
    return Crossing(layout="hwc" if last else "chw", channels=c, height=h, width=w)


def _tokens(shape: tuple[int, ...], grids: set[tuple[int, int]]) -> Crossing | None:
    length, width = shape
    for extra in range(min(_EXTRA_TOKENS, length - 1) + 1):
        side = math.isqrt(length - extra)
        grid = next((g for g in grids if g[0] * g[1] == length - extra), (side, side))
        if grid[0] * grid[1] == length - extra and min(grid) >= _FEWEST:
            return Crossing(layout="tokens", channels=width, height=grid[0], width=grid[1], extra=extra)
    return None


def latent_grid(crossings: Sequence[Crossing], shrink: int) -> tuple[int, int]:
    """(h, w) of the fused map: the coarsest crossing grid, ``shrink`` times coarser."""
    coarsest = min((c for c in crossings if c.height), key=lambda c: c.height * c.width)
    return math.ceil(coarsest.height / shrink), math.ceil(coarsest.width / shrink)


def _cells(x: Tensor, c: Crossing) -> tuple[Tensor | None, Tensor | None]:
    """A crossing tensor's grid (N, C, H, W) and its placeless part (N, K, D); None for what it has not."""
    if c.layout == "chw":
        return x, None
    if c.layout == "hwc":
        return x.permute(0, 3, 1, 2), None
    if c.layout == "vector":
        return None, x[:, None]
    grid = x[:, c.extra :].transpose(1, 2).reshape(-1, c.channels, c.height, c.width)
    return grid, x[:, : c.extra] if c.extra else None


class Gather(nn.Module):
    """Crossing tensors to the fused map, each in units of its own deviation so that none drowns.

    Args:
        crossings: what crosses.
        grid: (h, w) of the fused map.
    """

    scale: Tensor

    def __init__(self, crossings: Sequence[Crossing], grid: tuple[int, int]) -> None:
        super().__init__()
        self.crossings, self.grid = tuple(crossings), grid
        self.folds = tuple(_fold(c, grid) for c in crossings)
        self.sizes = tuple(
            (c.channels * f * f if f else 0) + (c.channels if c.layout == "vector" else c.extra * c.channels)
            for c, f in zip(crossings, self.folds, strict=True)
        )
        self.register_buffer("scale", torch.ones(len(self.crossings)))
        if self.channels > MAX_FUSED:
            raise ConfigError(
                f"the tensors that cross here make {self.channels} channels at {grid[0]}x{grid[1]}; the most is {MAX_FUSED}: "
                "choose a later cut or a smaller --shrink"
            )

    @property
    def channels(self) -> int:
        """F."""
        return sum(self.sizes)

    @torch.no_grad()
    def measure(self, tensors: Sequence[Tensor]) -> None:
        """Takes the scales from samples."""
        self.scale.copy_(torch.stack([t.float().std().clamp_min(1e-6) for t in tensors]))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Maps the crossing tensors to (N, F, h, w)."""
        h, w = self.grid
        parts: list[Tensor] = []
        for i, (x, c, fold) in enumerate(zip(tensors, self.crossings, self.folds, strict=True)):
            cells, loose = _cells(x / self.scale[i], c)
            if cells is not None:
                rows, columns = h * fold - c.height, w * fold - c.width
                if rows or columns:
                    cells = functional.pad(cells, (0, columns, 0, rows), mode="replicate")
                parts.append(functional.pixel_unshuffle(cells, fold) if fold > 1 else cells)
            if loose is not None:
                parts.append(loose.flatten(1)[:, :, None, None].expand(-1, -1, h, w))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _fold(c: Crossing, grid: tuple[int, int]) -> int:
    return max(math.ceil(c.height / grid[0]), math.ceil(c.width / grid[1])) if c.height else 0


class Scatter(nn.Module):
    """The inverse of ``Gather``: the fused map back to crossing tensors.

    Args:
        gather: what it undoes; its scales are shared.
    """

    scale: Tensor

    def __init__(self, gather: Gather) -> None:
        super().__init__()
        self.crossings, self.folds, self.sizes = gather.crossings, gather.folds, gather.sizes
        self.register_buffer("scale", gather.scale)

    def forward(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, F, h, w) to the crossing tensors."""
        found: list[Tensor] = []
        for i, (x, c, fold) in enumerate(zip(torch.split(fused, list(self.sizes), 1), self.crossings, self.folds, strict=True)):
            placed = c.channels * fold * fold
            cells, loose = x[:, :placed], x[:, placed:]
            if placed:
                cells = functional.pixel_shuffle(cells, fold) if fold > 1 else cells
                cells = cells[:, :, : c.height, : c.width]
            apart = torch.unflatten(loose.mean((2, 3)), 1, ((x.shape[1] - placed) // c.channels, c.channels))
            found.append(_laid_out(cells, apart, c) * self.scale[i])
        return tuple(found)


def _laid_out(cells: Tensor, loose: Tensor, c: Crossing) -> Tensor:
    if c.layout == "chw":
        return cells
    if c.layout == "hwc":
        return cells.permute(0, 2, 3, 1)
    if c.layout == "vector":
        return loose[:, 0]
    tokens = cells.flatten(2).transpose(1, 2)
    return torch.cat([loose, tokens], 1) if c.extra else tokens
