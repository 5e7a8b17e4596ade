"""Whatever crosses a cut as one map, and back: how several tensors share one latent.

Shape legend: N batch; crossing tensors are maps (N, C, H, W) or (N, H, W, C), tokens (N, L, D) or vectors (N, D); the fused
map is (N, F, h, w). A map r times finer than the fused one is folded, r x r of its cells into channels (space to depth), so
nothing is averaged away before the learned projection sees it. Class tokens and vectors have no place of their own: they are
repeated at every cell and averaged on the way back. Many placeless tokens (a detector's queries) would make too many channels so:
each is laid into a cell of its own, as many to a cell as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        extra: leading tokens that belong to no cell; all of them where there is no grid.
        trailing: such tokens behind the grid.
    """

    layout: Layout
    channels: int
    height: int = 0
    width: int = 0
    extra: int = 0
    trailing: int = 0

    @property
    def loose(self) -> int:
        """How many tokens belong to no cell; a vector is one."""
        return 1 if self.layout == "vector" else self.extra + self.trailing

    @property
    def spread(self) -> bool:
        """Whether they are laid into cells of their own instead of repeated at every cell."""
        return self.loose > _EXTRA_TOKENS


TokenGrids = Mapping[int, tuple[int, tuple[int, int]]]
"""Number of tokens to how many lead the grid and the grid's (height, width); what is left trails."""


def describe(shapes: Sequence[tuple[int, ...]], at: str, token_grids: TokenGrids | None = None) -> tuple[Crossing, ...]:
    """How each crossing tensor lies on a grid.

    Args:
        shapes: without the batch axis.
        at: the cut's name, for the error.
        token_grids: what the model's graph says of its tokens; others are guessed from their number.

    Raises:
        ConfigError: no tensor has a grid, or one can be given none.
    """
    grids = [_map(s) for s in shapes if len(s) == 3]
    known = {(g.height, g.width) for g in grids}
    found = []
    told = token_grids or {}
    somewhere = bool(known) or any(len(s) == 2 and s[0] in told for s in shapes)
    for shape in shapes:
        one = _map(shape) if len(shape) == 3 else _tokens(shape, known, told, somewhere) if len(shape) == 2 else None
        if len(shape) == 1:
            one = Crossing(layout="vector", channels=shape[0])
        if one is None:
            raise ConfigError(
                f"a tensor of shape {shape} crosses {at!r}, which lies on no grid of cells: a learned bottleneck needs maps "
                "(C, H, W), tokens (L, D) with L a square (and up to 8 class tokens; any number beside a map), or vectors; choose "
                "a cut that only such tensors cross (`splitters profile MODEL` lists the cuts)"
            )
        found.append(one)
    if not any(c.height for c in found):
        raise ConfigError(f"only vectors cross {at!r}, which leaves no map to make a latent of; choose an earlier cut")
    return tuple(found)


def _map(shape: tuple[int, ...]) -> Crossing:
    last = shape[0] == shape[1] != shape[2]  # windowed transformers keep channels last
    c, h, w = (shape[2], shape[0], shape[1]) if last else shape
    return Crossing(layout="hwc" if last else "chw", channels=c, height=h, width=w)


def _tokens(shape: tuple[int, ...], grids: set[tuple[int, int]], told: TokenGrids, somewhere: bool) -> Crossing | None:
    length, width = shape
    if length in told:
        extra, (height, columns) = told[length]
        trailing = length - extra - height * columns
        return Crossing(layout="tokens", channels=width, height=height, width=columns, extra=extra, trailing=trailing)
    for extra in range(min(_EXTRA_TOKENS, length - 1) + 1):
        side = math.isqrt(length - extra)
        grid = next((g for g in grids if g[0] * g[1] == length - extra), (side, side))
        if grid[0] * grid[1] == length - extra and min(grid) >= _FEWEST:
            return Crossing(layout="tokens", channels=width, height=grid[0], width=grid[1], extra=extra)
    return Crossing(layout="tokens", channels=width, extra=length) if somewhere else None


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
    if not c.height:
        return None, x
    leading, placed, trailing = torch.split(x, [c.extra, c.height * c.width, c.trailing], 1)
    grid = placed.transpose(1, 2).reshape(-1, c.channels, c.height, c.width)
    return grid, torch.cat([leading, trailing], 1) if c.loose else None


def _loose_channels(c: Crossing, grid: tuple[int, int]) -> int:
    """Channels of the fused map that a tensor's placeless part takes."""
    return c.channels * (math.ceil(c.loose / (grid[0] * grid[1])) if c.spread else c.loose)


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
        self.sizes = tuple(c.channels * f * f + _loose_channels(c, grid) for c, f in zip(crossings, self.folds, strict=True))
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
            if loose is not None and c.spread:
                parts.append(_laid_into_cells(loose, h, w))
            elif loose is not None:
                parts.append(loose.flatten(1)[:, :, None, None].expand(-1, -1, h, w))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _laid_into_cells(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (N, K, D) as (N, R * D, h, w), R of them to a cell; cells that are left over hold zeros."""
    rounds = math.ceil(tokens.shape[1] / (h * w))
    padded = functional.pad(tokens, (0, 0, 0, rounds * h * w - tokens.shape[1]))
    return torch.unflatten(padded, 1, (rounds, h * w)).transpose(2, 3).reshape(-1, rounds * tokens.shape[2], h, w)


def _taken_from_cells(cells: Tensor, c: Crossing) -> Tensor:
    """The inverse: (N, R * D, h, w) as tokens (N, K, D)."""
    rounds = torch.unflatten(cells.flatten(2), 1, (-1, c.channels)).transpose(2, 3)
    return rounds.flatten(1, 2)[:, : c.loose]


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
            apart = _taken_from_cells(loose, c) if c.spread else torch.unflatten(loose.mean((2, 3)), 1, (c.loose, c.channels))
            found.append(_laid_out(cells, apart, c) * self.scale[i])
        return tuple(found)


def _laid_out(cells: Tensor, loose: Tensor, c: Crossing) -> Tensor:
    if c.layout == "chw":
        return cells
    if c.layout == "hwc":
        return cells.permute(0, 2, 3, 1)
    if c.layout == "vector":
        return loose[:, 0]
    if not c.height:
        return loose
    tokens = cells.flatten(2).transpose(1, 2)
    return torch.cat([loose[:, : c.extra], tokens, loose[:, c.extra :]], 1) if c.loose else tokens
