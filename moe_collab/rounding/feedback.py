"""Rounding with error feedback (GPTQ), and descent on the same quadratic loss, both in blocks of columns.

The loss of a row q of the rounded weight is (q - w) H (q - w)^T, H the second moment of the inputs, weighted per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .grid import Grid
from .loops import BLOCK, descend_block, feed_back_block, fitted_scale

__all__ = ["Factored", "descend", "factored", "feed_back", "left_over", "loss"]

_DAMPING = 0.007
"""Share of the mean diagonal that is added to the diagonal for feedback alone."""


class Factored(NamedTuple):
    """P (H + damping) P^T = L D L^T, columns in the `order` in which they are rounded, from the last to the first."""

    order: torch.Tensor
    """int64 [batch, columns], the least important column first."""
    factor: torch.Tensor
    """L, unit lower triangular, [batch, columns, columns]."""
    diagonal: torch.Tensor
    """D [batch, columns]."""


def factored(moments: torch.Tensor) -> Factored:
    """The LDL decomposition of `moments` [batch, columns, columns], positive definite, for `feed_back`."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(-1)
    ordered = torch.empty_like(moments)
    for own, by, target in zip(moments, order, ordered, strict=True):
        torch.index_select(own.index_select(0, by), 1, by, out=target)
    ordered.diagonal(dim1=-2, dim2=-1).add_(_DAMPING * diagonal.mean(-1, keepdim=True).clamp_min(1e-20))
    factor = torch.linalg.cholesky(ordered, out=ordered)
    pivots = factor.diagonal(dim1=-2, dim2=-1).clone()
    factor /= pivots[:, None, :]
    return Factored(order, factor, pivots.square())


def left_over(moments: torch.Tensor) -> torch.Tensor:
    """What a squared rounding error in each column costs once `feed_back` has made up for it, [batch, columns]."""
    found = factored(moments)
    return torch.empty_like(found.diagonal).scatter_(1, found.order, found.diagonal)


def feed_back(weights: torch.Tensor, found: Factored, grid: Grid) -> None:
    """GPTQ (arXiv 2210.17323) with static activation order: sets `grid.codes`, keeping its scales and zeros.

    Columns are rounded in turn. With e the errors so far, column j is w_j - sum_i e_i L_ij when its turn comes. That is
    what GPTQ's inverse gives too (arXiv 2307.13304, theorem 6), for half the arithmetic. `weights` are [batch, rows,
    columns].
    """
    left = weights.gather(2, found.order[:, None, :].expand_as(weights))
    grid.codes = torch.empty_like(weights)
    for stop in range(weights.shape[2], 0, -BLOCK):
        part = slice(max(0, stop - BLOCK), stop)
        errors = feed_back_block(weights, left, grid, found.order, found.factor, part)
        before = slice(part.start)
        left[:, :, before].baddbmm_(errors, found.factor[:, part, before], alpha=-1)


def descend(weights: torch.Tensor, moments: torch.Tensor, grid: Grid, sweeps: int, scale_dtype: torch.dtype) -> None:
    """Set scales and codes to their best values in turn with all else fixed; the loss never rises.

    A sweep over all columns costs one product of the weight's shape with `moments` [batch, columns, columns].
    """
    columns, group = weights.shape[2], grid.group
    block = BLOCK // group * group if group <= BLOCK else BLOCK
    slope = (grid.values() - weights) @ moments
    for sweep in range(sweeps):
        if group > BLOCK:
            _fit_long_groups(moments, grid, slope, scale_dtype)
        for part in _blocks(columns, group, block):
            change = descend_block(grid, slope, moments, part, scale_dtype)
            rest = slice(part.stop if sweep == sweeps - 1 else 0, columns)
            slope[:, :, rest].baddbmm_(change, moments[:, part, rest])


def _blocks(columns: int, group: int, block: int) -> list[slice]:
    """Blocks that hold whole groups, or parts of one."""
    span = max(group, block)
    starts = [start for first in range(0, columns, span) for start in range(first, min(first + span, columns), block)]
    return [slice(start, min(start + block, start - start % span + span, columns)) for start in starts]


def _fit_long_groups(moments: torch.Tensor, grid: Grid, slope: torch.Tensor, scale_dtype: torch.dtype) -> None:
    """Fit scales of groups longer than a block, as `descend_block` does with shorter ones."""
    for index in range(grid.scales.shape[2]):
        part = slice(index * grid.group, (index + 1) * grid.group)
        levels, scale = grid.codes[:, :, part] - grid.zeros[:, :, index, None], grid.scales[:, :, index, None]
        pulled = levels @ moments[:, part]
        fitted = fitted_scale(scale, levels, slope[:, :, part], pulled[:, :, part], scale_dtype)
        slope += (fitted - scale) * pulled
        grid.scales[:, :, index] = fitted[:, :, 0]


def loss(weights: torch.Tensor, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(q - w) H (q - w)^T summed over rows, [batch]."""
    error = grid.values() - weights
    return ((error @ moments) * error).sum((1, 2))
