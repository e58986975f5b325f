"""The Lagrangian dual of allocation with dropped experts: bytes get a price, then every group decides by itself.

At a given price per byte, keeping an expert costs the least cost + price * size among its options that keep it; a group
that keeps m experts keeps those for which this is furthest below the cost of dropping them (Kellerer, Pferschy,
Pisinger, *Knapsack Problems*, 2004, chapter 3.8, for the dual of knapsacks). Every price gives a lower bound of the
cost of all allocations within the budget.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .expert_choice import ExpertChoice
from .kept_counts import cheapest_counts
from .relaxation import lower_hulls

__all__ = ["Dual", "Peak"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ROUNDS = 60
_CONVERGED = 1e-10


class Peak(NamedTuple):
    """The dual's maximum, which is a lower bound of the cost, and the prices per byte just below and just above it."""

    bound: float
    too_cheap: float
    """Price at which the best choices take more bytes than the budget (0 if they fit even for free)."""
    affordable: float
    """Price at which the best choices fit the budget."""


class _Ranked(NamedTuple):
    """The experts of each group in the order in which they would be kept: those that must stay, then by cost saved."""

    cost: Floats
    """What keeping the first m experts instead of dropping them adds to the cost at the price (a saving is negative),
    [layers, n_group, m]; inf where that is not possible."""
    size: Ints
    """Bytes of the first m experts, [layers, n_group, m]."""
    items: Ints
    """The experts' items in that order, [layers, n_group, experts]; -1 where there is none."""


class Dual:
    """The dual for several alternatives at once.

    With physical pruning there is an alternative for each of `counts`, the number of experts that every group keeps;
    masked pruning is a single alternative.
    """

    def __init__(self, sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice, counts: Ints) -> None:
        self._sizes, self._budget, self._pruning, self._counts = sizes, budget, pruning, counts
        self._table = pruning.table()
        self.is_expert = np.asarray(pruning.layers) >= 0
        drops = self.is_expert[:, None] & (sizes == 0) & np.isfinite(costs)
        self.drop_option = np.where(drops, costs, np.inf).argmin(axis=1)
        self.can_drop = drops.any(axis=1)
        self.drop_cost = np.where(self.can_drop, np.take_along_axis(costs, self.drop_option[:, None], 1)[:, 0], 0.0)
        self.kept_costs = np.where(drops, np.inf, costs)
        self.steps = lower_hulls(sizes, self.kept_costs)
        self._points: dict[float, tuple[Floats, Ints]] = {}

    def least_bytes(self) -> Ints:
        """Bytes of the smallest allocation of each alternative, [alternatives]; -1 where there is none."""
        worth, size = self._bought(np.inf)
        never = np.isinf(worth)
        cost, total = self._totals(np.where(never, np.inf, size.astype(np.float64)), size, np.zeros(len(size)))
        return np.where(np.isinf(cost), -1, total)

    def maximise(self, alternative: int) -> Peak:
        """The highest point of the dual of one alternative, whose smallest allocation must fit the budget."""
        low, high = self._bracket(alternative)
        for turn in range(_ROUNDS):
            (low_value, low_size), (high_value, high_size) = self._at(low, alternative), self._at(high, alternative)
            best = max(low_value, high_value)
            if low == high or low_size <= high_size:
                break
            meeting = (high_value - high * (high_size - self._budget)) - (low_value - low * (low_size - self._budget))
            price = meeting / (low_size - high_size)
            ceiling = low_value + (price - low) * (low_size - self._budget)
            if ceiling - best <= _CONVERGED * abs(best) or not low < price < high:
                break
            # Every third price is the geometric mean of both ends instead: a long flat side would stall the search.
            price = price if turn % 3 or low == 0 else float(np.sqrt(low * high))
            low, high = (price, high) if self._at(price, alternative)[1] > self._budget else (low, price)
        return Peak(best, low, high)

    def worth(self, price: float) -> Floats:
        """Cost saved by dropping each expert at `price`, [items]: negative where keeping it is better."""
        worth, _ = self._bought(price)
        return worth - self.drop_cost

    def kept(self, price: float, alternative: int) -> Mask:
        """Which items the alternative keeps at `price`, [items, bool]; an item that is no expert is always kept."""
        ranked = self._ranked(*self._bought(price), self.drop_cost)
        if self._pruning.form == "physical":
            counts = np.full(ranked.cost.shape[:2], self._counts[alternative])
        else:
            _, counts = cheapest_counts(ranked.cost, self._pruning)
        kept = ~self.is_expert
        kept[ranked.items[np.arange(ranked.items.shape[2]) < counts[:, :, None]]] = True
        return kept

    def _bracket(self, alternative: int) -> tuple[float, float]:
        """(a price at which too many bytes are taken, a price at which they fit the budget)."""
        if self._at(0.0, alternative)[1] <= self._budget:
            return 0.0, 0.0
        high = float(self.steps.slope.max(initial=0.0)) or 1.0
        while self._at(high, alternative)[1] > self._budget and high < 1e300:
            high *= 16.0
        sizes = {price: int(size[alternative]) for price, (_, size) in self._points.items()}
        return (
            max(price for price, size in sizes.items() if size > self._budget),
            min(price for price, size in sizes.items() if size <= self._budget),
        )

    def _at(self, price: float, alternative: int) -> tuple[float, int]:
        """(value of the dual, bytes taken) at `price`."""
        if price not in self._points:
            cost, size = self._totals(*self._bought(price), self.drop_cost)
            self._points[price] = cost - price * self._budget, size
        value, size = self._points[price]
        return float(value[alternative]), int(size[alternative])

    def _bought(self, price: float) -> tuple[Floats, Ints]:
        """(cost + price * size, size), [items] each, of each item's best option that keeps it."""
        steps = int(np.searchsorted(-self.steps.slope, -price, side="left"))
        choice = self.steps.start.copy()
        choice[self.steps.item[:steps]] = self.steps.option[:steps]
        rows = np.arange(len(choice))
        size, cost = self._sizes[rows, choice], self.kept_costs[rows, choice]
        return cost + (price * size if np.isfinite(price) else 0.0), size

    def _ranked(self, worth: Floats, size: Ints, drop_cost: Floats) -> _Ranked:
        place = self._table >= 0
        gain = np.where(place, (worth - drop_cost)[self._table], np.inf)
        forced = place & ~self.can_drop[self._table]
        order = np.argsort(np.where(forced, -np.inf, gain), axis=2, kind="stable")
        items = np.take_along_axis(self._table, order, 2)
        cost = _prefix(np.take_along_axis(gain, order, 2))
        cost[np.arange(cost.shape[2]) < forced.sum(axis=2)[:, :, None]] = np.inf
        return _Ranked(cost, _prefix(np.where(items >= 0, size[items], 0)), items)

    def _totals(self, worth: Floats, size: Ints, drop_cost: Floats) -> tuple[Floats, Ints]:
        """(cost + price * size, size) of each alternative's best allocation, [alternatives] each."""
        ranked = self._ranked(worth, size, drop_cost)
        cost = float(worth[~self.is_expert].sum() + drop_cost[self.is_expert].sum())
        shared = int(size[~self.is_expert].sum())
        if self._pruning.form == "physical":
            return cost + ranked.cost.sum((0, 1))[self._counts], shared + ranked.size.sum((0, 1))[self._counts]
        kept_cost, counts = cheapest_counts(ranked.cost, self._pruning)
        kept_size = np.take_along_axis(ranked.size, counts[:, :, None], 2)
        return np.array([cost + kept_cost.sum()]), np.array([shared + kept_size.sum()])


def _prefix(values: NDArray) -> NDArray:
    """Sums of the first 0, 1, ... values along the last axis."""
    return np.concatenate((np.zeros_like(values[..., :1]), np.cumsum(values, axis=-1)), axis=-1)
