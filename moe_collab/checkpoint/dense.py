"""All tensors of a checkpoint as the model computes with them: the quantized are dequantized when they are read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from .lazy import LazyTensor
from .published import quantized_weights
from .reader import Checkpoint

__all__ = ["dense_tensors"]


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The tensors by name; nothing but headers and tiny tensors is read before one of them is.

    Quantized weights come in `dtype`, or else in the type that `quantized_weights` says; other tensors stay as
    they are. Raises `MoeCollabError` for a quantization we cannot read, and, when it is read, for a tensor that holds
    NaN or whose scales are not finite.
    """
    weights = quantized_weights(checkpoint, dtype)
    parts = {part for weight in weights.values() for part in weight.parts}
    tensors = {}
    for name in checkpoint.names():
        if name not in parts:
            read, read_one = partial(checkpoint.plain_tensor, name), partial(checkpoint.plain_tensor, name)
            tensors[name] = LazyTensor(checkpoint.stored_like(name), read, read_one, name)
    tensors |= {name: weight.tensor for name, weight in weights.items()}
    return {name: replace(tensor, file=checkpoint.file_of(tensor.stored_as)) for name, tensor in tensors.items()}
