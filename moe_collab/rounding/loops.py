"""The loops of rounding that go column by column: compiled where the weights' device has them, else in torch.

The compiled ones (`kernels/cpu/rounding_loops.h`) compute the same to the last bits of float32: 128 columns one after
the other are thousands of small operations for torch, which take it longer than the matrix products between them.
Matrices are [batch, rows, columns]; a block is a range of at most `BLOCK` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from loguru import logger

from ..errors import MoeCollabError
from ..kernels.cpu import load
from .grid import Grid, nearest

__all__ = ["BLOCK", "descend_block", "feed_back_block", "search"]

BLOCK = 128
"""Most columns that are dealt with one after the other before a matrix product tells the others of it."""
_CANDIDATE_BYTES = 1 << 25
"""Of candidates that are compared together."""

Candidates = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]
"""Weights in groups [rows, groups, columns] -> pairs (scale, zero point) to try, [rows, groups] each."""


@cache
def _is_compiled(device_type: str) -> bool:
    if device_type == "cpu":
        try:
            load()
        except MoeCollabError as error:
            logger.warning("rounding takes several times as long without the compiled loops: {}", error)
            return False
    key = torch._C._dispatch_key_for_device(device_type)
    # Not having loaded the library is asking for an operation that is not known.
    return hasattr(torch.ops.moe_collab, "round_descend") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "moe_collab::round_descend", key
    )


def search(
    weights: torch.Tensor, importance: torch.Tensor, group: int, candidates: Candidates, levels: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(least loss, scales, zero points), [batch, rows, groups] each, of rounding every group to nearest.

    The loss is the squared error weighted by `importance` [batch, columns].
    """
    rows, grouped = weights.shape[1], weights.reshape(*weights.shape[:2], -1, group)
    found = [torch.empty(grouped.shape[:3], device=weights.device) for _ in range(3)]
    count = max(1, _CANDIDATE_BYTES // (4 * 64 * grouped.shape[2]))
    best_of = _compiled_search if _is_compiled(weights.device.type) else _search
    for index, own in enumerate(grouped):
        for start in range(0, rows, count):
            part = slice(start, start + count)
            best = best_of(own[part], importance[index], candidates, levels)
            for whole, piece in zip(found, best, strict=True):
                whole[index, part] = piece
    loss, scales, zeros = found
    return loss, scales, zeros


def _compiled_search(
    grouped: torch.Tensor, importance: torch.Tensor, candidates: Candidates, levels: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    scales, zeros = map(torch.stack, zip(*candidates(grouped), strict=True))
    loss = torch.empty_like(scales[0])
    chosen = torch.empty_like(loss, dtype=torch.long)
    torch.ops.moe_collab.round_search(
        grouped.flatten(1).contiguous(), importance.contiguous(), scales, zeros, *levels, loss, chosen
    )
    return loss, *(values.gather(0, chosen[None])[0] for values in (scales, zeros))


def _search(
    grouped: torch.Tensor, importance: torch.Tensor, candidates: Candidates, levels: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    best = torch.full(grouped.shape[:2], torch.inf, device=grouped.device)
    scales, zeros = torch.ones_like(best), torch.zeros_like(best)
    weighing = importance.reshape(grouped.shape[1:])
    for scale, zero in candidates(grouped):
        wide_scale, wide_zero = scale[..., None], zero[..., None]
        codes = nearest(grouped, wide_scale, wide_zero, levels)
        loss = (((codes - wide_zero) * wide_scale - grouped).square() * weighing).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return best, scales, zeros


def feed_back_block(
    weights: torch.Tensor, left: torch.Tensor, grid: Grid, order: torch.Tensor, factor: torch.Tensor, part: slice
) -> torch.Tensor:
    """Choose the codes of columns `order[:, part]`, the last one first; returns their errors [batch, rows, n].

    `left` are the weights in that order, with the errors of columns chosen so far made up for; `factor` is the unit
    lower triangular factor of the second moment, in that order.
    """
    if _is_compiled(weights.device.type):
        errors = weights.new_empty(*weights.shape[:2], part.stop - part.start)
        for index, own in enumerate(weights):
            torch.ops.moe_collab.round_feed_back(
                own,
                left[index],
                grid.scales[index],
                grid.zeros[index],
                order[index],
                factor[index],
                part.start,
                *grid.scheme.levels,
                grid.codes[index],
                errors[index],
            )
        return errors
    return _feed_back_block(weights, left[:, :, part], grid, order[:, part], factor[:, part, part])


def _feed_back_block(
    weights: torch.Tensor, left: torch.Tensor, grid: Grid, order: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    by_column = order[:, None, :].expand(-1, weights.shape[1], -1)
    by_group = by_column // grid.group
    weights, scales, zeros = (
        weights.gather(2, by_column),
        grid.scales.gather(2, by_group),
        grid.zeros.gather(2, by_group),
    )
    codes, errors = torch.empty_like(weights), torch.empty_like(weights)
    for j in reversed(range(codes.shape[2])):
        codes[:, :, j] = nearest(left[:, :, j], scales[:, :, j], zeros[:, :, j], grid.scheme.levels)
        errors[:, :, j] = (codes[:, :, j] - zeros[:, :, j]) * scales[:, :, j] - weights[:, :, j]
        left[:, :, :j] -= errors[:, :, j, None] * factor[:, None, j, :j]
    grid.codes.scatter_(2, by_column, codes)
    return errors


def descend_block(
    grid: Grid, slope: torch.Tensor, moments: torch.Tensor, part: slice, scale_dtype: torch.dtype
) -> torch.Tensor:
    """Fit the scales of a block's groups, and then each code to the level where the loss is least.

    Everything is set to its best value with all else fixed, group by group: first the scale, stored as `scale_dtype`
    (only of groups that lie within the block), then the codes. `slope` is half the loss's derivative by the weight.
    Returns by how much the weight changes, [batch, rows, n].
    """
    if _is_compiled(slope.device.type):
        change = slope.new_empty(*slope.shape[:2], part.stop - part.start)
        for index, own in enumerate(slope):
            torch.ops.moe_collab.round_descend(
                grid.codes[index],
                grid.scales[index],
                grid.zeros[index],
                own,
                moments[index],
                part.start,
                *grid.scheme.levels,
                str(scale_dtype).removeprefix("torch."),
                change[index],
            )
        return change
    return _descend_block(grid, slope[:, :, part].clone(), moments[:, part, part], part, scale_dtype)


def _descend_block(
    grid: Grid, slope: torch.Tensor, moments: torch.Tensor, part: slice, scale_dtype: torch.dtype
) -> torch.Tensor:
    low, high = grid.scheme.levels
    codes, change, width = grid.codes[:, :, part], torch.empty_like(slope), slope.shape[2]
    for begin in range(0, width, grid.group):
        own = slice(begin, min(begin + grid.group, width))
        group = (part.start + begin) // grid.group
        zero, scale = grid.zeros[:, :, group, None], grid.scales[:, :, group, None]
        before = (codes[:, :, own] - zero) * scale
        if grid.group <= width:
            levels = codes[:, :, own] - zero
            pulled = levels @ moments[:, own]
            scale = fitted_scale(scale, levels, slope[:, :, own], pulled[:, :, own], scale_dtype)
            slope += (scale - grid.scales[:, :, group, None]) * pulled
            grid.scales[:, :, group] = scale[:, :, 0]
        for j in range(own.start, own.stop):
            best = codes[:, :, j] - slope[:, :, j] / (moments[:, j, j, None] * scale[:, :, 0])
            best = best.clamp(low, high).round()
            slope += ((best - codes[:, :, j]) * scale[:, :, 0])[:, :, None] * moments[:, None, j]
            codes[:, :, j] = best
        change[:, :, own] = (codes[:, :, own] - zero) * scale - before
    return change


def fitted_scale(
    scale: torch.Tensor, levels: torch.Tensor, slope: torch.Tensor, pulled: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The scale [..., 1] of a group that fits best with codes that are so many `levels` from zero, stored as `dtype`.

    `pulled` is `levels` times the second moment. A scale of zero, or one that is not finite, would lose the group.
    """
    curvature = (levels * pulled).sum(-1, keepdim=True)
    fitted = scale - (levels * slope).sum(-1, keepdim=True) / (curvature + 1e-3 * curvature.clamp_min(1e-9))
    fitted = fitted.to(dtype).float()
    return torch.where(torch.isfinite(fitted) & (fitted.abs() > 1e-8), fitted, scale)
