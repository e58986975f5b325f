"""Scales tuned end to end, codes fixed, so that the rounded model's predictions come closer to the original's."""

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

__all__ = ["Lessons", "Tuned", "teach", "tune_scales"]

Batches = Sequence[Mapping[str, torch.Tensor]]

_TEACHER_BYTES = 2 << 30
_ROWS = 16
"""Sequences to a step."""
_RATE = 3e-3
_WARM_UP = 10


class Lessons(NamedTuple):
    """Batches, and the log-probabilities that the original model gives their tokens, float16."""

    batches: list[Mapping[str, torch.Tensor]]
    targets: list[torch.Tensor]


class Tuned(NamedTuple):
    """Grids with tuned scales, and the KL on held-out tokens, nats each, before and after."""

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


def tune_scales(model: Any, grids: Mapping[str, Grid], lessons: Lessons, steps: int, dtype: torch.dtype) -> Tuned:
    """Adam on a factor per scale, minimizing KL(lessons || model), on all batches but every eighth.

    `grids` by module name stand for the weights. Scales are rounded to `dtype` before the held-out batches judge: if
    they find no gain, the grids come back as they were. Raises `MoeCollabError` if there is only one batch.
    """
    if len(lessons.batches) < 2:
        raise MoeCollabError("tuning of scales needs two batches of calibration data, one of them to judge the other.")
    trained, unseen = held_out(list(zip(*lessons, strict=True)))
    factors = {name: nn.Parameter(torch.ones_like(grid.scales)) for name, grid in grids.items()}
    with float32_weights(model), frozen(model):
        before = _kl(model, grids, unseen)
        with _grids_in_place(model, grids, factors):
            _descend(model, list(factors.values()), trained, steps)
        tuned = {name: _scaled(grid, factors[name].detach(), dtype) for name, grid in grids.items()}
        after = _kl(model, tuned, unseen)
    return Tuned(tuned, before, after) if after < before else Tuned(dict(grids), before, before)


def _descend(model: Any, parameters: list[nn.Parameter], data: list, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
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
        for parameter in parameters:
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


def _scaled(grid: Grid, factor: torch.Tensor, dtype: torch.dtype) -> Grid:
    return replace(grid, scales=(grid.scales * factor).to(dtype).float())


@torch.no_grad()
def _kl(model: Any, grids: Mapping[str, Grid], data: list) -> float:
    with _grids_in_place(model, grids, {}):
        return mean_kl(model, [batch for batch, _ in data], [target for _, target in data])


@contextmanager
def _grids_in_place(model: Any, grids: Mapping[str, Grid], factors: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let the modules compute with `grids`, their scales times `factors`."""
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name, grid in grids.items():
            module = model.get_submodule(name)
            if module is head:
                # `log_probabilities` applies its weight by hand, so it keeps its scales and is set once.
                stack.enter_context(replaced_weights({module.weight: grid.values()[0]}))
                continue
            forward = partial(_forward, module.bias, grid, factors.get(name))
            stack.enter_context(replaced_forward(module, forward))
        yield


def _forward(bias: torch.Tensor | None, grid: Grid, factor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    scales = grid.scales if factor is None else grid.scales * factor
    weight = (grid.codes[0] - grid.wide(grid.zeros)[0]) * grid.wide(scales)[0]
    return linear(x, weight.to(x.dtype), bias)
