"""The solver: one option per item, 0 bits included, at the least total cost under a budget in bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .multiple_choice import Solution, check, solve_plain

__all__ = ["Solution", "solve"]


def solve(sizes: NDArray[np.int64], costs: NDArray[np.float64], budget: int) -> Solution:
    """Least total cost of one option per item within `budget` bytes; equal input gives equal output.

    `sizes` (bytes) and `costs` are [items, options]; an item with fewer options is padded with a cost of inf.
    Raises `MoeCollabError` naming an item with unusable numbers, or the bytes needed when the budget is too small.
    """
    return solve_plain(*check(sizes, costs), budget)
