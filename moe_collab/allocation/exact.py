"""The optimum of a multiple-choice knapsack: dynamic programming over undominated states with LP bounds.

Kellerer, Pferschy, Pisinger, *Knapsack Problems* (2004), chapter 11.5 (Dyer, Riha and Walker 1995; Pisinger 1995):
items are added one at a time; of the partial allocations only those survive that no other beats in size and cost
at once, and whose cost plus the relaxation of the items to come is below the best allocation known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .relaxation import Steps

__all__ = ["MAX_ITEMS", "ExactSolver"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Up to 100 items were always solved to a proof; up to 1000 the search is cut off after some seconds.
MAX_ITEMS = 1000
_PROVEN_ITEMS = 100
_MAX_EXPANDED = 2_000_000
_MAX_WORK = 50_000_000
# Differences below this share of the cost are rounding, not improvements.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class _Rest:
    """What the items still to come can reach: their first 0, 1, ... hull steps take `size` at `cost`, [steps + 1]."""

    size: Ints
    cost: Floats

    def bound(self, left: Ints) -> Floats:
        """Cost of the relaxation with `left` bytes; inf where even the smallest options are too large."""
        return np.where(left < self.size[0], np.inf, np.interp(left, self.size, self.cost))

    def reached(self, left: Ints) -> Floats:
        """Cost after as many whole steps as fit in `left` bytes, which makes a real allocation."""
        prefix = np.searchsorted(self.size, left, side="right") - 1
        return np.where(prefix < 0, np.inf, self.cost[np.maximum(prefix, 0)])


class ExactSolver:
    """Improves `choice` [items] to the optimum; `bound` is proven, and equals the cost unless states were discarded."""

    def __init__(self, sizes: Ints, costs: Floats, budget: int, steps: Steps, choice: Ints) -> None:
        self._sizes, self._costs, self._budget, self._steps = sizes, costs, budget, steps
        rows = np.arange(len(choice))
        self.choice, self.cost = choice, float(costs[rows, choice].sum())
        self._scale = float(np.abs(costs[rows, choice]).sum())
        self._order = self._hardest_first()
        self._rank = np.argsort(self._order)
        self._layers: list[tuple[Ints, Ints]] = []
        self._dropped = np.inf
        self._max_states = self._affordable_states()
        self._run()
        self.bound = min(self.cost, self._dropped)

    def _affordable_states(self) -> int:
        """States whose expansion by an item's options fits memory, and for many items also the time."""
        items, options = self._sizes.shape
        expanded = _MAX_EXPANDED if items <= _PROVEN_ITEMS else min(_MAX_EXPANDED, _MAX_WORK // items)
        return expanded // options

    def _hardest_first(self) -> Ints:
        """Items by the size of their largest option, descending, so that small ones are left to fill up at the end."""
        return np.argsort(-np.where(np.isinf(self._costs), 0, self._sizes).max(axis=1), kind="stable")

    def _rest(self, done: int) -> _Rest:
        rows = self._order[done:]
        mine = self._rank[self._steps.item] >= done
        start = self._steps.start[rows]
        size = int(self._sizes[rows, start].sum()) + np.cumsum(np.concatenate(([0], self._steps.size[mine])))
        saved = np.cumsum(np.concatenate(([0.0], self._steps.saving[mine])))
        return _Rest(size, float(self._costs[rows, start].sum()) - saved)

    def _run(self) -> None:
        size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
        for done, item in enumerate(self._order, start=1):
            options = np.flatnonzero(np.isfinite(self._costs[item]))
            parent = np.repeat(np.arange(len(size)), len(options))
            option = np.tile(options, len(size))
            size = size[parent] + self._sizes[item, option]
            cost = cost[parent] + self._costs[item, option]
            keep = self._survivors(size, cost, self._rest(done))
            size, cost = size[keep], cost[keep]
            self._layers.append((parent[keep], option[keep]))
            self._complete(done, size, cost)
            if not len(keep):
                return

    def _survivors(self, size: Ints, cost: Floats, rest: _Rest) -> Ints:
        """Indices, by size, of the states that are undominated and may still lead below the best cost."""
        bound = cost + rest.bound(self._budget - size)
        reached = cost + rest.reached(self._budget - size)
        best = min(self.cost, float(reached.min(initial=np.inf)))
        # The state that reaches a new best must survive to be completed.
        alive = np.flatnonzero((bound < best - _ROUNDING * self._scale) | ((reached <= best) & (reached < self.cost)))
        alive = alive[np.lexsort((cost[alive], size[alive]))]
        lowest = np.minimum.accumulate(cost[alive])
        alive = alive[np.concatenate(([True], lowest[1:] < lowest[:-1]))[: len(alive)]]
        if len(alive) > self._max_states:
            order = np.argsort(bound[alive], kind="stable")
            self._dropped = min(self._dropped, float(bound[alive[order[self._max_states]]]))
            alive = alive[np.sort(order[: self._max_states])]
        return alive

    def _complete(self, done: int, size: Ints, cost: Floats) -> None:
        """Complete each state by whole steps of the items to come; adopt the best such allocation if it is better."""
        rest = self._rest(done)
        reached = cost + rest.reached(self._budget - size)
        if not len(reached) or reached.min() >= self.cost:
            return
        state = int(reached.argmin())
        choice = self._steps.start.copy()
        mine = np.flatnonzero(self._rank[self._steps.item] >= done)
        prefix = np.searchsorted(rest.size, self._budget - int(size[state]), side="right") - 1
        choice[self._steps.item[mine[:prefix]]] = self._steps.option[mine[:prefix]]
        for layer in range(done - 1, -1, -1):
            parent, option = self._layers[layer]
            choice[self._order[layer]] = option[state]
            state = int(parent[state])
        self.choice, self.cost = choice, float(self._costs[np.arange(len(choice)), choice].sum())
