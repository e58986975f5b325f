"""Allocation in which experts may be dropped: the dual proposes who stays, the plain knapsack does the rest."""

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

# Experts that no other choice of experts can improve by more than this share of the cost are left alone.
_CLOSE = 1e-5
# Work on neighbours of a choice of experts: items times neighbours bounded, and a solved one counts as a hundred.
_EFFORT = 400_000
_SOLVED = 100
_MARGINAL = 3


@dataclass(frozen=True)
class PhysicalSolution:
    """The best allocation over all kept counts, and what is known of each count."""

    solution: Solution
    kept: int
    """Experts kept per routing group."""
    bounds: dict[int, float]
    """Lower bound of the cost for each count that fits the budget."""
    costs: dict[int, float]
    """Cost reached for each count whose bound did not rule it out."""


def solve_masked(sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice) -> Solution:
    """Experts dropped freely per layer under the routers' constraints. Raises `MoeCollabError` with the minimum."""
    dual = Dual(sizes, costs, budget, pruning, np.zeros(1, dtype=np.int64))
    _require(dual.least_bytes(), budget)
    return _Chooser(sizes, costs, budget, pruning, dual).best(0, dual.maximise(0))


def solve_scan(sizes: Ints, costs: Floats, budget: int, pruning: ExpertChoice, counts: Ints) -> PhysicalSolution:
    """The same number of experts in every group: the best of `counts` [alternatives]."""
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
    """Finds who stays: the dual's choice at the budget's price, then single changes of it that pay."""

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
        """Take the first neighbour that is better, again and again, while the gap and the effort allow."""
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
        """The allocation when exactly `kept` [items] stay."""
        choice = self._dual.drop_option.copy()
        choice[kept] = (
            solve_plain(self._sizes[kept], self._dual.kept_costs[kept], self._budget).choice if kept.any() else 0
        )
        return measured(self._sizes, self._costs, choice, bound)

    def _bound(self, kept: Mask) -> float:
        """Lower bound of the cost when exactly `kept` stay; inf when they do not fit."""
        steps = self._dual.steps.only(kept, self._sizes, self._dual.kept_costs)
        if steps.start_size > self._budget:
            return np.inf
        return steps.relax(self._budget).bound + float(self._dual.drop_cost[~kept].sum())

    def _neighbours(self, kept: Mask, peak: Peak, worthwhile: float) -> Iterator[Mask]:
        """Allowed changes of one or two experts, least loss at the budget's price first, up to `worthwhile`."""
        worth = self._dual.worth(peak.affordable)
        for _, changed in sorted(self._changes(kept, worth, worthwhile), key=lambda change: (change[0], change[1])):
            neighbour = kept.copy()
            neighbour[list(changed)] ^= True
            if self._pruning.form == "physical" or not masked_violations(neighbour, self._pruning):
                yield neighbour

    def _changes(self, kept: Mask, worth: Floats, worthwhile: float) -> list[tuple[float, tuple[int, ...]]]:
        """(loss at the price, items that change sides): swaps within groups, and if masked also across, or alone."""
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
    return items[np.argsort(values[items], kind="stable")[:count]]
