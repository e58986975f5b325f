"""Search for the scales and zero points whose nearest codes have the least squared error, weighted by column."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..formats import TERNARY, Scheme
from .grid import Grid, nearest
from .loops import search

__all__ = ["best_grid", "nearest_loss"]

_TINY = 1e-9


def best_grid(weights: torch.Tensor, importance: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """Round `weights` [batch, rows, columns] to nearest on the best grid found, with scales as `scale_dtype` has them.

    `importance` [batch, columns] weights the squared errors of each column; it is the diagonal of the second moment.
    """
    group = scheme.group_of(weights.shape[2])
    _, scales, zeros = search(weights, importance, group, partial(_candidates, scheme=scheme), scheme.levels)
    narrow = scales.to(scale_dtype).float()
    scales = torch.where(narrow == 0, torch.finfo(scale_dtype).tiny, narrow)
    codes = nearest(weights.reshape(*scales.shape, -1), scales[..., None], zeros[..., None], scheme.levels)
    return Grid(scheme, codes.view(weights.shape), scales, zeros)


def nearest_loss(weights: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The loss that `best_grid` reaches, summed over columns, [batch, rows]."""
    group = scheme.group_of(weights.shape[2])
    return search(weights, importance, group, partial(_candidates, scheme=scheme), scheme.levels)[0].sum(-1)


def _candidates(grouped: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (scale, zero point) to try, each [rows, groups]."""
    if scheme.symmetric:
        yield from _symmetric(grouped, scheme)
    elif scheme.num_bits == 2:
        # Four levels: every place of zero among them, and scales from the whole range down to a third.
        span = _span(grouped)
        for zero in (-2.0, -1.0, 0.0, 1.0):
            for step in range(13):
                yield span * (1.06 - 0.06 * step) / 3, torch.full_like(span, zero)
    else:
        yield from _clipped(grouped, scheme)


def _symmetric(grouped: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    largest = grouped.abs().amax(-1).clamp_min(_TINY)
    base = largest if scheme.num_bits == TERNARY else 2 * largest / (2**scheme.num_bits - 1)
    zero = torch.zeros_like(largest)
    for step in range(24):
        scale = base * (1 - 0.03 * step)
        yield scale, zero
        # The levels reach one further below zero than above; a negative scale turns that around.
        if scheme.num_bits in (2, 3):
            yield -scale, zero


def _clipped(grouped: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    low, high = scheme.levels
    lowest, highest = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    ends = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62) if scheme.num_bits == 3 else (1.0, 0.95, 0.9, 0.85, 0.8)
    for bottom in ends:
        for top in ends:
            scale = ((highest * top - lowest * bottom) / (high - low)).clamp_min(_TINY)
            yield scale, (low - lowest * bottom / scale).round().clamp(low, high)


def _span(grouped: torch.Tensor) -> torch.Tensor:
    return (grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)).clamp_min(_TINY)
