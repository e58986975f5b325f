"""Local improvement of an allocation: change one item, or two at once, while the budget holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["improve"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Pairs are sought among the moves that lose least at the relaxation's price; more gains nothing measurable.
_PAIR_MOVES = 20_000
_ROUNDS = 60


def improve(sizes: Ints, costs: Floats, budget: int, choice: Ints, price: float) -> Ints:
    """Spend what `choice` [items] leaves of `budget`: best single moves first, then best pairs of moves.

    `price` is the relaxation's cost per byte: it tells which moves can be part of a gain.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    size_of, cost_of = sizes[rows, choice], costs[rows, choice]
    more, less = sizes - size_of[:, None], costs - cost_of[:, None]
    left = budget - int(size_of.sum())
    for _ in range(_ROUNDS):
        moves = _best_single(more, less, left) or _best_pair(more, less, left, price)
        if not moves:
            break
        for item, option in moves:
            left -= int(more[item, option])
            more[item] -= more[item, option]
            less[item] = costs[item] - costs[item, option]
            choice[item] = option
    return choice


def _best_single(more: Ints, less: Floats, left: int) -> list[tuple[int, int]]:
    gain = np.where(more <= left, less, 0.0)
    best = int(gain.argmin())
    item, option = divmod(best, more.shape[1])
    return [(item, option)] if gain[item, option] < 0 else []


def _best_pair(more: Ints, less: Floats, left: int, price: float) -> list[tuple[int, int]]:
    """The two moves of different items that together save most and fit."""
    index, size, cost = _promising(more, less, left, price)
    if len(index) < 2:
        return []
    item = index // more.shape[1]
    lowest = np.minimum.accumulate(cost)
    record = np.concatenate(([True], cost[1:] < lowest[:-1]))
    holder = np.maximum.accumulate(np.where(record, np.arange(len(cost)), 0))
    reach = np.searchsorted(size, left - size, side="right") - 1
    partner = holder[np.maximum(reach, 0)]
    total = np.where((reach >= 0) & (item[partner] != item), cost + cost[partner], 0.0)
    best = int(total.argmin())
    if total[best] >= -1e-13 * float(np.abs(cost[best])):
        return []
    return [divmod(int(index[i]), more.shape[1]) for i in (best, int(partner[best]))]


def _promising(more: Ints, less: Floats, left: int, price: float) -> tuple[Ints, Ints, Floats]:
    """(flat index, size, cost) in ascending size of the moves that lose least at the relaxation's price."""
    with np.errstate(invalid="ignore"):
        loss = np.where(np.isinf(less) | ((more == 0) & (less >= 0)), np.inf, less + price * more).ravel()
    # A pair gains at most what the bytes left are worth, so one move must not lose more than that.
    index = np.flatnonzero(loss <= price * left - min(0.0, float(loss.min())))
    if len(index) > _PAIR_MOVES:
        index = index[np.argpartition(loss[index], _PAIR_MOVES)[:_PAIR_MOVES]]
    index = index[np.argsort(more.ravel()[index], kind="stable")]
    return index, more.ravel()[index], less.ravel()[index]
