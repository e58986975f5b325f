"""`quant_method: mxfp4`: stacked experts in four-bit floating point, 32 to a scale, as gpt-oss is published."""

from __future__ import annotations

from functools import partial

import torch

from ..lazy import LazyTensor
from ..reader import Checkpoint
from .weight import E2M1, Weight, config_dtype, from_exponents, refuse, stored

__all__ = ["mxfp4_values", "mxfp4_weights"]

_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_weights(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Weight]:
    """The stacks by name: [experts, columns, rows], as the family's unquantized checkpoints have them.

    Stored are `_blocks`, bytes [experts, rows, columns / 32, 16], of two codes each with the even column in the low
    bits, and `_scales`, exponents [experts, rows, columns / 32].
    """
    dtype, weights = dtype or config_dtype(checkpoint), {}
    for blocks in (name for name in checkpoint.names() if name.endswith(_BLOCKS)):
        name = blocks.removesuffix(_BLOCKS)
        scales = name + _SCALES
        if scales not in checkpoint:
            refuse(checkpoint, blocks, f"has no {scales} beside it. Copy or make the checkpoint again")
        shape = stored(checkpoint, blocks, torch.uint8, ndim=4)
        of_scales = stored(checkpoint, scales, torch.uint8, ndim=3)
        if shape[-1] != 16 or shape[:-1] != of_scales:
            refuse(checkpoint, blocks, f"is {list(shape)} and its scales {list(of_scales)}: no MXFP4 stack")
        experts, rows, groups, _ = shape
        stack = torch.empty(experts, groups * 32, rows, dtype=dtype, device="meta")
        one = partial(_one, checkpoint, name, dtype)
        weights[name] = Weight(LazyTensor(stack, partial(_read, stack, one), one, blocks), (blocks, scales))
    return weights


def mxfp4_values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Bytes of two codes [rows, columns / 2] and scales [rows, columns / 32] -> [rows, columns], float32."""
    table = torch.tensor(E2M1)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1).view(torch.float64).flatten()
    # Two numbers are looked up as one of their joint length, which is not computed with.
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    return (values.reshape(*scales.shape, 32) * scales[..., None]).flatten(-2)


def _read(stack: torch.Tensor, one: partial[torch.Tensor]) -> torch.Tensor:
    whole = torch.empty_like(stack, device="cpu")
    for index in range(len(whole)):
        whole[index] = one(index)
    return whole


def _one(checkpoint: Checkpoint, name: str, dtype: torch.dtype, index: int) -> torch.Tensor:
    """Expert `index`, [columns, rows]."""
    scales = from_exponents(checkpoint.tensor(name + _SCALES, index))
    if not torch.isfinite(scales).all():
        refuse(checkpoint, name + _SCALES, "holds NaN, so the weight would be garbage. Copy or make it again")
    return mxfp4_values(checkpoint.tensor(name + _BLOCKS, index), scales).to(dtype).T
