"""What allocation is compared with: the paper's greedy search, random rankings, and a rule by layer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe_collab.allocation import Solution
from moe_collab.formats import Scheme
from moe_collab.moe_model import MoEModel

__all__ = ["ends_rule", "paper_greedy", "random_ranking"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def paper_greedy(sizes: Ints, costs: Floats, budget: int, **_: object) -> Solution:
    """Start at the lowest precision, buy the upgrade with the best measured gain per byte while bytes are left.

    arXiv 2509.25689, mixed-precision quantization. Options of an item are in ascending size.
    """
    choice = np.zeros(len(sizes), np.int64)
    left = budget - int(sizes[:, 0].sum())
    heap: list[tuple[float, int, int, int]] = []

    def offer(item: int) -> None:
        now = int(choice[item])
        for target in np.flatnonzero(np.isfinite(costs[item]) & (sizes[item] > sizes[item, now])).tolist():
            gain = (costs[item, now] - costs[item, target]) / (sizes[item, target] - sizes[item, now])
            heapq.heappush(heap, (-gain, item, now, target))

    for item in range(len(sizes)):
        offer(item)
    while heap:
        _, item, start, target = heapq.heappop(heap)
        price = int(sizes[item, target] - sizes[item, start])
        # An upgrade that does not fit now never will: what is left only shrinks.
        if choice[item] == start and price <= left:
            choice[item], left = target, left - price
            offer(item)
    return _solution(sizes, costs, choice)


def random_ranking(seed: int) -> Callable[..., Solution]:
    """The same search, but which item gains most is drawn by lot; errors fall by four for each bit."""
    weights = np.random.default_rng(seed)

    def solve(sizes: Ints, costs: Floats, budget: int, **_: object) -> Solution:
        importance = np.exp(weights.normal(0, 1.5, (len(sizes), 1)))
        drawn = importance * 4.0 ** (-8.0 * sizes / sizes.max(axis=1, keepdims=True))
        return paper_greedy(sizes, np.where(np.isfinite(costs), drawn, np.inf), budget)

    return solve


def ends_rule(
    moe: MoEModel, names: Sequence[str], ladder: Sequence[Scheme], fits: Callable[[dict[str, Scheme]], bool]
) -> dict[str, Scheme] | None:
    """First and last eighth of the layers one step up the ladder of schemes from the rest; the highest that fits."""
    count = len(moe.layers)
    ends = max(1, round(count / 8))
    outer = tuple(f"{layer.experts_name}." for i, layer in enumerate(moe.layers) if min(i, count - 1 - i) < ends)
    found = None
    for low, high in pairwise(ladder):
        schemes = {name: high if name.startswith(outer) else low for name in names}
        if fits(schemes):
            found = schemes
    return found


def _solution(sizes: Ints, costs: Floats, choice: Ints) -> Solution:
    rows = np.arange(len(choice))
    cost = float(costs[rows, choice].sum())
    return Solution(choice, int(sizes[rows, choice].sum()), cost, cost)
