"""`quant_method: fp8`: weights in float8, a scale for each block; so DeepSeek-V3, Kimi-K2 and Qwen3 are published."""

from __future__ import annotations

from functools import partial
from math import ceil

import torch

from ...errors import MoeCollabError
from ..lazy import LazyTensor
from ..reader import Checkpoint
from .weight import Weight, block_scaled, checked_scales, config_dtype, float8_values, present, refuse, stored

__all__ = ["fp8_weights"]

_SUFFIX = "_scale_inv"
_ACTIVATIONS = ("input_scale", "activation_scale")
"""Scales of activations, beside the weights; nothing here quantizes activations."""


def fp8_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The weights by name.

    A matrix, or a stack of them, is stored under its own name, and its scales with `_scale_inv` appended. Scales
    are float32, or powers of two: E8M0, as a type of its own or as bytes.
    """
    size = checkpoint.config["quantization_config"].get("weight_block_size")
    sides = size if isinstance(size, list) else []
    if size is not None and not (len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)):
        raise MoeCollabError(f"{checkpoint.path}/config.json: weight_block_size is {size}, not two numbers of weights.")
    dtype = dtype or config_dtype(checkpoint)
    weights = {}
    for scale in (name for name in checkpoint.names() if name.endswith(_SUFFIX)):
        name = scale.removesuffix(_SUFFIX)
        if name not in checkpoint:
            refuse(checkpoint, scale, "are scales of a weight that is missing. Copy or make the checkpoint again")
        like = checkpoint.stored_like(name)
        shape = stored(checkpoint, name, torch.float8_e4m3fn, torch.float8_e5m2, ndim=3 if like.ndim == 3 else 2)
        block = _block(size, shape)
        expected = *shape[:-2], ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1])
        found = checkpoint.stored_like(scale).shape
        one = found.numel() == 1 == torch.Size(expected).numel()  # of a whole tensor, with no dimension or some
        if tuple(found) != expected and not one:
            refuse(checkpoint, scale, f"is {list(found)}; a weight {list(shape)} in blocks of {block} needs {expected}")
        read = partial(_read, checkpoint, name, expected, block, dtype)
        tensor = LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), read, partial(_one, read), name)
        owner = name.rpartition(".")[0]
        weights[name] = Weight(tensor, (name, scale, *present(checkpoint, (f"{owner}.{own}" for own in _ACTIVATIONS))))
    for name in checkpoint.names():
        if name.endswith(".weight") and name not in weights and checkpoint.stored_like(name).dtype.itemsize == 1:
            if f"{name}_scale" in checkpoint:
                refuse(checkpoint, name, f"has a {name}_scale, which cannot be read; fp8 with {_SUFFIX} can")
            refuse(checkpoint, name, f"is stored in 8 bits, but {name}{_SUFFIX} is missing. Make the checkpoint again")
    return weights


def _block(size: list[int] | None, shape: torch.Size) -> tuple[int, int]:
    """(rows, columns) that share a scale; without `weight_block_size` all of a matrix do."""
    return (shape[-2], shape[-1]) if size is None else (int(size[0]), int(size[1]))


def _read(
    checkpoint: Checkpoint,
    name: str,
    expected: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    index: int | None = None,
) -> torch.Tensor:
    values = float8_values(checkpoint.tensor(name, index))
    if values.sum().isnan():
        refuse(checkpoint, name, "holds NaN, so the model would answer with garbage. Copy or make it again")
    scales = checked_scales(checkpoint, name + _SUFFIX).reshape(expected)
    return block_scaled(values, scales if index is None else scales[index], block).to(dtype)


def _one(read: partial[torch.Tensor], index: int) -> torch.Tensor:
    return read(index=index)
