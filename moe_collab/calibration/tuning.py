"""Scales and codes tuned end to end, so that the rounded model's predictions come closer to the original's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import kl_div, linear

from ..errors import MoeCollabError
from ..rounding import Grid
from .live import float32_weights, held_out, log_probabilities, mean_kl, replaced_forward, replaced_weights
from .samples import frozen

__all__ = ["Lessons", "Tuned", "teach", "tune_grids"]

Batches = Sequence[Mapping[str, torch.Tensor]]

_TEACHER_BYTES = 2 << 30
_ROWS = 16
"""Sequences to a step."""
_FACTOR_RATE = 2e-3
_PLACE_RATE = 2e-3
_WARM_UP = 10
_INSIDE = 0.45
"""How far from its code, in steps of the grid, a weight may start: nearer than where another code is nearest."""


class Lessons(NamedTuple):
    """Batches, and the log-probabilities that the original model gives their tokens, float16."""

    batches: list[Mapping[str, torch.Tensor]]
    targets: list[torch.Tensor]


class Tuned(NamedTuple):
    """Tuned grids, and the KL on held-out tokens, nats each, before and after."""

    grids: dict[str, Grid]
    before: float
    after: float


@torch.no_grad()
def teach(model: Any, batches: Batches) -> Lessons:
    """What `model` predicts, of as many batches as fit in 2 GiB; ask before its weights change."""
    lessons = Lessons([], [])
    with float32_weights(model):
        for batch in batches:
            lessons.batches.append(batch)
            lessons.targets.append(log_probabilities(model, batch).half())
            if sum(t.nbytes for t in lessons.targets) + lessons.targets[-1].nbytes > _TEACHER_BYTES:
                break
    return lessons


def tune_grids(model: Any, grids: Mapping[str, Grid], lessons: Lessons, steps: int, dtype: torch.dtype) -> Tuned:
    """Adam on a factor per scale and a place per weight, minimizing KL(lessons || model); every eighth batch judges.

    `grids` by module name stand for the weights, the originals of which the model has. A weight's code is the one
    nearest to its place; places start at the originals as far as they keep their codes, and see gradients as if there
    were no rounding (straight-through estimator, arXiv 1308.3432). Takes five times the weights in float32.

    Scales are rounded to `dtype` before the held-out batches judge: if they find no gain, the grids come back as they
    were. Raises `MoeCollabError` if there is only one batch.
    """
    if len(lessons.batches) < 2:
        raise MoeCollabError("tuning needs two batches of calibration data, one of them to judge the other.")
    trained, unseen = held_out(list(zip(*lessons, strict=True)))
    with float32_weights(model), frozen(model):
        before = _kl(model, grids, unseen)
        loose = {name: _Loose(grid, model.get_submodule(name).weight.detach()) for name, grid in grids.items()}
        with _in_place(model, loose):
            _descend(model, list(loose.values()), trained, steps)
        tuned = {name: grid.settled(dtype) for name, grid in loose.items()}
        after = _kl(model, tuned, unseen)
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
    def settled(self, dtype: torch.dtype) -> Grid:
        """The grid as it has become, its scales of `dtype`."""
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


def _descend(model: Any, loose: list[_Loose], data: list, steps: int) -> None:
    factors, places = [grid.factors for grid in loose], [grid.places for grid in loose]
    optimizer = torch.optim.Adam([{"params": factors, "lr": _FACTOR_RATE}, {"params": places, "lr": _PLACE_RATE}])
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_pace, steps=steps))
    order = _shuffled(len(data))
    for _ in range(steps):
        rows = 0
        while rows < _ROWS:
            batch, target = data[next(order)]
            found = log_probabilities(model, batch)
            chosen = _predicted(batch)
            loss = kl_div(found[chosen], target.float()[chosen], reduction="batchmean", log_target=True)
            (loss * len(found)).backward()
            rows += len(found)
        for parameter in (*factors, *places):
            if parameter.grad is not None:
                parameter.grad /= rows
        optimizer.step()
        optimizer.zero_grad()
        pace.step()


def _pace(step: int, steps: int) -> float:
    """Warm-up, then half a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def _shuffled(count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _predicted(batch: Mapping[str, torch.Tensor]) -> Any:
    return batch["attention_mask"][:, 1:].bool() if "attention_mask" in batch else slice(None)


@torch.no_grad()
def _kl(model: Any, grids: Mapping[str, Grid], data: list) -> float:
    with _in_place(model, grids):
        return mean_kl(model, [batch for batch, _ in data], [target for _, target in data])


@contextmanager
def _in_place(model: Any, grids: Mapping[str, Grid | _Loose]) -> Iterator[None]:
    """Let the modules compute with `grids`."""
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name, grid in grids.items():
            module = model.get_submodule(name)
            if module is head:
                # `log_probabilities` applies its weight by hand, so it learns nothing and is set once.
                stack.enter_context(replaced_weights({module.weight: grid.values()[0].detach()}))
            else:
                stack.enter_context(replaced_forward(module, partial(_forward, module.bias, grid)))
        yield


def _forward(bias: torch.Tensor | None, grid: Grid | _Loose, x: torch.Tensor) -> torch.Tensor:
    return linear(x, grid.values()[0].to(x.dtype), bias)
