"""From weights, second moments and a scheme to codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Scheme
from .feedback import coordinate_descent, damped, feed_back, refit
from .grid import Grid, nearest
from .scales import best_grid

__all__ = ["Rounder"]


@dataclass(frozen=True)
class Rounder:
    """Rounds weights with error feedback, and then alternates coordinate descent with refitting the scales.

    `descent` False is plain GPTQ on searched scales; `feedback` False rounds to nearest. `scale_dtype` is the type in
    which the checkpoint stores scales; the last codes are chosen for scales already rounded to it.
    """

    feedback: bool = True
    descent: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    def __call__(self, weights: torch.Tensor, moments: torch.Tensor, scheme: Scheme) -> Grid:
        """Round `weights` [batch, rows, columns] to `scheme`.

        `moments` [batch, row blocks, columns, columns] are second moments of their inputs: a weight's rows fall into
        equal blocks, each with a second moment of its own.
        """
        batch, blocks = moments.shape[:2]
        moments = moments.flatten(0, 1)
        rows = weights.float().reshape(batch * blocks, -1, weights.shape[2])
        grid = best_grid(rows, moments.diagonal(dim1=-2, dim2=-1), scheme)
        self._narrow(grid)
        if self.feedback:
            feed_back(rows, damped(moments, 0.01), grid)
        else:
            grid.codes = nearest(rows, grid.wide(grid.scales), grid.wide(grid.zeros), scheme)
        if self.feedback and self.descent and scheme.num_bits < 8:
            self._descend(rows, damped(moments, 0.003), grid)
        return grid.reshaped(batch)

    def _descend(self, rows: torch.Tensor, moments: torch.Tensor, grid: Grid) -> None:
        refit(rows, moments, grid)
        coordinate_descent(rows, moments, grid, passes=2)
        refit(rows, moments, grid)
        self._narrow(grid)
        coordinate_descent(rows, moments, grid, passes=1)

    def _narrow(self, grid: Grid) -> None:
        grid.scales = grid.scales.to(self.scale_dtype).float()
