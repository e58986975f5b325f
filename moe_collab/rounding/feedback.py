"""Rounding with error feedback (GPTQ), and coordinate descent on the same quadratic loss, both in blocks of columns.

The loss of a row q of the rounded weight is (q - w) H (q - w)^T, H the second moment of the inputs, weighted per token.
"""

from __future__ import annotations

import torch

from .grid import Grid, nearest

__all__ = ["coordinate_descent", "damped", "feed_back", "loss", "refit"]

_BLOCK = 128


def damped(moments: torch.Tensor, share: float) -> torch.Tensor:
    """H [batch, columns, columns] with `share` of its mean diagonal added to the diagonal."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-20)
    return moments + torch.diag_embed((share * mean)[:, None].expand(moments.shape[:2]))


def feed_back(weights: torch.Tensor, moments: torch.Tensor, grid: Grid) -> None:
    """GPTQ (arXiv 2210.17323) with static activation order: sets `grid.codes`, keeping its scales and zeros.

    `weights` [batch, rows, columns], `moments` [batch, columns, columns], positive definite.
    """
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    by_column = order[:, None, :].expand_as(weights)
    left = weights.gather(2, by_column)
    scales = grid.wide(grid.scales).gather(2, by_column)
    zeros = grid.wide(grid.zeros).gather(2, by_column)
    sorted_moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(
        2, order[:, None, :].expand_as(moments)
    )
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(sorted_moments)), upper=True)
    codes = torch.empty_like(left)
    columns = left.shape[2]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty_like(left[:, :, start:end])
        for j in range(start, end):
            scale, zero = scales[:, :, j], zeros[:, :, j]
            codes[:, :, j] = nearest(left[:, :, j], scale, zero, grid.scheme)
            error = (left[:, :, j] - (codes[:, :, j] - zero) * scale) / inverse[:, j, j, None]
            left[:, :, j + 1 : end] -= error[:, :, None] * inverse[:, None, j, j + 1 : end]
            errors[:, :, j - start] = error
        left[:, :, end:] -= errors @ inverse[:, start:end, end:]
    grid.codes = torch.empty_like(codes).scatter_(2, by_column, codes)


def coordinate_descent(weights: torch.Tensor, moments: torch.Tensor, grid: Grid, passes: int) -> None:
    """Set one code after the other to the level where the loss is least with all others fixed; the loss never rises."""
    low, high = grid.scheme.levels
    scales, zeros = grid.wide(grid.scales), grid.wide(grid.zeros)
    codes = grid.codes.clone()
    slope = ((codes - zeros) * scales - weights) @ moments
    curvature = moments.diagonal(dim1=-2, dim2=-1)[:, None, :] * scales
    columns = weights.shape[2]
    for _ in range(passes):
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            moved = torch.empty_like(codes[:, :, start:end])
            for j in range(start, end):
                best = (codes[:, :, j] - slope[:, :, j] / curvature[:, :, j]).round().clamp(low, high)
                change = (best - codes[:, :, j]) * scales[:, :, j]
                slope[:, :, start:end] += change[:, :, None] * moments[:, None, j, start:end]
                codes[:, :, j], moved[:, :, j - start] = best, change
            if columns > end - start:
                within = slope[:, :, start:end].clone()
                slope += moved @ moments[:, start:end]
                slope[:, :, start:end] = within
    grid.codes = codes


def refit(weights: torch.Tensor, moments: torch.Tensor, grid: Grid) -> None:
    """Set the scales to those that fit best, by least squares with these codes, pulled a little to the present ones."""
    batch, rows = weights.shape[:2]
    size, groups = grid.group, grid.scales.shape[2]
    levels = grid.codes - grid.wide(grid.zeros)
    target = (levels * (weights @ moments)).reshape(batch, rows, groups, size).sum(-1)
    matrix = weights.new_empty(batch, rows, groups, groups)
    for k in range(groups):
        part = slice(k * size, (k + 1) * size)
        matrix[:, :, k] = ((levels[:, :, part] @ moments[:, part]) * levels).reshape(batch, rows, groups, size).sum(-1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    pull = 1e-3 * diagonal.mean(-1, keepdim=True).clamp_min(1e-9)
    matrix = matrix + torch.diag_embed(pull.expand_as(diagonal))
    fitted = torch.linalg.solve(matrix, (target + pull * grid.scales)[..., None])[..., 0]
    # A scale of zero, or one that is not finite, would lose the group.
    sound = torch.isfinite(fitted) & (fitted.abs() > 1e-8)
    grid.scales = torch.where(sound, fitted, grid.scales)


def loss(weights: torch.Tensor, moments: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(q - w) H (q - w)^T summed over rows, [batch]."""
    error = grid.values() - weights
    return ((error @ moments) * error).sum((1, 2))
