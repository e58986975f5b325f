"""Scales and codes tuned end to end, so that the rounded model's predictions come closer to the original's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from ..decoder import replaced_forward
from ..rounding import Grid
from .adam import adam_steps
from .at_hand import shadowed
from .live import float32_weights, frozen
from .teacher import Lessons, divergence, kl_of

__all__ = ["Tuned", "tune_grids"]

_FACTOR_RATE = 4e-3
_PLACE_RATE = 6e-3
_INSIDE = 0.45
"""Largest distance, in steps of the grid, at which a place may start from its code; at 0.5 another code is as near."""


class Tuned(NamedTuple):
    """Tuned grids, and the KL on held-out tokens, nats each, before and after."""

    grids: dict[str, Grid]
    before: float
    after: float


def tune_grids(model: Any, grids: Mapping[str, Grid], lessons: Lessons, steps: int, dtype: torch.dtype) -> Tuned:
    """Adam on a factor per scale and a place per weight, minimizing KL(lessons || model).

    `grids` (by module name) are the rounded weights; `model` has the original ones. A weight's place is a real number,
    in steps of the grid, and its code is the integer nearest to that. Places start where the original weights lie, or
    as near to there as they can without changing the code, and get gradients as if there were no rounding
    (straight-through estimator, arXiv 1308.3432). Tuning takes five times the memory of the weights in float32.

    Scales are rounded to `dtype` before the unseen lessons judge the result; if KL has not fallen, `grids` are returned
    unchanged.
    """
    with float32_weights(model), frozen(model):
        before = _kl(model, grids, lessons)
        loose = {name: _Loose(grid, model.get_submodule(name).weight.detach()) for name, grid in grids.items()}
        with _in_place(model, loose):
            groups = [([grid.factors for grid in loose.values()], _FACTOR_RATE)]
            groups.append(([grid.places for grid in loose.values()], _PLACE_RATE))
            deque(adam_steps(groups, lessons.known, partial(divergence, model, lessons.head), steps), maxlen=0)
        tuned = {name: grid.stored(dtype) for name, grid in loose.items()}
        after = _kl(model, tuned, lessons)
    return Tuned(tuned, before, after) if after < before else Tuned(dict(grids), before, before)


class _Loose:
    """A grid that can learn: a factor for every scale and, in steps of the grid, a place for every weight."""

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


@torch.no_grad()
def _kl(model: Any, grids: Mapping[str, Grid], lessons: Lessons) -> float:
    with _in_place(model, grids):
        return kl_of(model, lessons.head, lessons.unseen)


@contextmanager
def _in_place(model: Any, grids: Mapping[str, Grid | _Loose]) -> Iterator[None]:
    """Let the modules compute with the weights of `grids` within the block."""
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name, grid in grids.items():
            module = model.get_submodule(name)
            if module is head:
                # `log_probabilities` applies its weight by hand, so it learns nothing and is set once.
                stack.enter_context(shadowed({module: {"weight": grid.values()[0].detach()}}))
            else:
                stack.enter_context(replaced_forward(module, partial(_forward, module.bias, grid)))
        yield


def _forward(bias: torch.Tensor | None, grid: Grid | _Loose, x: torch.Tensor) -> torch.Tensor:
    return linear(x, grid.values()[0].to(x.dtype), bias)
