"""The small tensors of a model that learn while its matrices stay: routers, norms, gains of experts, scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

__all__ = ["Factors", "SmallTensor", "Whole", "in_place"]


class SmallTensor(Protocol):
    """Something to learn about a module's weight; `learning` are (parameter, what a step of rate 1 moves it by)."""

    module: nn.Module
    learning: list[tuple[nn.Parameter, float]]

    def weight(self) -> torch.Tensor:
        """The module's weight as it has become, differentiable."""
        ...


class Whole:
    """A weight that learns as a whole: a router's, a norm's; its steps are relative to its root mean square."""

    def __init__(self, module: nn.Module, pace: float) -> None:
        self.module = module
        start = module.weight.detach().float().clone()  # type: ignore[union-attr, operator]
        self._learned = nn.Parameter(start)
        self.learning = [(self._learned, pace * float(start.square().mean().sqrt()))]

    def weight(self) -> torch.Tensor:
        """As `SmallTensor.weight`."""
        return self._learned


class Factors:
    """A Linear that learns factors [rows, groups] of its weights: a gain per output channel, or one for every scale."""

    def __init__(self, module: nn.Linear, groups: int, pace: float) -> None:
        self.module = module
        self._original = module.weight.detach()
        self._factors = nn.Parameter(torch.ones(len(self._original), groups))
        self.learning = [(self._factors, pace)]

    def weight(self) -> torch.Tensor:
        """As `SmallTensor.weight`."""
        grouped = self._original.reshape(*self._factors.shape, -1)
        return (grouped * self._factors[..., None]).reshape_as(self._original)


@contextmanager
def in_place(tensors: Sequence[SmallTensor]) -> Iterator[None]:
    """Let the modules compute with what the tensors have become; their parameters stay as they were."""
    handles = [tensor.module.register_forward_pre_hook(_shadow(tensor)) for tensor in tensors]
    try:
        yield
    finally:
        for handle, tensor in zip(handles, tensors, strict=True):
            handle.remove()
            tensor.module.__dict__.pop("weight", None)


def _shadow(tensor: SmallTensor):  # noqa: ANN202
    dtype = tensor.module.weight.dtype  # type: ignore[union-attr]

    def hook(module: nn.Module, _args: tuple) -> None:
        # An instance attribute goes before the parameter of the same name, which it leaves alone.
        module.__dict__["weight"] = tensor.weight().to(dtype)

    return hook
