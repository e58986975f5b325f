"""Random weights in the checkpoint's format, with their float values, for every backend to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_collab.formats import TERNARY, dequantize, pack, pack_ternary
from moe_collab.kernels.arena import Arena
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import PLAIN


@dataclass
class Weight:
    """As the checkpoint stores it, and in float32."""

    spec: TensorSpec
    packed: torch.Tensor
    scales: torch.Tensor | None
    zero_points: torch.Tensor | None
    dense: torch.Tensor


def random_weight(spec: TensorSpec, generator: torch.Generator, scale_dtype: torch.dtype = torch.bfloat16) -> Weight:
    """Codes over the whole range, scales of either sign."""
    shape = (spec.rows, spec.columns)
    if spec.num_bits == 0:
        return Weight(spec, torch.zeros(shape[0], 0, dtype=torch.int32), None, None, torch.zeros(shape))
    if spec.num_bits == 16:
        dense = (torch.randn(shape, generator=generator) / spec.columns**0.5).bfloat16()
        return Weight(spec, dense, None, None, dense.float())
    ternary = spec.num_bits == TERNARY
    low, high = (-1, 2) if ternary else (-(1 << (spec.num_bits - 1)), 1 << (spec.num_bits - 1))
    codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    size = (spec.rows, spec.num_groups)
    signs = torch.randint(0, 2, size, generator=generator) * 2 - 1
    scales = (signs * (torch.rand(size, generator=generator) + 0.5) / high / spec.columns**0.5).to(scale_dtype)
    zeros = None if spec.symmetric else torch.randint(low, high, size, generator=generator, dtype=torch.int8)
    packed = pack_ternary(codes, spec.group_size) if ternary else pack(codes, spec.num_bits)
    return Weight(spec, packed, scales, zeros, dequantize(codes, scales.float(), zeros))


def load(weights: Sequence[Weight], layout=PLAIN) -> Arena:
    """All weights in one arena."""
    arena = Arena([w.spec for w in weights], layout)
    for index, weight in enumerate(weights):
        if weight.spec.num_bits:
            arena.write_codes(index, weight.packed)
        if weight.scales is not None:
            arena.write_scales(index, weight.scales)
        if weight.zero_points is not None:
            arena.write_zero_points(index, weight.zero_points)
    return arena


def expert_specs(hidden: int, width: int, bits: Sequence[Sequence[int]], group: int, symmetric: bool = True):
    """Gate, up and down of each expert; `group` -1 = per channel."""

    def spec(num_bits: int, rows: int, columns: int) -> TensorSpec:
        if num_bits in (0, 16):
            return TensorSpec(num_bits, rows, columns)
        return TensorSpec(num_bits, rows, columns, columns if group == -1 else group, symmetric)

    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [spec(b, *s) for row in bits for b, s in zip(row, shapes, strict=True)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-30))
