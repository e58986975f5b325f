"""How one weight is stored: the unit in which bits are allocated."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import MoeCollabError
from .ternary import TERNARY, TERNARY_PACKED

__all__ = ["DENSE", "PRUNED", "Scheme"]


class Scheme(NamedTuple):
    """How one weight is stored: bits, weights per scale, and whether there are zero points.

    `num_bits` is 0 (pruned, not stored), 1 (ternary), 2 to 8 (integers) or 16 (unquantized); `group_size` weights of a
    row share a scale, -1 = the whole row. `str(scheme)` reads `int3-g128-asym`, `ternary-g128`, `dense` or `pruned`;
    `Scheme.parse` is the inverse.
    """

    num_bits: int
    group_size: int = 0
    symmetric: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether there are integer codes and scales."""
        return 0 < self.num_bits < 16

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest signed code."""
        return (-1, 1) if self.num_bits == TERNARY else (-(1 << (self.num_bits - 1)), (1 << (self.num_bits - 1)) - 1)

    def group_of(self, columns: int) -> int:
        """How many weights of a row of `columns` share a scale."""
        return columns if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        if not self.is_packed:
            return "dense" if self.num_bits == 16 else "pruned"
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        if self.num_bits == TERNARY:
            return f"ternary-{group}"
        return f"int{self.num_bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def described(cls, num_bits: int, group_size: int | None, symmetric: object, layout: str | None) -> Scheme:
        """The scheme that a quantization config describes by these values.

        There ternary is 2 bits with a `layout` of its own, and one scale a row is a group size of None or -1.
        """
        bits = TERNARY if layout == TERNARY_PACKED else num_bits
        return cls(bits, -1 if group_size in (None, -1) else int(group_size or 0), bool(symmetric))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme whose `str` is `text`. Raises `MoeCollabError` for a text that names no scheme."""
        if text in ("dense", "pruned"):
            return DENSE if text == "dense" else PRUNED
        match = re.fullmatch(r"(?:int([2-8])|ternary)-(?:g([1-9]\d*)|channel)(-a?sym)?", text)
        if match is None or (match[1] is None) != (match[3] is None):
            raise MoeCollabError(f"{text!r} is no scheme; they read int3-g128-asym, ternary-g128, dense or pruned.")
        bits = int(match[1]) if match[1] else TERNARY
        return cls(bits, int(match[2]) if match[2] else -1, match[3] != "-asym")


DENSE, PRUNED = Scheme(16), Scheme(0)
