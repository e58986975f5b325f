"""Grids that learn: the scales and codes of rounded weights as real numbers that take gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import linear

from ..rounding import Grid
from .adam import Adam, pauses
from .results import Bookmark

__all__ = ["LooseGrid", "forward_with", "learn_grids"]

T = TypeVar("T")

_FACTOR_RATE = 4e-3
_PLACE_RATE = 6e-3
_INSIDE = 0.45
"""Largest distance, in steps of the grid, at which a place may start from its code; at 0.5 another code is as near."""


class LooseGrid:
    """A grid that can learn: a factor for every scale and, in steps of the grid, a place for every weight.

    The code of a weight is the integer nearest to its place. Places start where the `original` weights lie, or as near
    to there as they can without changing the code, and get gradients as if there were no rounding (straight-through
    estimator, arXiv 1308.3432).
    """

    def __init__(self, grid: Grid, original: torch.Tensor) -> None:
        self._grid = grid
        wanted = original.float()[None] / grid.wide(grid.scales) + grid.wide(grid.zeros)
        self.places = nn.Parameter(grid.codes + (wanted - grid.codes).clamp(-_INSIDE, _INSIDE))
        self.factors = nn.Parameter(torch.ones_like(grid.scales))

    def values(self) -> torch.Tensor:
        """The weights [1, rows, columns]."""
        codes = _Nearest.apply(self.places, *self._grid.scheme.levels)
        return replace(self._grid, codes=codes, scales=self._grid.scales * self.factors).values()

    @torch.no_grad()
    def stored(self, dtype: torch.dtype) -> Grid:
        """The grid that was learned, its scales rounded to `dtype`."""
        codes = _Nearest.apply(self.places, *self._grid.scheme.levels)
        return replace(self._grid, codes=codes, scales=(self._grid.scales * self.factors).to(dtype).float())


class _Nearest(torch.autograd.Function):
    """The nearest of the codes low ... high; backward as if there were no rounding."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, low: int, high: int) -> torch.Tensor:
        ctx.save_for_backward((places >= low - 0.5) & (places <= high + 0.5))
        return places.round().clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (within,) = ctx.saved_tensors
        return gradients[0] * within, None, None


def learn_grids(
    grids: Collection[LooseGrid],
    data: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, int]],
    steps: int,
    bookmark: Bookmark | None = None,
) -> None:
    """Adam on `grids`. `loss` returns, for one item of `data`, (the sum of the loss over its rows, number of rows).

    It goes on from `bookmark`, if there is one, and is kept there at every pause.
    """
    groups = [([grid.factors for grid in grids], _FACTOR_RATE), ([grid.places for grid in grids], _PLACE_RATE)]
    adam = Adam(groups, data, loss, steps)
    if bookmark is not None and (kept := bookmark.found()) is not None:
        adam.go_on_from(kept)
    for step in (step for step in pauses(steps) if step > adam.taken):
        adam.go_to(step)
        if bookmark is not None:
            bookmark.put(adam.state())


def forward_with(bias: torch.Tensor | None, grid: Grid | LooseGrid, x: torch.Tensor) -> torch.Tensor:
    """What a Linear with the weight of `grid` makes of `x`."""
    return linear(x, grid.values()[0].to(x.dtype), bias)
