"""Adam over batches in random order, with a warm-up and a cosine decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

__all__ = ["adam_steps"]

T = TypeVar("T")

_ROWS = 16
"""Sequences whose gradients make one step; a last batch may bring more."""
_WARM_UP = 10
"""Steps until the learning rate is at its full height."""


def adam_steps(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    data: Sequence[T],
    loss: Callable[[T], tuple[torch.Tensor, int]],
    steps: int,
) -> Iterator[None]:
    """Steps of Adam on `groups` of parameters, each with its learning rate; yields after every step.

    `loss` returns, for one batch of `data`, (the sum of the loss over its rows, number of rows).
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups])
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_pace, steps=steps))
    order = _shuffled(len(data))
    for _ in range(steps):
        rows = 0
        while rows < _ROWS:
            with torch.enable_grad():
                total, count = loss(data[next(order)])
                total.backward()
            rows += count
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= rows
        optimizer.step()
        optimizer.zero_grad()
        pace.step()
        yield


def _pace(step: int, steps: int) -> float:
    """Factor of the learning rate at `step`: a warm-up, times half a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def _shuffled(count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
