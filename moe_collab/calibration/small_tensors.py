"""The small tensors of a model that learn while its matrices stay fixed: routers, norms, gains of experts, scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Factors", "SmallTensor", "Whole", "as_stored", "in_place"]


class SmallTensor(Protocol):
    """A parameter that learns, and through which the weight of a module changes."""

    module: nn.Module
    learned: nn.Parameter
    """The parameter."""
    pace: float
    """Its learning rate when the common rate is 1: about how far each of its values moves in an early step of Adam."""

    def weight(self) -> torch.Tensor:
        """The module's weight that follows from `learned`, differentiable."""
        ...

    def stored(self) -> dict[str, torch.Tensor]:
        """The module's changed tensors by name, rounded as they will be stored."""
        ...


def _original(module: nn.Module) -> torch.Tensor:
    """The module's own weight, even while `in_place` puts another before it; onloaded if it is offloaded."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()


class Whole:
    """A weight that learns as a whole: a router's, a norm's. Its steps are relative to its root mean square."""

    def __init__(self, module: nn.Module, pace: float) -> None:
        self.module, self._dtype = module, _original(module).dtype
        self.learned = nn.Parameter(_original(module).float().clone())
        # Some norms multiply by 1 + weight, so that all their weights may be zero.
        self.pace = pace * max(float(self.learned.detach().square().mean().sqrt()), 0.1)

    def weight(self) -> torch.Tensor:
        """As `SmallTensor.weight`."""
        return self.learned

    def stored(self) -> dict[str, torch.Tensor]:
        """As `SmallTensor.stored`."""
        return {"weight": self.learned.detach().to(self._dtype)}


class Factors:
    """A Linear that learns factors [rows, groups] of its weights: a gain per output channel, or one for every scale."""

    def __init__(self, module: nn.Module, groups: int, pace: float) -> None:
        self.module, self.pace, self._dtype = module, pace, _original(module).dtype
        self.learned = nn.Parameter(torch.ones(len(_original(module)), groups))

    def weight(self) -> torch.Tensor:
        """As `SmallTensor.weight`."""
        weight = _original(self.module).float()
        return (weight.reshape(*self.learned.shape, -1) * self.learned[..., None]).reshape_as(weight)

    def stored(self) -> dict[str, torch.Tensor]:
        """As `SmallTensor.stored`."""
        return {"weight": self.weight().detach().to(self._dtype)}


@contextmanager
def in_place(tensors: Iterable[SmallTensor]) -> Iterator[None]:
    """Let the modules compute with the tensors' `weight()` within the block; their own parameters stay unchanged."""
    with _weights({tensor.module: tensor.weight for tensor in tensors}):
        yield


@contextmanager
def as_stored(tensors: Iterable[SmallTensor]) -> Iterator[None]:
    """As `in_place`, but with the weights rounded as they will be stored."""
    with _weights({tensor.module: partial(_stored_weight, tensor) for tensor in tensors}):
        yield


def _stored_weight(tensor: SmallTensor) -> torch.Tensor:
    return tensor.stored()["weight"]


@contextmanager
def _weights(weights: dict[nn.Module, Callable[[], torch.Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, weight in weights.items():
            stack.callback(module.register_forward_pre_hook(_shadow(weight)).remove)
            stack.callback(module.register_forward_hook(_uncover, always_call=True).remove)
        yield


def _shadow(weight: Callable[[], torch.Tensor]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, _args: Any) -> None:
        # Python finds an instance attribute before the parameter of the same name, which stays unchanged.
        module.__dict__["weight"] = weight().to(_original(module).dtype)

    return hook


def _uncover(module: nn.Module, _args: Any, _output: Any) -> None:
    module.__dict__.pop("weight", None)
