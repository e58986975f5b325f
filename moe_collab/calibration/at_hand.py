"""Weights at hand: copies in float32 where the arithmetic is done; the model's own stay where and what they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["at_hand", "compute_device", "float32_copy", "shadowed"]


def compute_device() -> torch.device:
    """The accelerator that torch names, or else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def float32_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; in float32 if it is bfloat16 or float16."""
    dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    return tensor.detach().to(device, dtype)


@contextmanager
def at_hand(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Let `modules` compute with float32 copies on `device` of their own parameters and buffers within the block.

    Each tensor is read once, from wherever it is offloaded to. Nothing is written to the model.
    """
    copies = {
        module: {
            name: float32_copy(getattr(module, name), device)
            for name in (*module._parameters, *module._buffers)
            if getattr(module, name) is not None
        }
        for module in modules
    }
    with shadowed(copies):
        yield


@contextmanager
def shadowed(values: Mapping[nn.Module, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Let modules compute with other values of parameters and buffers, by name, within the block.

    Python finds an instance attribute before the parameter of the same name, which stays unchanged.
    """
    before = {module: {name: vars(module).get(name) for name in tensors} for module, tensors in values.items()}
    try:
        for module, tensors in values.items():
            vars(module).update(tensors)
        yield
    finally:
        for module, earlier in before.items():
            for name, value in earlier.items():
                if value is None:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value
