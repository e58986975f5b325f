"""Ternary weights in 2 bits: a quarter larger and, since five trits a byte cost arithmetic to read, faster."""

from __future__ import annotations

import torch

from ...formats import TERNARY
from ..arena import Arena
from ..descriptors import Field
from ..memory import available_memory
from . import TileLayout

__all__ = ["widen_ternary"]


def widen_ternary(arena: Arena, keep_free: int) -> bool:
    """Store `arena`'s ternary weights in 2 bits, if old and new together leave `keep_free` bytes of memory.

    Returns whether any ternary weight is left as it was.
    """
    ternary = [row[Field.NUM_BITS] == TERNARY for row in arena.table.tolist()]
    wide = TileLayout(ternary_bits=2)
    if not any(ternary):
        return False
    if available_memory() - sum(map(wide.num_codes, arena.specs)) < keep_free:
        return True
    codes, table = arena.codes, arena.table.clone()
    arena.use(wide)
    for index, spec in enumerate(arena.specs):
        if ternary[index]:
            torch.ops.moe_collab.widen_cpu(codes, table[index], arena.table[index], arena.codes)
        else:
            size, start, target = wide.num_codes(spec), *(int(t[index, Field.CODES]) for t in (table, arena.table))
            arena.codes[target : target + size] = codes[start : start + size]
    return False
