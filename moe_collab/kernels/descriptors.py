"""Where each expert tensor of a layer lies in its arena, and how it is coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..errors import MoeCollabError
from ..formats import packed_width

__all__ = ["ArenaLayout", "Field", "TensorSpec", "plan_arena"]


class Field(IntEnum):
    """Columns of the descriptor table, int64 [experts, 3 (gate, up, down), 7]."""

    NUM_BITS = 0
    """0 = the expert is gone, 2..8 = packed integers, 16 = bfloat16."""
    GROUP_SIZE = 1
    CODES = 2
    """First int32 word of the packed codes (rows packed apart), or of the bfloat16 weights."""
    SCALES = 3
    ZERO_POINTS = 4
    """-1 = symmetric."""
    ROWS = 5
    COLUMNS = 6


@dataclass(frozen=True)
class TensorSpec:
    """One weight [rows, columns] as it is stored; `group_size` weights of a row share a scale."""

    num_bits: int
    rows: int
    columns: int
    group_size: int = 0
    symmetric: bool = True


@dataclass(frozen=True)
class ArenaLayout:
    """The table, and the sizes of the arenas for codes (int32), scales (float32) and zero points (int8)."""

    table: torch.Tensor
    num_words: int
    num_scales: int
    num_zero_points: int


def plan_arena(experts: Sequence[Sequence[TensorSpec]]) -> ArenaLayout:
    """Lay out the gate, up and down weights of every expert of a layer, one after the other.

    Raises `MoeCollabError` for bits or groups no kernel serves.
    """
    table = torch.zeros(len(experts), 3, len(Field), dtype=torch.int64)
    words = scales = zeros = 0
    for expert, specs in enumerate(experts):
        for projection, spec in enumerate(specs):
            _check(spec, expert, projection)
            groups = spec.rows * (spec.columns // spec.group_size) if 0 < spec.num_bits < 16 else 0
            zero_offset = -1 if spec.symmetric else zeros
            row = [spec.num_bits, spec.group_size, words, scales, zero_offset, spec.rows, spec.columns]
            table[expert, projection] = torch.tensor(row)
            words += spec.rows * packed_width(spec.columns, spec.num_bits)
            scales += groups
            zeros += 0 if spec.symmetric else groups
    return ArenaLayout(table, words, scales, zeros)


def _check(spec: TensorSpec, expert: int, projection: int) -> None:
    where = f"expert {expert} {('gate_proj', 'up_proj', 'down_proj')[projection]}"
    if spec.num_bits not in (0, 2, 3, 4, 5, 6, 7, 8, 16):
        raise MoeCollabError(f"{where}: {spec.num_bits} bits are not served; use 0, 2 to 8, or 16.")
    if spec.num_bits == 16 and spec.columns % 2:
        raise MoeCollabError(f"{where}: {spec.columns} columns of 16 bits do not fill 32-bit words.")
    if 0 < spec.num_bits < 16 and (spec.group_size < 1 or spec.columns % spec.group_size):
        raise MoeCollabError(f"{where}: group size {spec.group_size} does not divide {spec.columns} columns.")
