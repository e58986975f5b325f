"""Where each weight of a layer lies in its arenas, and how it is coded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ..errors import MoeCollabError
from ..formats import TERNARY

__all__ = ["Field", "TensorSpec"]


class Field(IntEnum):
    """Columns of the descriptor table, int64 [..., 7]; for experts [experts, 3 (gate, up, down), 7]."""

    NUM_BITS = 0
    """0 = the expert is gone, 1 = ternary, 2..8 = packed integers, 16 = bfloat16."""
    GROUP_SIZE = 1
    """Weights of a row that share a scale."""
    CODES = 2
    """First element of the weight in the arena of codes."""
    SCALES = 3
    """First of its scales in the arena of scales."""
    ZERO_POINTS = 4
    """First of its zero points in their arena; -1 = symmetric, without zero points."""
    ROWS = 5
    COLUMNS = 6


@dataclass(frozen=True)
class TensorSpec:
    """One weight [rows, columns] as the checkpoint stores it; `group_size` weights of a row share a scale.

    Raises `MoeCollabError` for bits or groups no kernel serves.
    """

    num_bits: int
    rows: int
    columns: int
    group_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.num_bits not in (0, TERNARY, 2, 3, 4, 5, 6, 7, 8, 16):
            raise MoeCollabError(f"{self.num_bits} bits are not served; use 0, 1 (ternary), 2 to 8, or 16.")
        if self.num_bits == 16 and self.columns % 2:
            raise MoeCollabError(f"{self.columns} columns of 16 bits do not fill 32-bit words.")
        if self.is_packed and (self.group_size < 1 or self.columns % self.group_size):
            raise MoeCollabError(f"group size {self.group_size} does not divide {self.columns} columns.")

    @property
    def is_packed(self) -> bool:
        """Whether there are integer codes and scales."""
        return 0 < self.num_bits < 16

    @property
    def num_groups(self) -> int:
        """Groups of one row."""
        return self.columns // self.group_size if self.is_packed else 0
