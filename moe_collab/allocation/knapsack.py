"""The solver: one option per item, 0 bits included, at the least total cost under a budget in bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError
from .dropping import PhysicalSolution, solve_masked, solve_scan
from .expert_choice import ExpertChoice
from .multiple_choice import Solution, check, solve_plain

__all__ = ["PhysicalSolution", "Solution", "solve", "solve_physical"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def solve(sizes: Ints, costs: Floats, budget: int, *, pruning: ExpertChoice | None = None) -> Solution:
    """Choose one option per item at the least total cost within `budget` bytes; equal input gives equal output.

    `sizes` (bytes) and `costs` are [items, options]; an item with fewer options is padded with a cost of inf.
    Without `pruning` at most 100 items, and most often up to 1000, are solved to the optimum: gap 0. With it, experts
    (`pruning.layers` >= 0) whose option has size 0 are dropped as its form allows; the bound is the Lagrangian dual's.
    Raises `MoeCollabError` naming an item with unusable numbers, or the bytes needed when the budget is too small.
    """
    if pruning is None:
        return solve_plain(*check(sizes, costs), budget)
    if pruning.form == "physical":
        return solve_physical(sizes, costs, budget, pruning).solution
    sizes, costs = check(sizes, costs)
    _require_items(pruning, len(sizes))
    return solve_masked(sizes, costs, budget, pruning)


def solve_physical(
    sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice, *, kept: int | None = None
) -> PhysicalSolution:
    """Like `solve`, with equally many experts kept in every group: `kept`, or the best count from all to the least.

    Raises `MoeCollabError` also when `kept` is not possible.
    """
    sizes, costs = check(sizes, costs)
    _require_items(pruning, len(sizes))
    most = int((pruning.table() >= 0).sum(axis=2).min())
    counts = np.arange(most, pruning.limits.least_kept - 1, -1)
    if kept is not None:
        counts = counts[counts == kept]
    if not len(counts):
        wanted = "" if kept is None else f"{kept} experts per group cannot be kept: "
        raise MoeCollabError(
            f"pruning: {wanted}the smallest group has {most}, the router needs at least {pruning.limits.least_kept}."
        )
    return solve_scan(sizes, costs, budget, pruning, counts)


def _require_items(pruning: ExpertChoice, items: int) -> None:
    if len(pruning.layers) != items or len(pruning.groups) != items:
        raise MoeCollabError(f"pruning: layers and groups must name each of the {items} items.")
