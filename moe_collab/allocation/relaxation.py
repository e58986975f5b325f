"""The linear relaxation of a multiple-choice knapsack, solved exactly by sorting slopes.

Kellerer, Pferschy, Pisinger, *Knapsack Problems* (2004), chapter 11.2, after Sinha and Zoltners (1979) and Zemel
(1980): only options on the lower convex hull of an item's (size, cost) points take part in the relaxation, and the
steps along the hulls, taken in order of cost saved per byte until the budget is spent, are its optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Relaxation", "Steps", "lower_hulls"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Larger than any file; finite, so that slopes towards padding stay defined.
_NEVER = 1 << 62


class Relaxation(NamedTuple):
    """Optimum of the relaxation: a lower bound of every allocation's cost, and the price of a byte in cost."""

    bound: float
    price: float
    choice: Ints
    """The relaxation's whole steps, without the one that only fits in part: an allocation within the budget."""


@dataclass(frozen=True)
class Steps:
    """Hull steps of all items, steepest first: step t moves `item[t]` to `option[t]` for `size[t]` more bytes.

    A prefix of the steps is always an allocation: an item's steps stand in the order of its hull.
    """

    start: Ints
    """Option of least size (and then of least cost) per item, [items]."""
    start_size: int
    start_cost: float
    item: Ints
    option: Ints
    size: Ints
    saving: Floats
    """Cost saved by each step, > 0."""
    slope: Floats
    """Cost saved per byte, descending."""

    def relax(self, budget: int) -> Relaxation:
        """Solve the relaxation for `budget` bytes, which must be at least `start_size`."""
        left = budget - self.start_size
        spent = np.cumsum(self.size)
        whole = int(np.searchsorted(spent, left, side="right"))
        cost = self.start_cost - float(self.saving[:whole].sum())
        price = 0.0
        if whole < len(spent):
            price = float(self.slope[whole])
            cost -= price * (left - (int(spent[whole - 1]) if whole else 0))
        choice = self.start.copy()
        # Repeated items: the last assignment stays, which is the furthest step.
        choice[self.item[:whole]] = self.option[:whole]
        return Relaxation(cost, price, choice)

    def only(self, items: NDArray[np.bool_], sizes: Ints, costs: Floats) -> Steps:
        """The steps of `items` [items] alone; `start` keeps its length. `sizes` and `costs` are those of the hulls."""
        rows = np.flatnonzero(items)
        mine = items[self.item]
        return Steps(
            self.start,
            int(sizes[rows, self.start[rows]].sum()),
            float(costs[rows, self.start[rows]].sum()),
            self.item[mine],
            self.option[mine],
            self.size[mine],
            self.saving[mine],
            self.slope[mine],
        )


def lower_hulls(sizes: Ints, costs: Floats) -> Steps:
    """Lower convex hulls of all items [items, options] at once; padding has a cost of inf."""
    padded = np.where(np.isinf(costs), _NEVER, sizes)
    order = np.lexsort((costs, padded), axis=1)
    s, c = np.take_along_axis(padded, order, 1), np.take_along_axis(costs, order, 1)
    walk = _walk(s.astype(np.float64), c)
    item, before, after, slope = (np.concatenate(part) for part in zip(*walk, strict=True))
    first = np.argsort(-slope, kind="stable")
    item, before, after, slope = item[first], before[first], after[first], slope[first]
    return Steps(
        start=order[:, 0],
        start_size=int(s[:, 0].sum()),
        start_cost=float(c[:, 0].sum()),
        item=item,
        option=order[item, after],
        size=s[item, after] - s[item, before],
        saving=c[item, before] - c[item, after],
        slope=slope,
    )


def _walk(s: Floats, c: Floats) -> list[tuple[Ints, Ints, Ints, Floats]]:
    """Gift wrapping, in each turn one hull vertex of every item: (items, positions before, positions after, slopes)."""
    rows = np.arange(len(s))
    at = np.zeros(len(s), dtype=np.int64)
    steepest = np.full(len(s), np.inf)
    walk = [(rows[:0], at[:0], at[:0], steepest[:0])]
    while len(rows):
        lines = np.arange(len(rows))
        run = s - s[lines, at][:, None]
        rise = c[lines, at][:, None] - c
        slopes = np.divide(rise, run, out=np.full_like(run, -np.inf), where=run > 0)
        after = slopes.argmax(axis=1)
        # Rounding must not let a later step of an item look steeper than an earlier one.
        slope = np.minimum(slopes[lines, after], steepest)
        go = slope > 0
        walk.append((rows[go], at[go], after[go], slope[go]))
        rows, at, steepest, s, c = rows[go], after[go], slope[go], s[go], c[go]
    return walk
