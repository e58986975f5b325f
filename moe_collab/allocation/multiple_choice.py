"""One option per item under a byte budget: the plain multiple-choice knapsack."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError
from .budget import format_bytes
from .exact import MAX_ITEMS, ExactSolver
from .exchange import improve
from .relaxation import lower_hulls

__all__ = ["Solution", "check", "solve_plain"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """An allocation, and a lower bound of the cost of every allocation within the budget."""

    choice: Ints
    """Option per item, [items]."""
    size: int
    """Bytes."""
    cost: float
    bound: float
    """Proven lower bound of the cost (the relaxation's, or the cost itself where the optimum is proven)."""

    @property
    def gap(self) -> float:
        """How far the cost can be from the optimum, as a share of the bound; 0 = proven optimal."""
        return max(0.0, self.cost - self.bound) / max(abs(self.bound), sys.float_info.min)


def solve_plain(sizes: Ints, costs: Floats, budget: int) -> Solution:
    """Choose one option per item at the least total cost within `budget` bytes; `sizes`, `costs` [items, options].

    Up to 1000 items a search for the proven optimum follows the relaxation's whole steps and their local improvement.
    Raises `MoeCollabError` with the bytes needed when the smallest allocation is larger.
    """
    steps = lower_hulls(sizes, costs)
    if steps.start_size > budget:
        raise MoeCollabError(
            f"budget: {format_bytes(budget)} is too small; the smallest allocation needs "
            f"{format_bytes(steps.start_size)}. Raise the budget or offer smaller options."
        )
    relaxed = steps.relax(budget)
    choice = improve(sizes, costs, budget, relaxed.choice, relaxed.price)
    bound = relaxed.bound
    if len(sizes) <= MAX_ITEMS:
        solver = ExactSolver(sizes, costs, budget, steps, choice)
        choice, bound = solver.choice, max(bound, solver.bound)
    return measured(sizes, costs, choice, bound)


def measured(sizes: Ints, costs: Floats, choice: Ints, bound: float) -> Solution:
    """The `Solution` that `choice` [items] is; a bound that rounding put above its cost is lowered to it."""
    rows = np.arange(len(choice))
    cost = float(costs[rows, choice].sum())
    return Solution(choice, int(sizes[rows, choice].sum()), cost, min(bound, cost))


def check(sizes: Ints, costs: Floats) -> tuple[Ints, Floats]:
    """(`sizes` as int64, `costs` as float64), [items, options]. Raises `MoeCollabError` naming an unusable item."""
    s, c = np.asarray(sizes), np.asarray(costs, dtype=np.float64)
    if s.ndim != 2 or s.shape != c.shape or not np.issubdtype(s.dtype, np.number):
        raise MoeCollabError(f"knapsack: sizes {s.shape} and costs {c.shape} must both be [items, options].")
    padding = np.isposinf(c)
    _refuse(
        np.asarray(np.isnan(c) | np.isneginf(c)),
        "a cost that is NaN or -inf. Look for NaN in the calibration statistics",
    )
    s = np.where(padding, 0, s)
    _refuse(np.asarray(~np.isfinite(s) | (s < 0)), "a size that is negative or not finite")
    _refuse(np.asarray(padding.all(axis=1, keepdims=True)), "no option (all its costs are inf)")
    return s.astype(np.int64), c


def _refuse(bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise MoeCollabError(f"knapsack: item {int(bad.any(axis=1).argmax())} has {what}.")
