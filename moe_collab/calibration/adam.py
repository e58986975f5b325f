"""Adam over batches in random order, with a warm-up and a cosine decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import nn

__all__ = ["Adam", "pauses"]

T = TypeVar("T")

_ROWS = 16
"""Sequences whose gradients make one step; a last batch may bring more."""
_WARM_UP = 10
"""Steps until the learning rate is at its full height."""
_PAUSES = 10
"""About how often learning pauses, evenly over its steps, to judge or to keep what was learned."""
_OWN = ("step", "exp_avg", "exp_avg_sq")
"""What torch's Adam knows of a parameter, once it had a gradient."""


class Adam(Generic[T]):
    """Adam on `groups` of parameters, each with its learning rate, which falls over `steps` steps.

    `loss` returns, for one batch of `data`, (the sum of the loss over its rows, number of rows). Another one, made of
    the same, goes on from the `state` of this one with the same bits.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[nn.Parameter], float]],
        data: Sequence[T],
        loss: Callable[[T], tuple[torch.Tensor, int]],
        steps: int,
    ) -> None:
        self.taken = 0
        """Steps that were taken."""
        self._parameters = [parameter for group, _ in groups for parameter in group]
        self._rates = [rate for _, rate in groups]
        self._optimizer = torch.optim.Adam([{"params": group} for group, _ in groups])
        self._data, self._loss, self._steps = data, loss, steps
        self._order, self._drawn = _shuffled(len(data)), 0

    def go_to(self, step: int) -> None:
        """Take steps until it is `step` of them."""
        while self.taken < step:
            self._step()

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next steps depend on; its tensors change with them."""
        found = {f"value.{index}": parameter.detach() for index, parameter in enumerate(self._parameters)}
        for index, own in self._optimizer.state_dict()["state"].items():
            found |= {f"{what}.{index}": own[what] for what in _OWN}
        return found | {"counts": torch.tensor([self.taken, self._drawn])}

    def go_on_from(self, state: Mapping[str, torch.Tensor]) -> None:
        """Be where another one was when that was its `state`."""
        self.taken, self._drawn = state["counts"].tolist()
        self._order = islice(_shuffled(len(self._data)), self._drawn, None)
        known = {}
        for index, parameter in enumerate(self._parameters):
            parameter.data.copy_(state[f"value.{index}"])
            if f"step.{index}" in state:
                known[index] = {what: state[f"{what}.{index}"].clone() for what in _OWN}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": known})

    def _step(self) -> None:
        rows = 0
        while rows < _ROWS:
            with torch.enable_grad():
                total, count = self._loss(self._data[next(self._order)])
                total.backward()
            self._drawn += 1
            rows += count
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= rows
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * _pace(self.taken, self._steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.taken += 1


def pauses(steps: int) -> list[int]:
    """After which of `steps` steps learning pauses; the last one is among them."""
    every = max(1, steps // _PAUSES)
    return [*range(every, steps, every), steps]


def _pace(step: int, steps: int) -> float:
    """Factor of the learning rate at `step`: a warm-up, times half a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def _shuffled(count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
