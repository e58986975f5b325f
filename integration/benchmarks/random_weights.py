"""Random weights as a checkpoint stores them, for the benchmarks' arenas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_collab.formats import TERNARY
from moe_collab.kernels.arena import Arena
from moe_collab.kernels.descriptors import TensorSpec
from moe_collab.kernels.plain import row_words

__all__ = ["random_weight", "random_weights"]


def random_weights(arenas: Sequence[Arena], seed: int = 0) -> None:
    """Fill arenas with the same random checkpoint; a shorter arena gets the first weights."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(max(len(a.specs) for a in arenas)):
        spec = next(a for a in arenas if index < len(a.specs)).specs[index]
        packed, scales = random_weight(spec, generator)
        for arena in arenas:
            if index < len(arena.specs):
                arena.write_codes(index, packed.to(arena.device))
                if scales is not None:
                    arena.write_scales(index, scales.to(arena.device))


def random_weight(spec: TensorSpec, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes as a checkpoint packs them, scales); a bfloat16 weight and None at 16 bits."""
    if spec.num_bits == 16:
        return (torch.randn(spec.rows, spec.columns, generator=generator) / spec.columns**0.5).bfloat16(), None
    if spec.num_bits == TERNARY:
        width, high, dtype = spec.num_groups * -(-spec.group_size // 5), 243, torch.uint8
        packed = torch.randint(0, high, (spec.rows, width), generator=generator, dtype=dtype)
    else:
        width = row_words(spec.num_bits, spec.columns, spec.group_size)
        packed = torch.randint(-(1 << 31), (1 << 31) - 1, (spec.rows, width), generator=generator, dtype=torch.int32)
    half = 1 if spec.num_bits == TERNARY else 1 << (spec.num_bits - 1)
    size = (spec.rows, spec.num_groups)
    return packed, ((torch.rand(size, generator=generator) + 0.5) / half / spec.columns**0.5).bfloat16()
