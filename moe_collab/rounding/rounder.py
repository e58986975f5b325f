"""From weights, second moments and a scheme to codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import Scheme
from .feedback import descend, factored, feed_back
from .grid import Grid
from .scales import best_grid

__all__ = ["Rounder"]

_SWEEPS = 4
"""Of descent; each later one gains half of what the one before did."""


@dataclass(frozen=True)
class Rounder:
    """Rounds weights with error feedback, and then sets scales and codes to their best values in turn.

    `descent` False is plain GPTQ on searched scales; `feedback` False rounds to nearest. `scale_dtype` is the type in
    which the checkpoint stores scales; the last codes are chosen for scales already rounded to it.
    """

    feedback: bool = True
    descent: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    def __call__(self, weights: torch.Tensor, moments: torch.Tensor, scheme: Scheme) -> Grid:
        """Round `weights` [batch, rows, columns] to `scheme`.

        `moments` [batch, columns, columns] are second moments of their inputs, positive definite.
        """
        rows = weights.float()
        grid = best_grid(rows, moments.diagonal(dim1=-2, dim2=-1), scheme, self.scale_dtype)
        if self.feedback:
            feed_back(rows, factored(moments), grid)
        if self.feedback and self.descent and scheme.num_bits < 8:
            descend(rows, moments, grid, _SWEEPS, self.scale_dtype)
        return grid

    def nearest(self, weights: torch.Tensor, scheme: Scheme) -> Grid:
        """Round `weights` [batch, rows, columns] to nearest, all columns alike."""
        rows = weights.float()
        return best_grid(rows, rows.new_ones(len(rows), rows.shape[2]), scheme, self.scale_dtype)
