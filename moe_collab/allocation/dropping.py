"""Allocation in which experts may be dropped: the dual proposes which stay, a plain knapsack gives these their bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MoeCollabError
from .budget import format_bytes
from .dual import Dual, Peak
from .expert_choice import ExpertChoice, masked_violations
from .multiple_choice import Solution, measured, solve_plain

__all__ = ["PhysicalSolution", "solve_masked", "solve_scan"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# The search for a better choice of experts ends when it could lower the cost by no more than this share.
_CLOSE = 1e-5
# Limit of that search: the number of items times the neighbours looked at. Looking at one takes a bound of its cost; a
# neighbour whose knapsack is solved as well counts as a hundred more.
_EFFORT = 400_000
_SOLVED = 100
# Experts of each routing group that are tried for dropping, and as many that are tried for coming back. Masked pruning
# tries four times as many, out of the whole model.
_MARGINAL = 3


@dataclass(frozen=True)
class PhysicalSolution:
    """The best allocation over all numbers of experts that a group may keep, and what is known of each number."""

    solution: Solution
    kept: int
    """Experts kept per routing group."""
    bounds: dict[int, float]
    """Number of experts kept per group -> lower bound of the cost, for each number that fits the budget."""
    costs: dict[int, float]
    """Number of experts kept per group -> cost reached, for each number that its bound did not rule out."""


def solve_masked(sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice) -> Solution:
    """The best allocation found with masked pruning, which drops any experts that the routers' constraints allow.

    Raises `MoeCollabError` with the bytes needed if the budget is too small.
    """
    dual = Dual(sizes, costs, budget, pruning, np.zeros(1, dtype=np.int64))
    _require(dual.least_bytes(), budget)
    return _Chooser(sizes, costs, budget, pruning, dual).best(0, dual.maximise(0))


def solve_scan(sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice, counts: Ints) -> PhysicalSolution:
    """The best allocation found in which every group keeps the same number of experts, one of `counts` [alternatives].

    Raises `MoeCollabError` with the bytes needed if the budget is too small.
    """
    dual = Dual(sizes, costs, budget, pruning, counts)
    least = dual.least_bytes()
    _require(least, budget)
    fitting = np.flatnonzero((least >= 0) & (least <= budget))
    peaks = {int(a): dual.maximise(int(a)) for a in fitting}
    chooser = _Chooser(sizes, costs, budget, pruning, dual)
    best: tuple[int, Solution] | None = None
    reached = {}
    for alternative, peak in sorted(peaks.items(), key=lambda pair: pair[1].bound):
        if best is not None and peak.bound >= best[1].cost:
            break
        solution = chooser.best(alternative, peak)
        reached[int(counts[alternative])] = solution.cost
        if best is None or solution.cost < best[1].cost:
            best = alternative, solution
    assert best is not None
    bound = min(peak.bound for peak in peaks.values())
    return PhysicalSolution(
        solution=measured(sizes, costs, best[1].choice, bound),
        kept=int(counts[best[0]]),
        bounds={int(counts[a]): peak.bound for a, peak in peaks.items()},
        costs=reached,
    )


def _require(least: Ints, budget: int) -> None:
    possible = least[least >= 0]
    if not len(possible):
        raise MoeCollabError("pruning: too few experts are left for the router; keep more, or lower top_k first.")
    if (needed := int(possible.min())) > budget:
        raise MoeCollabError(
            f"budget: {format_bytes(budget)} is too small; the smallest allocation with as few experts as the router "
            f"allows needs {format_bytes(needed)}. Raise the budget or offer smaller options."
        )


class _Chooser:
    """Finds which experts to keep: first the dual's choice at the budget's price, then changes of it that save cost."""

    def __init__(self, sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice, dual: Dual) -> None:
        self._sizes, self._costs, self._budget = sizes, costs, budget
        self._pruning, self._dual = pruning, dual
        self._table = pruning.table()

    def best(self, alternative: int, peak: Peak) -> Solution:
        """The best allocation found for one alternative of the dual."""
        kept = self._dual.kept(peak.affordable, alternative)
        known = kept, self._with(kept, peak.bound)
        kept = self._dual.kept(peak.too_cheap, alternative)
        if self._bound(kept) < known[1].cost:
            known = self._better(known, kept, peak)
        return self._climb(known, peak)

    def _climb(self, known: tuple[Mask, Solution], peak: Peak) -> Solution:
        """Go on to the first neighbour that costs less, again and again, until the gap is small or the effort spent."""
        effort, before = _EFFORT // len(self._sizes), None
        while known is not before and known[1].gap > _CLOSE:
            before = known
            for neighbour in self._neighbours(known[0], peak, known[1].cost - peak.bound):
                effort -= 1
                if self._bound(neighbour) < known[1].cost:
                    effort -= _SOLVED
                    known = self._better(known, neighbour, peak)
                if effort <= 0:
                    return known[1]
                if known is not before:
                    break
        return known[1]

    def _better(self, known: tuple[Mask, Solution], kept: Mask, peak: Peak) -> tuple[Mask, Solution]:
        solution = self._with(kept, peak.bound)
        return (kept, solution) if solution.cost < known[1].cost else known

    def _with(self, kept: Mask, bound: float) -> Solution:
        """The allocation in which exactly the items marked in `kept` [items, bool] stay."""
        choice = self._dual.drop_option.copy()
        choice[kept] = (
            solve_plain(self._sizes[kept], self._dual.kept_costs[kept], self._budget).choice if kept.any() else 0
        )
        return measured(self._sizes, self._costs, choice, bound)

    def _bound(self, kept: Mask) -> float:
        """Lower bound of the cost if exactly `kept` stay; inf if they do not fit the budget."""
        steps = self._dual.steps.only(kept, self._sizes, self._dual.kept_costs)
        if steps.start_size > self._budget:
            return np.inf
        return steps.relax(self._budget).bound + float(self._dual.drop_cost[~kept].sum())

    def _neighbours(self, kept: Mask, peak: Peak, worthwhile: float) -> Iterator[Mask]:
        """Allowed choices that differ from `kept` in one or two experts, the most promising first.

        A change's loss is what it adds to cost + price * size at the price `peak.affordable`; choices whose loss is not
        below `worthwhile` are left out.
        """
        worth = self._dual.worth(peak.affordable)
        for _, changed in sorted(self._changes(kept, worth, worthwhile), key=lambda change: (change[0], change[1])):
            neighbour = kept.copy()
            neighbour[list(changed)] ^= True
            if self._pruning.form == "physical" or not masked_violations(neighbour, self._pruning):
                yield neighbour

    def _changes(self, kept: Mask, worth: Floats, worthwhile: float) -> list[tuple[float, tuple[int, ...]]]:
        """(loss, items to drop or to bring back), with `worth` [items] from `Dual.worth`.

        Physical pruning swaps two experts of one group; masked pruning swaps any two, or drops or brings back one.
        """
        droppable = kept & self._dual.is_expert & self._dual.can_drop
        addable = ~kept & np.isfinite(worth)
        physical = self._pruning.form == "physical"
        changes: list[tuple[float, tuple[int, ...]]] = []
        for members in self._table.reshape(-1, self._table.shape[2]) if physical else [np.arange(len(kept))]:
            members = members[members >= 0]
            width = _MARGINAL if physical else 4 * _MARGINAL
            out = _smallest(members[droppable[members]], -worth, width)
            back = _smallest(members[addable[members]], worth, width)
            changes += [(worth[j] - worth[i], (int(i), int(j))) for i in out for j in back]
            if not physical:
                changes += [(-worth[i], (int(i),)) for i in out] + [(worth[j], (int(j),)) for j in back]
        return [(float(loss), items) for loss, items in changes if loss < worthwhile]


def _smallest(items: Ints, values: Floats, count: int) -> Ints:
    """The `count` items of `items` whose entries in `values` [all items] are smallest."""
    return items[np.argsort(values[items], kind="stable")[:count]]
