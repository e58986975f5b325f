"""The small tensors of a model that learn while its matrices stay fixed: routers, norms, gains of experts, scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from .at_hand import compute_device, shadowed

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
    """The module's own weight, even while another stands before it, where the arithmetic is done."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach().to(compute_device())


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
        self.learned = nn.Parameter(torch.ones(len(_original(module)), groups, device=compute_device()))

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
            cover = _Cover(weight)
            stack.callback(module.register_forward_pre_hook(cover.put).remove)
            stack.callback(module.register_forward_hook(cover.take, always_call=True).remove)
        yield


class _Cover:
    """Puts another weight before a module's while that computes, of the type and on the device of the one it had."""

    def __init__(self, weight: Callable[[], torch.Tensor]) -> None:
        self._weight, self._stack = weight, ExitStack()

    def put(self, module: nn.Module, _args: Any) -> None:
        """To be called before the module computes."""
        present = module.weight
        assert isinstance(present, torch.Tensor)
        self._stack.enter_context(shadowed({module: {"weight": self._weight().to(present)}}))

    def take(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """To be called afterwards."""
        self._stack.close()
